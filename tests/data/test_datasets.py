import functools
import importlib.util
import io
import json
import os
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest

from granq_jax.data.datasets import DATASETS, load_split
from granq_jax.data.splits import EncodedSplit, batches, centre_crop
from granq_jax.errors import RunError
from tests.conftest import one_line_error

PREPARED = Path(os.environ.get("GRANQ_JAX_TEST_DATA", "nowhere")) / "tfds"
CLASSES = 1000
COLOUR = (200, 100, 50)


def encoded(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def label_colour(label):
    """A colour for each class, which JPEG keeps apart."""
    return label // 100 * 25, label // 10 % 10 * 25, label % 10 * 25


@functools.cache
def photograph(label, image_format):
    """An image of the class's colour, of its own size and shape."""
    return encoded(PIL.Image.new("RGB", (16 + label % 25, 12 + label % 19), label_colour(label)), image_format)


def in_every_mode():
    """The same colour in the ways that files have."""
    image = PIL.Image.new("RGB", (40, 30), COLOUR)
    return {
        "0.jpg": encoded(image.convert("L"), "JPEG"),
        "1.jpeg": encoded(image.convert("CMYK"), "JPEG"),
        "2.png": encoded(image.quantize(4), "PNG"),
        "3.png": encoded(image.convert("RGBA"), "PNG"),
        "4.PNG": encoded(image.convert("LA"), "PNG"),
        "5.JPEG": encoded(image, "PNG"),  # there is one such file in ImageNet
        "6.webp": encoded(image, "WEBP"),
        "7.bmp": encoded(image, "BMP"),
        "8.png": encoded(image.quantize(4), "PNG", transparency=b"\x80\xff\x00"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images: in val/ one a class and a stray file, in train/ a second one in every tenth class."""
    root = tmp_path_factory.mktemp("folder")
    names = [f"n{7 * label:05}" for label in range(CLASSES)]
    for label in np.random.default_rng(0).permutation(CLASSES).tolist():  # not made in the order of the labels
        for part in "val", "train":
            place = root / part / names[label]
            place.mkdir(parents=True)
            (place / "b.JPEG").write_bytes(photograph(label, "JPEG"))
            if part == "train" and label % 10 == 0:
                (place / "a.png").write_bytes(photograph(label, "PNG"))
    (root / "val" / names[1] / "a.txt").write_text("no image")
    (root / "val" / "README.jpg").write_bytes(photograph(0, "JPEG"))
    return root


def test_digits_are_split_without_overlap_and_evenly():
    train, test = load_split("digits", "train"), load_split("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert np.ptp(np.bincount(test.labels)) <= 3
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) == 0


@pytest.mark.parametrize("name", DATASETS)
def test_normalisation(name):
    dataset = DATASETS[name]
    size, channels = dataset.image_size, dataset.channels
    raw = np.full((1, size, size, channels), dataset.max_value, np.uint8)
    expected = (1 - np.array(dataset.mean)) / np.array(dataset.std)
    np.testing.assert_allclose(dataset.normalise(raw)[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("below", "split", "twice"),
    [("", "test", False), ("val", "test", False), ("", "train", True)],
    ids=["val", "directly below data_dir", "train"],
)
def test_labels_of_an_image_folder_follow_the_order_of_its_classes(folder, below, split, twice):
    loaded = load_split("image_folder", split, os.fspath(folder / below))
    expected = [label for label in range(CLASSES) for _ in range(2 if twice and label % 10 == 0 else 1)]
    assert len(loaded) == len(expected)
    assert [label for _, label in loaded.read(list(range(len(loaded))))] == expected
    indices = np.arange(len(expected))[::-37]
    images, labels = loaded.examples(indices)
    assert labels.dtype == np.int32
    assert labels.tolist() == [expected[index] for index in indices]
    assert images.shape == (len(indices), 224, 224, 3)
    colours = np.array([label_colour(label) for label in labels])
    assert np.abs(images - colours[:, None, None]).max() <= 5


def test_images_of_any_mode_come_out_in_colour(tmp_path):
    for label in range(CLASSES):
        (tmp_path / f"{label:04}").mkdir()
    files = in_every_mode()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "0005" / "._0.jpg").write_bytes(b"what some systems leave beside a file")
    for name, data in files.items():
        (tmp_path / "0005" / name).write_bytes(data)
    images, labels = load_split("image_folder", "test", os.fspath(tmp_path)).examples(np.arange(len(files)))
    assert labels.tolist() == [5] * len(files)
    assert images.shape == (len(files), 224, 224, 3)
    assert images.dtype == np.uint8
    luma = round(np.dot((0.299, 0.587, 0.114), COLOUR))
    expected = np.array([(luma,) * 3 if name in ("0.jpg", "4.PNG") else COLOUR for name in files])
    assert np.abs(images - expected[:, None, None]).max() <= 5


@pytest.mark.parametrize(
    ("classes", "below", "split", "words"),
    [
        (0, None, "test", ["''"]),
        (0, "nowhere", "test", ["allowed is a directory"]),
        (0, "file", "test", ["allowed is a directory"]),
        (0, "", "test", ["holds 0 class folders", "1000"]),
        (0, "", "train", ["train", "holds 0 class folders", "1000"]),
        (999, "", "test", ["holds 999 class folders", "1000"]),
        (1001, "", "test", ["holds 1001 class folders", "1000"]),
        (1000, "", "test", ["no image", ".jpeg", ".png"]),
    ],
    ids=["no name", "missing", "a file", "empty", "no train", "too few", "too many", "no images"],
)
def test_what_is_no_image_folder_is_refused(tmp_path, classes, below, split, words):
    (tmp_path / "file").write_text("no folder")
    for label in range(classes):
        (tmp_path / f"{label:04}").mkdir()
    if classes:
        (tmp_path / "0000" / "notes.txt").write_text("no image")
    data_dir = "" if below is None else os.fspath(tmp_path / below)
    with one_line_error(ValueError, "config.data_dir", data_dir, *words):
        load_split("image_folder", split, data_dir)


@pytest.mark.parametrize("what", ["mean", "std"])
def test_images_are_normalised_as_the_teachers_were(tmp_path, what):
    usual = DATASETS["cifar10"]
    given = {what: (0.5, 0.25, 0.125)}
    np.savez(tmp_path / "cifar10.npz", x_test=np.full((2, 32, 32, 3), 51, np.uint8), y_test=np.zeros(2, int))
    found = load_split("cifar10", "test", os.fspath(tmp_path), **given)
    mean, std = np.array(given.get("mean", usual.mean)), np.array(given.get("std", usual.std))
    images, _, _ = next(iter(batches(found, 2)))
    np.testing.assert_allclose(images[0, 0, 0], (0.2 - mean) / std, rtol=1e-5)
    # And back, for people.
    assert set(found.dataset.pixels(images).ravel().tolist()) == {51}
    assert load_split("cifar10", "test", os.fspath(tmp_path)).dataset == usual


def class_folders(root, names, image=b"no image"):
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes(image)


@pytest.mark.parametrize("name", [str, "{:03}".format, "{:04}".format], ids=["0", "000", "0000"])
def test_folders_named_by_labels_have_those_labels(tmp_path, name):
    class_folders(tmp_path / "val", map(name, range(CLASSES)))
    split = load_split("image_folder", "test", os.fspath(tmp_path))
    assert sorted(label for _, label in split.read(list(range(CLASSES)))) == list(range(CLASSES))
    for index in 0, 1, 2, 10, 555, 999:
        assert int(Path(split.name(index)).parent.name) == split.read([index])[0][1]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (list(map(str, range(1, 1001))), ["order", "0 to 999", "1 to 1000", "labels"]),
        ([f"{number:04}" for number in range(1, 1001)], ["order", "0 to 999", "1 to 1000"]),
        (["0", "00", *map(str, range(2, 1000))], ["order"]),
        ([f"class{number}" for number in range(1000)], ["order", "'class10'", "'class2'", "zeros"]),
        ([f"{number}_bird" for number in range(1000)], ["order", "zeros"]),
    ],
    ids=["from 1", "from 0001", "one twice", "in names", "before names"],
)
def test_folders_whose_order_is_not_clear_are_refused(tmp_path, names, words):
    class_folders(tmp_path, names)
    with one_line_error(ValueError, "config.data_dir", str(tmp_path), *words):
        load_split("image_folder", "test", os.fspath(tmp_path))


@pytest.mark.parametrize(
    "names",
    [[f"n{7 * number:05}" for number in range(1000)], [f"class_{number:03}_x2" for number in range(1000)]],
    ids=["WordNet", "filled up"],
)
def test_folders_whose_order_is_clear_are_in_it(tmp_path, names):
    class_folders(tmp_path, names)
    split = load_split("image_folder", "test", os.fspath(tmp_path))
    assert [Path(split.name(index)).parent.name for index in range(CLASSES)] == names
    assert [label for _, label in split.read(list(range(CLASSES)))] == list(range(CLASSES))


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_that_differ_between_training_and_test_images_are_refused(tmp_path, split):
    names = [f"n{number:04}" for number in range(CLASSES)]
    class_folders(tmp_path / "train", names)
    class_folders(tmp_path / "val", [*names[:-1], "n2000"])
    with one_line_error(ValueError, "config.data_dir", "train", "val", "another class", "n0999, n2000"):
        load_split("image_folder", split, os.fspath(tmp_path))


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (["ILSVRC2012_val_00000001.JPEG"], ["1 images", "ImageNet's validation images", "CLASS/"]),
        (["a.png", "b.png"], ["2 images", "CLASS/"]),
        (["n01440764.tar"], ["n01440764.tar", "unpack"]),
        (["ILSVRC/Data/CLS-LOC/val/x"], ["Kaggle", "ILSVRC/Data/CLS-LOC'"]),
        (["a.parquet", "b", "c", "d"], ["a.parquet, b, c, ..."]),
    ],
    ids=["flat ImageNet", "flat", "archives", "Kaggle's", "another"],
)
@pytest.mark.parametrize("below", ["", "val"])
def test_other_layouts_are_named_with_what_to_do(tmp_path, held, below, words):
    for name in held:
        (tmp_path / below / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / below / name).write_bytes(b"")
    with one_line_error(ValueError, "config.data_dir", "class folders", *words):
        load_split("image_folder", "test", os.fspath(tmp_path))


def test_grey_of_16_bits_is_that_of_8_bits(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    for number in range(CLASSES):
        (tmp_path / f"{number:03}").mkdir()
    PIL.Image.fromarray(ramp).save(tmp_path / "000" / "8.png")
    PIL.Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "000" / "16.png")
    grey = PIL.Image.fromarray((ramp.astype(np.uint16) * 257).astype(np.int32))  # as Pillow read PNGs before
    (tmp_path / "000" / "16b.png").write_bytes(encoded(grey, "TIFF"))
    split = load_split("image_folder", "test", os.fspath(tmp_path))
    assert len(split) == 3
    images, _ = split.examples(np.arange(3))
    assert np.ptp(images) > 200
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], images[2])
    crops, _ = split.augmented(np.zeros(8, int), np.random.default_rng(0), 16, 0)
    assert (crops == 255).mean() < 0.1


@pytest.mark.parametrize(
    "image",
    [PIL.Image.new("F", (8, 8), 0.5), PIL.Image.new("I", (8, 8), 70_000), PIL.Image.new("I", (8, 8), -1)],
    ids=["real", "above 16 bits", "below 0"],
)
def test_grey_of_which_white_is_not_known_is_refused(tmp_path, image):
    for number in range(CLASSES):
        (tmp_path / f"{number:03}").mkdir()
    (tmp_path / "000" / "a.png").write_bytes(encoded(image, "TIFF"))
    with one_line_error(RunError, "config.data_dir", "a.png"):
        load_split("image_folder", "test", os.fspath(tmp_path)).examples(np.arange(1))


@pytest.mark.skipif(not PREPARED.exists(), reason="needs CIFAR-10 for TFDS in $GRANQ_JAX_TEST_DATA/tfds")
def test_cifar10_is_read_from_tfds():
    split = load_split("cifar10", "test", os.fspath(PREPARED))
    assert split.images.shape == (10_000, 32, 32, 3)
    assert split.images.dtype == np.uint8
    assert np.bincount(split.labels).tolist() == [1000] * 10


@pytest.fixture
def alone(monkeypatch):
    """Neither TensorFlow nor, as the mock that is returned tells, the network."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name))
    network = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(socket, "getaddrinfo", network)
    return network


def feature(kind, **attributes):
    return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", **attributes}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The directory, and the images and labels, of three photographs prepared for TFDS in two files."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    random = np.random.default_rng(0)
    sizes = [(260, 230), (225, 300), (64, 64)]
    photographs = [
        encoded(PIL.Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8)), "JPEG") for size in sizes
    ]
    labels, shards = [999, 0, 7], [2, 1]
    examples = []
    for name, (photo, label) in enumerate(zip(photographs, labels, strict=True)):
        example = tf_example_pb2.Example()
        example.features.feature["file_name"].bytes_list.value.append(f"{name}.JPEG".encode())
        example.features.feature["image"].bytes_list.value.append(photo)
        example.features.feature["label"].int64_list.value.append(label)
        examples.append(example.SerializeToString())

    root = tmp_path_factory.mktemp("tfds")
    place = root / "imagenet2012" / "5.1.0"
    place.mkdir(parents=True)
    left = iter(examples)
    for shard, length in enumerate(shards):
        path = place / f"imagenet2012-validation.array_record-{shard:05}-of-{len(shards):05}"
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        for _ in range(length):
            writer.write(next(left))
        writer.close()
    image = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {"dimensions": ["-1", "-1", "3"]}}
    features = {
        "file_name": feature("text_feature.Text", text={}),
        "image": feature("image_feature.Image", image=image),
        "label": feature("class_label_feature.ClassLabel", classLabel={"numClasses": "1000"}),
    }
    described = feature("features_dict.FeaturesDict", featuresDict={"features": features})
    (place / "features.json").write_text(json.dumps(described))
    info = {
        "fileFormat": "array_record",
        "name": "imagenet2012",
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": "validation",
                "numBytes": str(sum(map(len, examples))),
                "shardLengths": [str(length) for length in shards],
            }
        ],
        "version": "5.1.0",
    }
    (place / "dataset_info.json").write_text(json.dumps(info))
    return os.fspath(root), photographs, labels


