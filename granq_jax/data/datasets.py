"""Real images by data set name, for evaluating and for training teachers.

Zero-shot quantization itself needs none of this.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image

from granq_jax.data.cifar import load_cifar, looked_for
from granq_jax.data.splits import Dataset, EncodedSplit, MemorySplit, Split
from granq_jax.errors import InputError, check_choice
from granq_jax.runtime.paths import expanded

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


def described(name: str, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> Dataset:
    """What is fixed of the data set ``name``, with another mean and deviation where they are not ``()``.

    They are of pixels from 0 to 1, and those that the teacher's images were normalised with in its training. Generated
    images are normalised ones: they meet the teacher as they are, and only to be seen are they turned into pixels.

    Examples:
      >>> described("cifar10", std=(0.2023, 0.1994, 0.2010)).mean == DATASETS["cifar10"].mean
      True
    """
    dataset = DATASETS[name]
    return dataclasses.replace(dataset, mean=tuple(mean) or dataset.mean, std=tuple(std) or dataset.std)


def load_split(
    name: str, split: str, data_dir: str = "", mean: tuple[float, ...] = (), std: tuple[float, ...] = ()
) -> Split:
    """A split of a data set: small images in memory, photographs decoded when they are used.

    Args:
      name: of ``DATASETS``. An ``"image_folder"`` holds a folder for each class, whose order by name
        is that of the labels, below ``data_dir/train`` and ``data_dir/val``; test images may also
        lie directly in ``data_dir/CLASS``. Folders named 0, 1, ... are named by their labels.
      split: ``"train"`` or ``"test"``.
      data_dir: where the data set is: of CIFAR, the directory that holds its published archive unpacked
        (``cifar-10-batches-py``, ``cifar-10-batches-bin`` and their like) or ``cifar10.npz``, or such a
        file, see :func:`granq_jax.data.cifar.load_cifar`; of an image folder, its path. Else it is where TFDS
        finds the data set, or prepares it; ``""`` is TFDS's own default.
      mean: of pixels, see :func:`described`.
      std: likewise.

    Raises:
      InputError: if the data set cannot be had. The message says what to do.

    Examples:
      >>> split = load_split("digits", "test")
      >>> len(split), split.images.shape, split.images.dtype
      (360, (360, 8, 8, 1), dtype('uint8'))
    """
    check_choice("dataset", name, DATASETS)
    check_choice("split", split, ("train", "test"))
    found = _load(name, split, data_dir)
    return dataclasses.replace(found, dataset=described(name, mean, std)) if mean or std else found


def _load(name: str, split: str, data_dir: str) -> Split:
    if name == "digits":
        return _load_digits(split)
    data_dir = data_dir and str(expanded(data_dir, "config.data_dir"))
    try:
        if name == "image_folder":
            return _load_folder(split, data_dir)
        found = load_cifar(name, DATASETS[name], split, data_dir) if name in _CIFAR and data_dir else None
    except OSError as error:
        raise InputError(f"config.data_dir: {data_dir!r} cannot be read: {error}") from error
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
        raise InputError(f"config.data_dir: got {data_dir!r}, allowed is a directory that holds an image folder")
    parts = [root / part for part in ("train", "val") if (root / part).is_dir()]
    if split == "train" or root / "val" in parts:
        root = root / {"train": "train", "test": "val"}[split]
    folders = _class_folders(root)
    if len(folders) != dataset.classes:
        raise InputError(
            f"config.data_dir: {str(root)!r} holds {len(folders)} class folders, allowed are {dataset.classes}"
            f"{_recognised(root)}"
        )
    classes = _in_order(root, folders)
    for other in parts:
        names = {folder.name for folder in _class_folders(other)}
        if different := sorted(names ^ classes.keys() if names else ()):
            raise InputError(
                f"config.data_dir: the class folders of {str(other)!r} are not those of {str(root)!r}, so that a label "
                f"would mean another class: only one of them holds {', '.join(different[:3])}"
            )
    files = [
        (path, label)
        for name, label in classes.items()
        for path in _visible(root / name)
        if path.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if not files:
        raise InputError(
            f"config.data_dir: {str(root)!r} holds no image in CLASS/, allowed are {', '.join(sorted(_IMAGE_SUFFIXES))}"
            f"{_recognised(root / next(iter(classes)))}"
        )

    def read(indices):
        return [(files[index][0].read_bytes(), files[index][1]) for index in indices]

    return EncodedSplit(dataset, len(files), read, lambda index: str(files[index][0]))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _class_folders(root: Path) -> list[Path]:
    return [folder for folder in _visible(root) if folder.is_dir()] if root.is_dir() else []


def _in_order(root: Path, folders: list[Path]) -> dict[str, int]:
    """The label of each class folder by its name, in the order of the labels.

    Names are in the order of text, as in PyTorch's image folders; those that are the labels, as ImageNet-V2's are,
    say themselves what they are. Any other names with numbers in them that text puts in another order are refused.
    """
    names = [folder.name for folder in folders]
    if all(name.isdecimal() and name.isascii() for name in names):
        if sorted(map(int, names)) != list(range(len(names))):
            raise InputError(
                f"config.data_dir: the class folders of {str(root)!r} are named by numbers, which are labels if they "
                f"go from 0 to {len(names) - 1}, but go from {min(map(int, names))} to {max(map(int, names))}: "
                "the order of the classes is not known; name them by their labels"
            )
        return {name: int(name) for name in sorted(names, key=int)}
    by_number = sorted(names, key=_parts)
    if names != by_number:
        place = next(place for place, name in enumerate(names) if name != by_number[place])
        raise InputError(
            f"config.data_dir: the order of the class folders of {str(root)!r} is not clear: as text, "
            f"{names[place]!r} comes before {by_number[place]!r}, by number after it; fill the numbers in the names up "
            "with zeros, in the order of the labels"
        )
    return {name: label for label, name in enumerate(names)}


def _parts(name: str) -> list[str | int]:
    """Text and numbers in turn, so that the names of one folder can be compared.

    Examples:
      >>> _parts("class10b")
      ['class', 10, 'b']
    """
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _archives(folder: Path) -> list[str]:
    names = (path.name for path in _visible(folder)) if folder.is_dir() else ()
    return [name for name in names if name.endswith((".tar", ".tgz", ".tar.gz", ".zip"))]


def _recognised(folder: Path) -> str:
    """What a folder that is none of classes seems to be instead, and what to do; ``""`` if that is not known."""
    if not folder.is_dir():
        return ""
    held = _visible(folder)
    images = [path.name for path in held if path.suffix.lower() in _IMAGE_SUFFIXES]
    archives = _archives(folder)
    kaggle = folder / "ILSVRC" / "Data" / "CLS-LOC"
    if images:
        flat = "ImageNet's validation images as their archive holds them" if images[0][:11] == "ILSVRC2012_" else "flat"
        return f"; it holds {len(images)} images, {flat}: move each into the folder CLASS/ of its class"
    if archives:
        return f"; it holds {archives[0]}: unpack it, each class into the folder CLASS/"
    if kaggle.is_dir():
        return f"; it holds ImageNet as Kaggle has it: give {str(kaggle)!r}"
    if names := [path.name for path in held]:
        return f"; it holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return ""


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
            packed = _archives(Path(data_dir))
            raise InputError(
                f"it holds {packed[0]}, which has to be unpacked"
                if packed
                else f"it holds no {name}/ and nothing else that is looked for"
            )
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if not builder.is_prepared():
            if not prepares:
                raise InputError("it is not prepared there, and preparing it needs TensorFlow")
            builder.download_and_prepare()
        tfds_split = _TFDS_SPLITS.get(name, {}).get(split, split)
        if tfds_split not in builder.info.splits:
            raise InputError(f"it has no split {tfds_split!r}, only {', '.join(builder.info.splits)}")
        dataset, classes = DATASETS[name], builder.info.features["label"].num_classes
        if classes != dataset.classes:
            raise InputError(f"it has {classes} classes instead of {dataset.classes}")
        source = builder.as_data_source(split=tfds_split, decoders={"image": tfds.decode.SkipDecoding()})

        def read(indices):
            return [(example["image"], int(example["label"])) for example in source.__getitems__(indices)]

        if len(source) == 0:
            raise InputError(f"its split {tfds_split!r} is empty")
        if name in _TFDS_SPLITS:
            return EncodedSplit(dataset, len(source), read, lambda index: f"image {index} of {name}")
        encoded, labels = zip(*read(range(len(source))), strict=True)
        images = np.stack([np.asarray(PIL.Image.open(io.BytesIO(image))) for image in encoded])
        if images.dtype != np.uint8 or images.shape[1:] != dataset.image_shape:
            raise InputError(f"its images are of shape {images.shape[1:]} and dtype {images.dtype}")
        return MemorySplit(dataset, images, np.array(labels, np.int32))
    except Exception as error:  # whatever TFDS, the disk or the network met, the way out is the same
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"config.data_dir: {name} cannot be read from {place}: {reason}. {remedy}") from error
