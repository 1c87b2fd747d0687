import os
from pathlib import Path

import numpy as np
import pytest

from granq_jax.data import DATASETS, batches, load_split
from tests.conftest import one_line_error

PREPARED = Path(os.environ.get("GRANQ_JAX_TEST_DATA", "nowhere")) / "tfds"


def test_digits_are_split_without_overlap_and_evenly():
    train, test = load_split("digits", "train"), load_split("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert np.ptp(np.bincount(test.labels)) <= 3
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) == 0


def test_the_last_batch_is_filled_with_images_of_weight_zero():
    split = load_split("digits", "test")
    parts = list(batches(split, 100))
    assert [weights.sum() for _, _, weights in parts] == [100, 100, 100, 60]
    images = np.concatenate([images for images, _, _ in parts])
    assert images.shape == (400, 8, 8, 1)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[:360], split.dataset.normalise(split.images))
    np.testing.assert_array_equal(images[360:], np.repeat(images[300:301], 40, axis=0))


@pytest.mark.parametrize("name", DATASETS)
def test_normalisation(name):
    dataset = DATASETS[name]
    size, channels = dataset.image_size, dataset.channels
    raw = np.full((1, size, size, channels), dataset.max_value, np.uint8)
    expected = (1 - np.array(dataset.mean)) / np.array(dataset.std)
    np.testing.assert_allclose(dataset.normalise(raw)[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.skipif(not PREPARED.exists(), reason="needs CIFAR-10 for TFDS in $GRANQ_JAX_TEST_DATA/tfds")
def test_cifar10_is_read_from_tfds():
    split = load_split("cifar10", "test", os.fspath(PREPARED))
    assert split.images.shape == (10_000, 32, 32, 3)
    assert split.images.dtype == np.uint8
    assert np.bincount(split.labels).tolist() == [1000] * 10


def test_a_missing_data_set_says_what_to_do(tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name))
    place = tmp_path / "data"
    with one_line_error(
        ValueError, "config.data_dir", str(place), "cifar10", "granq-jax[prepare]", "--config.eval=none"
    ):
        load_split("cifar10", "test", str(place))
    assert not place.exists()
