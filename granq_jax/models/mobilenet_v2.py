"""MobileNetV2 (Sandler et al., CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from granq_jax.models.layers import ConvNormAct
from granq_jax.ops.convolution import convolve


class InvertedResidualUnit(nn.Module):
    """1x1 up to ``inside`` channels, depthwise 3x3, 1x1 down to ``features`` without activation.

    The input is added where the shape does not change. Where ``inside`` is the number of channels there
    are, networks differ in whether they have the first 1x1: its parameters say so, when there are any.

    Attributes:
      inside: channels of the depthwise convolution.
      features: output channels.
      strides: of the depthwise convolution.
      expand: whether the first 1x1 is there when the parameters are made.
    """

    inside: int
    features: int
    strides: int = 1
    expand: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, features)."""
        shortcut = x if self.strides == 1 and x.shape[-1] == self.features else None
        expand = self.expand if self.is_initializing() else self.has_variable("params", "conv1")
        if expand or self.inside != x.shape[-1]:
            x = ConvNormAct(self.inside, 1, activation="relu6", name="conv1")(x, train=train)
        x = ConvNormAct(self.inside, 3, self.strides, "relu6", depthwise=True, name="conv2")(x, train=train)
        return ConvNormAct(self.features, 1, activation=None, name="conv3")(x, shortcut, train=train)


class Stage(nn.Module):
    """Units one after another; the first one has the stride, and ``expansion`` widens each inside."""

    widths: Sequence[int]
    strides: int
    expansion: int
    expand: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) to (N, H / strides, W / strides, widths[-1])."""
        for i, width in enumerate(self.widths):
            inside, strides = x.shape[-1] * self.expansion, self.strides if i == 0 else 1
            x = InvertedResidualUnit(inside, width, strides, self.expand, name=f"unit{i + 1}")(x, train=train)
        return x


class MobileNetV2(nn.Module):
    """MobileNetV2, whose head is a 1x1 convolution.

    As pytorchcv has it, the first unit has a 1x1 convolution too, and the head no bias; as torchvision and timm have
    it, it is the other way round. What a model's variables have is computed; the attributes say what new ones have.

    Attributes:
      classes: number of logits.
      first_expansion: whether new variables have the first unit's 1x1 convolution.
      head_bias: whether they have the head's bias.
    """

    classes: int
    first_expansion: bool = True
    head_bias: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, classes) of normalised images (N, H, W, 3), H and W multiples of 32."""
        x = ConvNormAct(32, 3, 2, "relu6", name="stem")(images, train=train)
        for i, widths in enumerate(STAGES):
            strides, expansion = (1, 1) if i == 0 else (2, 6)
            x = Stage(widths, strides, expansion, self.first_expansion, name=f"stage{i + 1}")(x, train=train)
        x = ConvNormAct(1280, 1, activation="relu6", name="final")(x, train=train)
        x = jnp.mean(x, axis=(1, 2), keepdims=True)
        bias = self.head_bias if self.is_initializing() else "bias" in self.get_variable("params", "head", {})
        head = nn.Conv(self.classes, (1, 1), use_bias=bias, conv_general_dilated=convolve, name="head")
        return head(x).reshape(x.shape[0], self.classes)


# Widths; stages begin where the image is halved.
STAGES = ((16,), (24, 24), (32, 32, 32), (64, 64, 64, 64, 96, 96, 96), (160, 160, 160, 320))
