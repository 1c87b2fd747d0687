"""Axes put together: an array of any layer in the plain form that the quantizer's granularities speak of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Grouping(NamedTuple):
    """Which axes of an array are seen as one.

    Attributes:
      axes: for each axis of the plain form, those of the array that it is made of; all of them, once.

    Examples:
      >>> import jax.numpy as jnp
      >>> heads = Grouping(((0,), (1,), (2, 3)))  # (N, T, heads, d) as (N, T, channels)
      >>> x = jnp.ones((2, 5, 4, 3))
      >>> heads.merged(x).shape, heads.split(heads.merged(x)[:1], x.shape).shape
      ((2, 5, 12), (1, 5, 4, 3))
    """

    axes: tuple[tuple[int, ...], ...]

    @property
    def is_plain(self) -> bool:
        """Whether the array has the plain form already."""
        return self == plain_grouping(len(self.axes))

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the plain form of an array of ``shape``."""
        return tuple(math.prod(shape[axis] for axis in group) for group in self.axes)

    def merged(self, x: jax.Array) -> jax.Array:
        """The plain form of ``x``."""
        if self.is_plain:
            return x
        return x.transpose([axis for group in self.axes for axis in group]).reshape(self.shape(x.shape))

    def split(self, y: Any, shape: Sequence[int]) -> Any:
        """The array of ``shape`` whose plain form is ``y``; where an axis of ``y`` has size 1, so have those in it."""
        if self.is_plain:
            return y
        order = [axis for group in self.axes for axis in group]
        sizes = [1 if y.shape[i] == 1 else shape[axis] for i, group in enumerate(self.axes) for axis in group]
        return y.reshape(sizes).transpose([order.index(axis) for axis in range(len(order))])


def plain_grouping(ndim: int) -> Grouping:
    """That of an array of ``ndim`` dimensions which has the plain form already."""
    return Grouping(tuple((axis,) for axis in range(ndim)))
