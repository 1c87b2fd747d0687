"""Residual networks (He et al., CVPR 2016), for small images and for ImageNet's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from granq_jax.models.layers import ConvNormAct
from granq_jax.ops.pooling import max_pool


class BasicUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        shortcut = _shortcut(x, self.features, self.strides, train)
        x = ConvNormAct(self.features, strides=self.strides, name="conv1")(x, train=train)
        return ConvNormAct(self.features, name="conv2")(x, shortcut, train=train)


class BottleneckUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; inside it is a quarter as wide.

    Attributes:
      features: output channels.
      strides: of the unit.
      late_strides: whether the 3x3 convolution has the stride, not the first 1x1.
    """

    features: int
    strides: int = 1
    late_strides: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        first, second = (1, self.strides) if self.late_strides else (self.strides, 1)
        inside = self.features // 4
        shortcut = _shortcut(x, self.features, self.strides, train)
        x = ConvNormAct(inside, 1, first, name="conv1")(x, train=train)
        x = ConvNormAct(inside, 3, second, name="conv2")(x, train=train)
        return ConvNormAct(self.features, 1, name="conv3")(x, shortcut, train=train)


def _shortcut(x: jax.Array, features: int, strides: int, train: bool) -> jax.Array:
    if strides == 1 and x.shape[-1] == features:
        return x
    return ConvNormAct(features, 1, strides, activation=None, name="shortcut")(x, train=train)


class Stage(nn.Module):
    """Units of equal width; the first one has the stride.

    Attributes:
      unit: makes a module from its features and strides.
    """

    unit: Any
    units: int
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        for i in range(self.units):
            x = self.unit(self.features, self.strides if i == 0 else 1, name=f"unit{i + 1}")(x, train=train)
        return x


class ResNet(nn.Module):
    """Stem, stages (all but the first halve the image), global average pooling, linear layer.

    Attributes:
      classes: number of logits.
      units: residual units in each stage.
      widths: channels of each stage.
      unit: makes a residual unit from its features and strides.
      stem_width: channels of the stem.
      large_images: whether the stem is a 7x7 convolution and a max pooling that each halve the image,
        not a 3x3 convolution.
    """

    classes: int
    units: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 64)
    unit: Any = BasicUnit
    stem_width: int = 16
    large_images: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, classes) of normalised images (N, H, W, C)."""
        if self.large_images:
            x = ConvNormAct(self.stem_width, 7, 2, name="stem")(images, train=train)
            x = max_pool(x)
        else:
            x = ConvNormAct(self.stem_width, name="stem")(images, train=train)
        for i, (units, width) in enumerate(zip(self.units, self.widths, strict=True)):
            x = Stage(self.unit, units, width, strides=1 if i == 0 else 2, name=f"stage{i + 1}")(x, train=train)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))
