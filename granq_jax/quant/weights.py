"""Weights: fake quantization as a pure function of a parameter tree.

What counts as a weight is every parameter named ``kernel`` with two or more dimensions: those of
linen's ``Conv``, ``ConvTranspose``, ``Dense`` and ``DenseGeneral``. Biases, normalisation
parameters and embeddings stay in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from granq_jax.quant.fake_quant import fake_quant
from granq_jax.quant.spec import QuantSpec, kept_axes

SCALE_AND_ZERO_POINT_BITS = 2 * 32


def weight_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a parameter tree by the ``/``-joined path of the module that owns them.

    Example:
      >>> import numpy as np
      >>> list(weight_paths({"head": {"kernel": np.ones((4, 2)), "bias": np.ones(2)}}))
      ['head']
    """
    flat = flax.traverse_util.flatten_dict(params)
    return {"/".join(path[:-1]): leaf for path, leaf in flat.items() if _is_weight(path, leaf)}


def quantize_params(params: Mapping[str, Any], spec: QuantSpec, impl: str = "auto") -> dict[str, Any]:
    """The parameter tree with every weight replaced by its fake-quantized values.

    Gradients pass straight through to the weights given.

    Args:
      params: the ``"params"`` collection of a model's variables.
      spec: ``weight_bits``, ``weight_granularity`` and ``overrides`` of it are used.
      impl: see :func:`granq_jax.fake_quant`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Example:
      >>> import numpy as np
      >>> params = {"head": {"kernel": np.array([[0.0], [0.9], [2.2], [3.0]], np.float32)}}
      >>> quantize_params(params, QuantSpec(weight_bits=2))["head"]["kernel"].ravel().tolist()
      [0.0, 1.0, 2.0, 3.0]
    """

    def quantized(path, leaf):
        site = spec.at("/".join(path[:-1]))
        if not _is_weight(path, leaf) or site.weight_bits is None:
            return leaf
        return fake_quant(leaf, bits=site.weight_bits, granularity=site.weight_granularity, impl=impl)

    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: quantized(path, leaf) for path, leaf in flat.items()})


def effective_bits(shape: tuple[int, ...], bits: int, granularity: str) -> float:
    """Bits an element of an array costs once a float32 scale and zero point a range are counted.

    Example:
      >>> round(effective_bits((3, 3, 16, 16), 3, "out_channel"), 2)  # 3 + 64 / 144
      3.44
      >>> round(effective_bits((3, 3, 16, 16), 3, "kernel"), 2)  # 3 + 64 / 9
      10.11
    """
    return bits + SCALE_AND_ZERO_POINT_BITS * _ranges(shape, granularity) / float(np.prod(shape, dtype=np.int64))


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take, packed and filled up to a whole one."""
    return -(-count * bits // 8)


def effective_weight_bits(params: Mapping[str, Any], spec: QuantSpec) -> float | None:
    """Mean of :func:`effective_bits` over all elements of the quantized weights; ``None`` if none is."""
    bits = elements = 0.0
    for path, leaf in weight_paths(params).items():
        site = spec.at(path)
        if site.weight_bits is not None:
            bits += leaf.size * effective_bits(leaf.shape, site.weight_bits, site.weight_granularity)
            elements += leaf.size
    return bits / elements if elements else None


def storage_bytes(variables: Mapping[str, Any], spec: QuantSpec) -> dict[str, int]:
    """Bytes that a quantized model's variables take, with codes packed and all else in float32.

    Args:
      variables: of the model, all collections.
      spec: how its weights are quantized.

    Returns:
      ``weight_codes`` (each array filled up to whole bytes), ``weight_scales``,
      ``weight_zero_points``, ``full_precision`` (all other variables), and ``teacher``: everything in
      float32.

    Example:
      >>> import numpy as np
      >>> head = {"kernel": np.ones((4, 3)), "bias": np.ones(3)}
      >>> storage_bytes({"params": {"head": head}}, QuantSpec(weight_bits=3))["weight_codes"]  # 36 bits
      5
    """
    elements = sum(leaf.size for leaf in jax.tree.leaves(variables))
    codes = ranges = quantized = 0
    for path, leaf in weight_paths(variables["params"]).items():
        site = spec.at(path)
        if site.weight_bits is not None:
            codes += packed_bytes(leaf.size, site.weight_bits)
            ranges += _ranges(leaf.shape, site.weight_granularity)
            quantized += leaf.size
    return {
        "weight_codes": codes,
        "weight_scales": 4 * ranges,
        "weight_zero_points": 4 * ranges,
        "full_precision": 4 * (elements - quantized),
        "teacher": 4 * elements,
    }


def _ranges(shape: tuple[int, ...], granularity: str) -> int:
    return int(np.prod([shape[axis] for axis in kept_axes(granularity, len(shape))], dtype=np.int64))


def _is_weight(path: tuple[str, ...], leaf: Any) -> bool:
    return path[-1] == "kernel" and leaf.ndim >= 2
