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

from granq_jax.quant.affine import QuantizedArray, quantize_codes
from granq_jax.quant.fake_quant import fake_quant
from granq_jax.quant.ranges import codes_within, fake_quant_within, of_least_error
from granq_jax.quant.spec import QuantSpec


def weight_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a parameter tree by the ``/``-joined path of the module that owns them.

    Examples:
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
      spec: ``weight_bits``, ``weight_granularity``, ``weight_ranges`` and ``overrides`` of it are used.
      impl: see :func:`granq_jax.fake_quant`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Examples:
      >>> import numpy as np
      >>> params = {"head": {"kernel": np.array([[0.0], [0.9], [2.2], [3.0]], np.float32)}}
      >>> quantize_params(params, QuantSpec(weight_bits=2))["head"]["kernel"].ravel().tolist()
      [0.0, 1.0, 2.0, 3.0]
    """

    def quantized(path, leaf):
        site = spec.at("/".join(path[:-1]))
        if not _is_weight(path, leaf) or site.weight_bits is None:
            return leaf
        within = weight_range(leaf, site)
        if within is not None:
            return fake_quant_within(leaf, within, site.weight_bits)
        return fake_quant(leaf, bits=site.weight_bits, granularity=site.weight_granularity, impl=impl)

    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: quantized(path, leaf) for path, leaf in flat.items()})


def quantize_weight(weight: jax.Array, site: QuantSpec) -> QuantizedArray | None:
    """The codes of a weight, by XLA; ``site`` is the spec at its module. ``None`` in full precision."""
    if site.weight_bits is None:
        return None
    within = weight_range(weight, site)
    if within is not None:
        return codes_within(weight, within, site.weight_bits)
    return quantize_codes(weight, bits=site.weight_bits, granularity=site.weight_granularity, impl="xla")


def weight_range(weight: jax.Array, site: QuantSpec) -> jax.Array | None:
    """The range to quantize a weight in, as :mod:`granq_jax.quant.ranges` has it; ``None`` for all of its values."""
    if site.weight_ranges == "minmax" or site.weight_bits is None:
        return None
    return of_least_error(weight, site.weight_granularity, site.weight_bits)


def _is_weight(path: tuple[str, ...], leaf: Any) -> bool:
    return path[-1] == "kernel" and leaf.ndim >= 2