def test_the_validation_images_of_imagenet_are_read_from_tfds(imagenet, alone):
    data_dir, photographs, labels = imagenet
    split = load_split("imagenet2012", "test", data_dir)
    assert isinstance(split, EncodedSplit)
    assert len(split) == 3
    images, read_labels = split.examples(np.array([2, 0, 1]))
    assert read_labels.dtype == np.int32
    assert read_labels.tolist() == [labels[2], labels[0], labels[1]]
    for image, photo in zip(images, [photographs[2], photographs[0], photographs[1]], strict=True):
        np.testing.assert_array_equal(image, centre_crop(PIL.Image.open(io.BytesIO(photo)), 224))
    alone.assert_not_called()


def test_a_split_that_was_not_prepared_is_named_and_so_are_those_that_were(imagenet):
    data_dir, _, _ = imagenet
    with one_line_error(ValueError, "config.data_dir", "imagenet2012", data_dir, "no split 'train', only validation."):
        load_split("imagenet2012", "train", data_dir)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_a_missing_data_set_says_what_to_do(tmp_path, alone, name):
    place = tmp_path / "data"
    with one_line_error(ValueError, "config.data_dir", str(place), name, "granq-jax[prepare]", "--config.eval=none"):
        load_split(name, "test", str(place))
    assert not place.exists()
    alone.assert_not_called()
