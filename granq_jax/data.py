"""Real images, for evaluating and for training teachers: data sets by name, as normalised batches.

Zero-shot quantization itself needs none of this.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Iterator

import numpy as np
import PIL.Image


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is fixed of a data set, and how its images are normalised: (pixel / max_value - mean) / std."""

    classes: int
    image_size: int
    channels: int
    max_value: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """Raw images (N, H, W, C) to float32 ones of roughly zero mean and unit variance."""
        scaled = images.astype(np.float32) / np.float32(self.max_value)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (N, H, W, C), uint8, and labels (N,), int32, of a part of a data set."""

    dataset: Dataset
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


DATASETS = {
    "cifar10": Dataset(10, 32, 3, 255, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": Dataset(100, 32, 3, 255, (0.50705882, 0.48666667, 0.44078431), (0.26745098, 0.25568627, 0.27607843)),
    # The 8x8 scans of handwritten digits that come with scikit-learn: no network, no files.
    "digits": Dataset(10, 8, 1, 16, (0.30,), (0.38,)),
}


def load_split(name: str, split: str, data_dir: str = "") -> Split:
    """A whole split in memory.

    Args:
      name: of ``DATASETS``.
      split: ``"train"`` or ``"test"``.
      data_dir: where TFDS finds the data set, or prepares it; ``""`` is TFDS's own default.

    Raises:
      ValueError: if the data set cannot be had. The message says what to do.

    Example:
      >>> split = load_split("digits", "test")
      >>> len(split), split.images.shape, split.images.dtype
      (360, (360, 8, 8, 1), dtype('uint8'))
    """
    if name == "digits":
        return _load_digits(split)
    return _load_tfds(name, split, data_dir)


def batches(split: Split, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Normalised images, labels and weights in order, every batch of the same size.

    The last batch is filled up with copies of its first image, of weight 0: copies, so that a range
    measured over a batch is that of its real images.
    """
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, start + batch_size)
        real = indices < len(split)
        indices = np.where(real, indices, start)
        yield split.dataset.normalise(split.images[indices]), split.labels[indices], real.astype(np.float32)


def _load_digits(split: str) -> Split:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images[..., None].astype(np.uint8),
        digits.target.astype(np.int32),
        test_size=0.2,
        random_state=0,
        stratify=digits.target,
    )
    train_images, test_images, train_labels, test_labels = parts
    if split == "train":
        return Split(DATASETS["digits"], train_images, train_labels)
    return Split(DATASETS["digits"], test_images, test_labels)


def _load_tfds(name: str, split: str, data_dir: str) -> Split:
    import tensorflow_datasets as tfds

    place = data_dir or "TFDS's default directory"
    remedy = (
        f"Give a directory that holds {name} prepared for TFDS as array_record with --config.data_dir=DIR, or where "
        "there is a network let TFDS prepare it: pip install 'granq-jax[prepare]' and run again"
        + (", or train without evaluation: --config.eval=none" if split == "test" else "")
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if not builder.is_prepared():
            if importlib.util.find_spec("tensorflow") is None:
                raise ValueError("it is not prepared there, and preparing it needs TensorFlow")
            builder.download_and_prepare()
        if split not in builder.info.splits:
            raise ValueError(f"it has no split {split!r}, only {', '.join(builder.info.splits)}")
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        examples = source.__getitems__(range(len(source)))
        images = np.stack([np.asarray(PIL.Image.open(io.BytesIO(example["image"]))) for example in examples])
        return Split(DATASETS[name], images, np.array([example["label"] for example in examples], np.int32))
    except Exception as error:  # whatever TFDS, the disk or the network met, the way out is the same
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"config.data_dir: {name} cannot be read from {place}: {reason}. {remedy}") from error
