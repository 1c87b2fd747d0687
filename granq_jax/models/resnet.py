"""Residual networks for small images (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from granq_jax.models.layers import ConvNormAct


class BasicUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 convolution where the shape changes."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        shortcut = x
        if self.strides != 1 or x.shape[-1] != self.features:
            projection = ConvNormAct(self.features, 1, self.strides, activation=None, name="shortcut")
            shortcut = projection(x, train=train)
        x = ConvNormAct(self.features, strides=self.strides, name="conv1")(x, train=train)
        return ConvNormAct(self.features, name="conv2")(x, shortcut, train=train)


class Stage(nn.Module):
    """Units of equal width; the first one has the stride."""

    units: int
    features: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        for unit in range(self.units):
            strides = self.strides if unit == 0 else 1
            x = BasicUnit(self.features, strides, name=f"unit{unit + 1}")(x, train=train)
        return x


class ResNet(nn.Module):
    """Stem, stages (all but the first halve the image), global average pooling, linear layer.

    Attributes:
      classes: number of logits.
      units: residual units in each stage.
      widths: channels of each stage; the stem has those of the first.
    """

    classes: int
    units: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, classes) of normalised images (N, H, W, C)."""
        x = ConvNormAct(self.widths[0], name="stem")(images, train=train)
        for i, (units, width) in enumerate(zip(self.units, self.widths, strict=True)):
            x = Stage(units, width, strides=1 if i == 0 else 2, name=f"stage{i + 1}")(x, train=train)
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))
