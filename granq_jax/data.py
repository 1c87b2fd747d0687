"""Real images by data set name, for evaluating and for training teachers.

Zero-shot quantization itself needs none of this.
"""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import PIL.Image

from granq_jax.checks import check_choice
from granq_jax.cifar import load_cifar, looked_for
from granq_jax.splits import Dataset, EncodedSplit, MemorySplit, Split

_IMAGENET = Dataset(1000, 224, 3, 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

DATASETS = {
    "cifar10": Dataset(10, 32, 3, 255, (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": Dataset(100, 32, 3, 255, (0.50705882, 0.48666667, 0.44078431), (0.26745098, 0.25568627, 0.27607843)),
    "imagenet2012": _IMAGENET,
    "image_folder": _IMAGENET,
    # The 8x8 scans of handwritten digits that come with scikit-learn: no network, no files.
    "digits": Dataset(10, 8, 1, 16, (0.30,), (0.38,)),
}

_CIFAR = ("cifar10", "cifar100")
# ImageNet's test labels were never published: its validation images serve as test images.
_TFDS_SPLITS = {"imagenet2012": {"train": "train", "test": "validation"}}
_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def load_split(name: str, split: str, data_dir: str = "") -> Split:
    """A split of a data set: small images in memory, photographs decoded when they are used.

    Args:
      name: of ``DATASETS``. An ``"image_folder"`` holds a folder for each class, whose order by name
        is that of the labels, below ``data_dir/train`` and ``data_dir/val``; test images may also
        lie directly in ``data_dir/CLASS``.
      split: ``"train"`` or ``"test"``.
      data_dir: where the data set is: of CIFAR, the directory that holds its published archive unpacked
        (``cifar-10-batches-py``, ``cifar-10-batches-bin`` and their like) or ``cifar10.npz``, or such a
        file, see :func:`granq_jax.cifar.load_cifar`; of an image folder, its path. Else it is where TFDS
        finds the data set, or prepares it; ``""`` is TFDS's own default.

    Raises:
      ValueError: if the data set cannot be had. The message says what to do.

    Examples:
      >>> split = load_split("digits", "test")
      >>> len(split), split.images.shape, split.images.dtype
      (360, (360, 8, 8, 1), dtype('uint8'))
    """
    check_choice("dataset", name, DATASETS)
    check_choice("split", split, ("train", "test"))
    if name == "digits":
        return _load_digits(split)
    try:
        if name == "image_folder":
            return _load_folder(split, data_dir)
        found = load_cifar(name, DATASETS[name], split, data_dir) if name in _CIFAR and data_dir else None
    except OSError as error:
        raise ValueError(f"config.data_dir: {data_dir!r} cannot be read: {error}") from error
    return _load_tfds(name, split, data_dir) if found is None else found


def _load_digits(split: str) -> MemorySplit:
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
        return MemorySplit(DATASETS["digits"], train_images, train_labels)
    return MemorySplit(DATASETS["digits"], test_images, test_labels)


def _load_folder(split: str, data_dir: str) -> EncodedSplit:
    dataset = DATASETS["image_folder"]
    root = Path(data_dir)
    if data_dir == "" or not os.path.isdir(root):
        raise ValueError(f"config.data_dir: got {data_dir!r}, allowed is a directory that holds an image folder")
    if split == "train" or (root / "val").is_dir():
        root = root / {"train": "train", "test": "val"}[split]
    classes = [folder for folder in _visible(root) if folder.is_dir()] if root.is_dir() else []
    if len(classes) != dataset.classes:
        raise ValueError(
            f"config.data_dir: {str(root)!r} holds {len(classes)} class folders, allowed are {dataset.classes}"
        )
    files = [
        (path, label)
        for label, folder in enumerate(classes)
        for path in _visible(folder)
        if path.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if not files:
        raise ValueError(
            f"config.data_dir: {str(root)!r} holds no image in CLASS/, allowed are {', '.join(sorted(_IMAGE_SUFFIXES))}"
        )

    def read(indices):
        return [(files[index][0].read_bytes(), files[index][1]) for index in indices]

    return EncodedSplit(dataset, len(files), read, lambda index: str(files[index][0]))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _load_tfds(name: str, split: str, data_dir: str) -> Split:
    place = data_dir or "TFDS's default directory"
    archives = f"{' or '.join(looked_for(name))} of it, or " if name in _CIFAR else ""
    remedy = (
        f"Give a directory that holds {archives}{name} prepared for TFDS as array_record with --config.data_dir=DIR, "
        "or where there is a network let TFDS prepare it: pip install 'granq-jax[prepare]'"
        + (", put ILSVRC2012_img_train.tar and _val.tar into DIR/downloads/manual" if name == "imagenet2012" else "")
        + " and run again"
        + (", or use --config.dataset=image_folder" if name == "imagenet2012" else "")
        + (", or train without evaluation: --config.eval=none" if split == "test" else "")
    )
    try:
        prepares = importlib.util.find_spec("tensorflow") is not None
        if data_dir and not prepares and not os.path.isdir(Path(data_dir) / name):
            # TFDS, which may not even be installed, would find nothing there.
            raise ValueError(f"it holds no {name}/ and nothing else that is looked for")
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if not builder.is_prepared():
            if not prepares:
                raise ValueError("it is not prepared there, and preparing it needs TensorFlow")
            builder.download_and_prepare()
        tfds_split = _TFDS_SPLITS.get(name, {}).get(split, split)
        if tfds_split not in builder.info.splits:
            raise ValueError(f"it has no split {tfds_split!r}, only {', '.join(builder.info.splits)}")
        dataset, classes = DATASETS[name], builder.info.features["label"].num_classes
        if classes != dataset.classes:
            raise ValueError(f"it has {classes} classes instead of {dataset.classes}")
        source = builder.as_data_source(split=tfds_split, decoders={"image": tfds.decode.SkipDecoding()})

        def read(indices):
            return [(example["image"], int(example["label"])) for example in source.__getitems__(indices)]

        if len(source) == 0:
            raise ValueError(f"its split {tfds_split!r} is empty")
        if name in _TFDS_SPLITS:
            return EncodedSplit(dataset, len(source), read, lambda index: f"image {index} of {name}")
        encoded, labels = zip(*read(range(len(source))), strict=True)
        images = np.stack([np.asarray(PIL.Image.open(io.BytesIO(image))) for image in encoded])
        if images.dtype != np.uint8 or images.shape[1:] != dataset.image_shape:
            raise ValueError(f"its images are of shape {images.shape[1:]} and dtype {images.dtype}")
        return MemorySplit(dataset, images, np.array(labels, np.int32))
    except Exception as error:  # whatever TFDS, the disk or the network met, the way out is the same
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"config.data_dir: {name} cannot be read from {place}: {reason}. {remedy}") from error
