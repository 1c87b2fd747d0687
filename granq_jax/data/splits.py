"""Parts of data sets, in memory or on disk, and batches of their images ready for a model."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import PIL.Image

from granq_jax.errors import InputError, RunError

T = TypeVar("T")
Batch = tuple[np.ndarray, np.ndarray]
ALL = slice(None)

# Resized so that the centre crop keeps 87.5 % of the shorter side: 256 for 224 pixels, as in the
# evaluation of the public ImageNet checkpoints.
_CROP_SHARE = 0.875
_LARGEST_GREY = 65535  # of 16 bits


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What is fixed of a data set, and how its images are normalised: (pixel / max_value - mean) / std."""

    classes: int
    image_size: int
    channels: int
    max_value: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.image_size, self.image_size, self.channels

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """Raw images (N, H, W, C) to float32 ones of roughly zero mean and unit variance."""
        mean, std = (np.asarray(of, np.float32).reshape(1, 1, 1, -1) for of in (self.mean, self.std))
        return (images.astype(np.float32) / np.float32(self.max_value) - mean) / std

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Normalised images (N, H, W, C) to ones for people, uint8 from 0 to 255; the rest is cut off, NaN is 0."""
        scaled = np.asarray(images, np.float32) * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return np.round(255 * np.nan_to_num(np.clip(scaled, 0, 1))).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """Small images, all in memory.

    Attributes:
      dataset: what they are.
      images: (N, H, W, C), uint8.
      labels: (N,), int32.
    """

    dataset: Dataset
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def examples(self, indices: np.ndarray) -> Batch:
        """Images (n, H, W, C), uint8, and labels (n,), int32, for evaluation."""
        return self.images[indices], self.labels[indices]

    def augmented(
        self,
        indices: np.ndarray,
        rng: np.random.Generator,
        size: int,
        max_shift: int,
        share: np.ndarray | slice = ALL,
    ) -> Batch:
        """The same for training: windows of ``size`` pixels at random places.

        ``max_shift`` is how far a window may reach over the image's edge, where it sees zeros. Only
        those at the places ``share`` of ``indices`` are made, and are what they are among all.
        """
        around = ((0, 0), (max_shift, max_shift), (max_shift, max_shift), (0, 0))
        padded = np.pad(self.images[indices[share]], around)
        places = padded.shape[1] - size + 1
        rows, columns = rng.integers(0, places, (2, len(indices)))[:, share]
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        return windows[np.arange(len(rows)), rows, columns].transpose(0, 2, 3, 1), self.labels[indices[share]]


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """Photographs of any size, read and decoded when they are asked for, several at a time.

    One that cannot be raises a :class:`~granq_jax.runtime.stopping.RunError`.

    Attributes:
      dataset: what they are.
      size: how many there are.
      read: encoded images (JPEG, PNG, ...) and labels of a list of indices.
      name: what an image is called in an error.
    """

    dataset: Dataset
    size: int
    read: Callable[[list[int]], Sequence[tuple[bytes, int]]]
    name: Callable[[int], str]
    _pool: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode"), repr=False
    )

    def __len__(self) -> int:
        return self.size

    def examples(self, indices: np.ndarray) -> Batch:
        """Images (n, H, W, C), uint8, and labels (n,), int32: resized, and their centres cut out."""
        return self._decoded(indices, [centre_crop] * len(indices), self.dataset.image_size)

    def augmented(
        self,
        indices: np.ndarray,
        rng: np.random.Generator,
        size: int,
        max_shift: int,
        share: np.ndarray | slice = ALL,
    ) -> Batch:
        """The same for training: random parts of the photographs, resized to ``size`` pixels.

        ``max_shift`` is for small images; a part of a photograph never reaches over its edge. Only
        those at the places ``share`` of ``indices`` are made, and are what they are among all.
        """
        crops = [RandomCrop(*draws) for draws in rng.random((len(indices), 2, _CROP_ATTEMPTS, 2))[share]]
        return self._decoded(indices[share], crops, size)

    def _decoded(self, indices, crops, size) -> Batch:
        def decoded(index, data, crop):
            try:
                image = PIL.Image.open(io.BytesIO(data))
                image.info.pop("transparency", None)  # dropped by convert, which would warn of it
                return np.asarray(crop(_in_colour(image), size))
            except Exception as error:  # Pillow's decoders have errors of many kinds
                raise RunError(f"config.data_dir: {self.name(index)} cannot be decoded: {error}") from error

        try:
            encoded, labels = zip(*self.read(indices.tolist()), strict=True)
        except Exception as error:  # of the disk, or of whatever TFDS reads with
            raise RunError(f"config.data_dir: images cannot be read: {error}") from error
        # Pillow lets go of the interpreter while it decodes and resizes.
        images = self._pool.map(decoded, indices, encoded, crops)
        return np.stack(list(images)), np.array(labels, np.int32)


Split = MemorySplit | EncodedSplit


def batches(
    split: Split, batch_size: int, share: np.ndarray | slice = ALL
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Normalised images, labels and weights in order, every batch of the same size, made ahead of use.

    The last batch is filled up with copies of its first image, of weight 0: copies, so that a range
    measured over a batch is that of its real images.

    Args:
      split: the images.
      batch_size: images a batch.
      share: which places of each batch are made; by default all.
    """
    places = np.arange(batch_size)[share]

    def one_by_one():
        for start in range(0, len(split), batch_size):
            indices = start + places
            real = indices < len(split)
            images, labels = split.examples(np.where(real, indices, start))
            yield split.dataset.normalise(images), labels, real.astype(np.float32)

    return ahead(one_by_one())


def ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """``items``, made by another thread, ``count`` of them ahead of the one that is used.

    Examples:
      >>> list(ahead(range(4)))
      [0, 1, 2, 3]
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        waiting = [thread.submit(lambda: list(islice(source, 1))) for _ in range(count)]
        while item := waiting.pop(0).result():
            waiting.append(thread.submit(lambda: list(islice(source, 1))))
            yield item[0]


def _in_colour(image: PIL.Image.Image) -> PIL.Image.Image:
    """``image`` in RGB of 8 bits; grey of 16 bits, which Pillow would cut off at 255, is scaled."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > _LARGEST_GREY:
            raise InputError(f"its grey goes from {grey.min()} to {grey.max()}, allowed are 0 to {_LARGEST_GREY}")
        image = PIL.Image.fromarray(np.round(grey / (_LARGEST_GREY / 255)).astype(np.uint8))
    elif image.mode == "F":
        raise InputError("its pixels are real numbers, of which white is not known")
    return image.convert("RGB")


def centre_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The centre of ``image``, ``size`` pixels high and wide, after its shorter side became size / 0.875.

    Examples:
      >>> centre_crop(PIL.Image.new("RGB", (640, 480)), 224).size
      (224, 224)
    """
    shorter = math.ceil(size / _CROP_SHARE)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


_CROP_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A random part of an image: 8 to 100 % of its area, 3:4 to 4:3 (Szegedy et al., CVPR 2015).

    Attributes:
      shapes: (attempts, 2), uniform in [0, 1): area and aspect ratio; the first that fits is taken.
      places: (attempts, 2), uniform in [0, 1): where it lies.
    """

    shapes: np.ndarray
    places: np.ndarray

    def __call__(self, image: PIL.Image.Image, size: int) -> PIL.Image.Image:
        """The part, ``size`` pixels high and wide."""
        for (area, ratio), (x, y) in zip(self.shapes, self.places, strict=True):
            pixels = (0.08 + 0.92 * area) * image.width * image.height
            aspect = (3 / 4) * (16 / 9) ** ratio
            width, height = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < width <= image.width and 0 < height <= image.height:
                left, top = int(x * (image.width - width + 1)), int(y * (image.height - height + 1))
                box = (left, top, left + width, top + height)
                return image.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box)
        return centre_crop(image, size)
