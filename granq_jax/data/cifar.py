"""CIFAR-10 and CIFAR-100 in the layouts that people have: the published archives, and NumPy's files."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from granq_jax.data.splits import Dataset, MemorySplit
from granq_jax.errors import InputError
from granq_jax.files.pickles import NUMPY, PickledArray, as_bytes, as_text, unpickle
from granq_jax.files.tensor_files import open_tensors

_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A published archive, unpacked.

    Attributes:
      folder: the name that the archive gives it.
      files: those of each split.
      read: images (N, 3072) or so and labels of one file's content.
    """

    folder: str
    files: Mapping[str, Sequence[str]]
    read: Callable[[bytes], tuple[Any, Any]]


def _pickled(label: str) -> Callable[[bytes], tuple[Any, Any]]:
    def read(content: bytes) -> tuple[Any, Any]:
        held = unpickle(io.BytesIO(content), NUMPY)
        if type(held) is not dict:
            raise InputError("it holds no dictionary")
        entries = {as_text(key): value for key, value in held.items()}
        if missing := {"data", label} - entries.keys():
            raise InputError(f"it holds no {' and no '.join(map(repr, sorted(missing)))}")
        return _array(entries["data"]), _array(entries[label])

    return read


def _array(value: Any) -> np.ndarray:
    if isinstance(value, PickledArray):
        return value.read()
    if type(value) is list:
        # A label may be a NumPy scalar, of which nothing is made.
        return np.array(value) if all(type(item) is int for item in value) else np.array(value, object)
    return np.frombuffer(as_bytes(value), np.uint8)


def _binary(labels: int) -> Callable[[bytes], tuple[Any, Any]]:
    """Records of ``labels`` bytes, the last of which counts, and an image."""

    def read(content: bytes) -> tuple[Any, Any]:
        if len(content) % (labels + _PIXELS):
            raise InputError(f"it has {len(content)} bytes, allowed are multiples of {labels + _PIXELS}")
        records = np.frombuffer(content, np.uint8).reshape(-1, labels + _PIXELS)
        return records[:, labels:], records[:, labels - 1]

    return read


_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
_LAYOUTS = {
    "cifar10": (
        _Layout("cifar-10-batches-py", {"train": _TRAIN, "test": ["test_batch"]}, _pickled("labels")),
        _Layout(
            "cifar-10-batches-bin",
            {"train": [f"{name}.bin" for name in _TRAIN], "test": ["test_batch.bin"]},
            _binary(1),
        ),
    ),
    "cifar100": (
        _Layout("cifar-100-python", {"train": ["train"], "test": ["test"]}, _pickled("fine_labels")),
        _Layout("cifar-100-binary", {"train": ["train.bin"], "test": ["test.bin"]}, _binary(2)),
    ),
}


def load_cifar(name: str, dataset: Dataset, split: str, data_dir: str) -> MemorySplit | None:
    """A split of CIFAR below ``data_dir`` as its archives or a file of NumPy's hold it, else ``None``.

    Args:
      name: ``"cifar10"`` or ``"cifar100"``.
      dataset: what its images have to be.
      split: ``"train"`` or ``"test"``.
      data_dir: an ``.npz`` file of ``x_train``, ``y_train``, ``x_test`` and ``y_test``, of which those of
        the split are needed; or a directory that holds such a file as ``NAME.npz``, or one of the
        layouts of :func:`looked_for`, as a folder or directly.

    Raises:
      InputError: for files that do not hold what they should, or do not hold all of it.
      OSError: if one cannot be read.
    """
    root = Path(data_dir)
    single = root if os.path.isfile(root) else root / f"{name}.npz"
    if os.path.isfile(single):
        return _checked(dataset, str(single), *_of_npz(single, split))
    incomplete = ""
    for layout in _LAYOUTS[name]:
        for folder in (root / layout.folder, root):
            missing = [file for file in layout.files[split] if not os.path.isfile(folder / file)]
            if not missing:
                return _of_archive(dataset, layout, folder, split)
            known = [file for files in layout.files.values() for file in files if os.path.isfile(folder / file)]
            if known and not incomplete:
                incomplete = f"{str(folder)!r} holds {known[0]} but no {', '.join(missing)}"
    if incomplete:
        raise InputError(f"config.data_dir: {incomplete}")
    return None


def looked_for(name: str) -> list[str]:
    """The files and folders that :func:`load_cifar` looks for in a directory.

    Examples:
      >>> looked_for("cifar100")
      ['cifar100.npz', 'cifar-100-python', 'cifar-100-binary']
    """
    return [f"{name}.npz", *(layout.folder for layout in _LAYOUTS[name])]


def _of_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open_tensors(path) as tensors:
            wanted = f"x_{split}", f"y_{split}"
            if type(tensors) is not dict:
                raise InputError("it is a pickle")
            if missing := [key for key in wanted if key not in tensors]:
                held = ", ".join(sorted(tensors)[:10]) or "nothing"
                raise InputError(f"it holds no {' and no '.join(missing)}, only {held}")
            images, labels = (tensors[key] for key in wanted)
            if images.dtype != "uint8" or not labels.dtype.startswith(("int", "uint")):  # before they are read
                raise InputError(
                    f"x_{split} is of {images.dtype} and y_{split} of {labels.dtype}, allowed are "
                    "images of uint8 and labels that are whole numbers"
                )
            return images.read(), labels.read()
    except OSError:
        raise
    except Exception as error:  # what is no zip file, or damaged, shows in many ways
        raise InputError(f"config.data_dir: {str(path)!r} cannot be read as an .npz file of images: {error}") from error


def _of_archive(dataset: Dataset, layout: _Layout, folder: Path, split: str) -> MemorySplit:
    parts = []
    for file in layout.files[split]:
        path = folder / file
        content = path.read_bytes()
        try:
            images, labels = layout.read(content)
            if images.size % _PIXELS or images.dtype != np.uint8:
                raise InputError(f"its data are {images.size} numbers of {images.dtype}, allowed are images of uint8")
        except Exception as error:  # damage shows in many ways
            raise InputError(
                f"config.data_dir: {str(path)!r} is no batch of {layout.folder}, or damaged: {error}"
            ) from error
        parts.append(_checked(dataset, str(path), images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))
    images, labels = (np.concatenate([getattr(part, field) for part in parts]) for field in ("images", "labels"))
    return MemorySplit(dataset, images, labels)


def _checked(dataset: Dataset, place: str, images: np.ndarray, labels: np.ndarray) -> MemorySplit:
    if images.shape[1:] != dataset.image_shape or not len(images):
        allowed = ", ".join(map(str, dataset.image_shape))
        raise InputError(f"config.data_dir: {place!r} holds images of shape {images.shape}, allowed is (N, {allowed})")
    if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "iu":
        raise InputError(
            f"config.data_dir: {place!r} holds labels of shape {labels.shape} and dtype {labels.dtype}, "
            f"allowed are {len(images)} whole numbers"
        )
    if labels.min() < 0 or labels.max() >= dataset.classes:
        raise InputError(
            f"config.data_dir: {place!r} holds labels from {labels.min()} to {labels.max()}, "
            f"allowed are 0 to {dataset.classes - 1}"
        )
    return MemorySplit(dataset, np.ascontiguousarray(images), labels.ravel().astype(np.int32))
