"""What quantized arrays take: codes packed at their width, a float32 scale and zero point for each range."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from granq_jax.quant.layers import Layout
from granq_jax.quant.ranges import RANGES
from granq_jax.quant.spec import QuantSpec, granularity_of, kept_axes
from granq_jax.quant.weights import plain_layouts, weight_paths

SCALE_AND_ZERO_POINT_BITS = 2 * 32


def effective_bits(shape: tuple[int, ...], bits: int, granularity: str) -> float:
    """Bits an element of an array costs once a float32 scale and zero point a range are counted.

    Examples:
      >>> round(effective_bits((3, 3, 16, 16), 3, "out_channel"), 2)  # 3 + 64 / 144
      3.44
      >>> round(effective_bits((3, 3, 16, 16), 3, "kernel"), 2)  # 3 + 64 / 9
      10.11
    """
    return bits + SCALE_AND_ZERO_POINT_BITS * _ranges(shape, granularity) / float(np.prod(shape, dtype=np.int64))


def effective_weight(shape: tuple[int, ...], bits: int, granularity: str, layout: Layout) -> float:
    """:func:`effective_bits` of a weight of which ``layout`` says what its axes are."""
    return bits + SCALE_AND_ZERO_POINT_BITS * layout.ranges(shape, granularity) / float(np.prod(shape, dtype=np.int64))


def effective_act_bits(shape: tuple[int, ...], bits: int, granularity: str, ranges: str) -> float:
    """The same of an activation (N, ...) of N images, for one of them; ranges that are kept cost it nothing."""
    count, size = _ranges_of_image(shape, granularity, ranges), float(np.prod(shape[1:], dtype=np.int64))
    return bits + SCALE_AND_ZERO_POINT_BITS * count / size


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take, packed and filled up to a whole one."""
    return -(-count * bits // 8)


def effective_weight_bits(
    params: Mapping[str, Any], spec: QuantSpec, layouts: Mapping[str, Layout] | None = None
) -> float | None:
    """Mean of :func:`effective_bits` over all elements of the quantized weights; ``None`` if none is.

    For ``layouts`` see :func:`granq_jax.quant.weight_paths`.
    """
    layouts = plain_layouts(params) if layouts is None else layouts
    bits = elements = 0.0
    for path, leaf in weight_paths(params, layouts).items():
        site = spec.at(path)
        if site.weight_bits is not None:
            bits += leaf.size * effective_weight(leaf.shape, site.weight_bits, site.weight_granularity, layouts[path])
            elements += leaf.size
    return bits / elements if elements else None


def storage_bytes(
    variables: Mapping[str, Any], spec: QuantSpec, layouts: Mapping[str, Layout] | None = None
) -> dict[str, int]:
    """Bytes that a quantized model's variables take, with codes packed and all else in float32.

    Args:
      variables: of the model, all collections.
      spec: how its weights are quantized.
      layouts: see :func:`granq_jax.quant.weight_paths`.

    Returns:
      ``weight_codes`` (each array filled up to whole bytes), ``weight_scales``,
      ``weight_zero_points``, ``full_precision`` (all other variables), and ``teacher``: everything in
      float32, but for activation ranges, which it does not have.

    Examples:
      >>> import numpy as np
      >>> head = {"kernel": np.ones((4, 3)), "bias": np.ones(3)}
      >>> storage_bytes({"params": {"head": head}}, QuantSpec(weight_bits=3))["weight_codes"]  # 36 bits
      5
    """
    elements, of_ranges = (sum(leaf.size for leaf in jax.tree.leaves(v)) for v in (variables, variables.get(RANGES)))
    codes = ranges = quantized = 0
    layouts = plain_layouts(variables["params"]) if layouts is None else layouts
    for path, leaf in weight_paths(variables["params"], layouts).items():
        site = spec.at(path)
        if site.weight_bits is not None:
            codes += packed_bytes(leaf.size, site.weight_bits)
            ranges += layouts[path].ranges(leaf.shape, site.weight_granularity)
            quantized += leaf.size
    return {
        "weight_codes": codes,
        "weight_scales": 4 * ranges,
        "weight_zero_points": 4 * ranges,
        "full_precision": 4 * (elements - quantized),
        "teacher": 4 * (elements - of_ranges),
    }


class ActivationStorage(NamedTuple):
    """What the activations of one image take.

    Attributes:
      effective_bits: of a quantized element, scales and zero points counted; ``None`` if none is quantized.
      bytes: ``codes`` (each activation filled up to whole bytes), ``scales`` and ``zero_points``, measured on the
        image (ranges that are kept are in the variables), ``full_precision`` (activations that are not
        quantized), and ``float32``: all of them in float32.
    """

    effective_bits: float | None
    bytes: dict[str, int]


def activation_storage(shapes: Iterable[tuple[str, tuple[int, ...]]], spec: QuantSpec) -> ActivationStorage:
    """What the activations of one image take, each written once.

    Args:
      shapes: path and shape (N, ...) of each activation; of N images, one is counted.
      spec: how they are quantized.

    Examples:
      >>> stored = activation_storage([("act", (2, 4, 4, 3))], QuantSpec(act_bits=3))
      >>> stored.bytes["codes"], stored.bytes["scales"], stored.effective_bits
      (18, 12, 7.0)
    """
    codes = ranges = quantized = elements = 0
    for path, shape in shapes:
        site = spec.at(path)
        size = int(np.prod(shape[1:], dtype=np.int64))
        elements += size
        if site.act_bits is not None:
            quantized += size
            codes += packed_bytes(size, site.act_bits)
            ranges += _ranges_of_image(shape, site.act_granularity, site.act_ranges)
    return ActivationStorage(
        8 * (codes + 8 * ranges) / quantized if quantized else None,
        {
            "codes": codes,
            "scales": 4 * ranges,
            "zero_points": 4 * ranges,
            "full_precision": 4 * (elements - quantized),
            "float32": 4 * elements,
        },
    )


def _ranges_of_image(shape: tuple[int, ...], granularity: str, ranges: str) -> int:
    return _ranges((1, *shape[1:]), granularity) if ranges == "dynamic" else 0


def _ranges(shape: tuple[int, ...], granularity: str) -> int:
    kept = kept_axes(granularity_of(granularity, shape), len(shape))
    return int(np.prod([shape[axis] for axis in kept], dtype=np.int64))
