"""Weights: fake quantization as a pure function of a parameter tree.

What counts as a weight is the ``kernel`` of linen's ``Conv``, ``ConvLocal``, ``ConvTranspose``, ``Dense``,
``DenseGeneral`` and ``Einsum``. Biases, normalisation parameters, embeddings and the arrays of other modules stay in
full precision.

A tree of parameters does not tell which axes of a weight are output features, nor whether several layers are
stacked in it: that is found where the model is called (:func:`granq_jax.quant.quantize` does), and given here as
``layouts``. Without them, every parameter named ``kernel`` with two or more dimensions is taken for the weight of a
convolution or dense layer, (..., I, O).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax

from granq_jax.quant.affine import QuantizedArray, quantize_codes
from granq_jax.quant.fake_quant import fake_quant
from granq_jax.quant.layers import WEIGHT, Layout, kernels, plain_layout, weight_grouping
from granq_jax.quant.ranges import codes_within, fake_quant_within, of_least_error
from granq_jax.quant.spec import QuantSpec


def plain_layouts(params: Mapping[str, Any]) -> dict[str, Layout]:
    """A layout for every parameter named ``kernel`` of two or more dimensions, as (..., I, O), by its module's path.

    Examples:
      >>> import numpy as np
      >>> list(plain_layouts({"head": {"kernel": np.ones((4, 2)), "bias": np.ones(2)}}))
      ['head']
    """
    return {path: plain_layout(leaf.ndim) for path, leaf in kernels(params).items() if leaf.ndim >= 2}


def weight_paths(params: Mapping[str, Any], layouts: Mapping[str, Layout] | None = None) -> dict[str, Any]:
    """The weights of a parameter tree by the ``/``-joined path of the module that owns them.

    Args:
      params: the ``"params"`` collection of a model's variables.
      layouts: of the weights among them, see :meth:`granq_jax.quant.QuantizedModel.layouts`; without them as
        :func:`plain_layouts` has it.

    Examples:
      >>> import numpy as np
      >>> list(weight_paths({"head": {"kernel": np.ones((4, 2)), "bias": np.ones(2)}}))
      ['head']
    """
    layouts = plain_layouts(params) if layouts is None else layouts
    return {path: leaf for path, leaf in kernels(params).items() if path in layouts}


def quantize_params(
    params: Mapping[str, Any],
    spec: QuantSpec,
    impl: str = "auto",
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Any]:
    """The parameter tree with every weight replaced by its fake-quantized values.

    Gradients pass straight through to the weights given.

    Args:
      params: the ``"params"`` collection of a model's variables.
      spec: ``weight_bits``, ``weight_granularity``, ``weight_ranges`` and ``overrides`` of it are used.
      impl: see :func:`granq_jax.fake_quant`.
      layouts: as for :func:`weight_paths`.

    Returns:
      A tree of the same structure, shapes and dtypes.

    Examples:
      >>> import numpy as np
      >>> params = {"head": {"kernel": np.array([[0.0], [0.9], [2.2], [3.0]], np.float32)}}
      >>> quantize_params(params, QuantSpec(weight_bits=2))["head"]["kernel"].ravel().tolist()
      [0.0, 1.0, 2.0, 3.0]
    """
    layouts = plain_layouts(params) if layouts is None else layouts

    def quantized(keys, leaf):
        path = "/".join(keys[:-1])
        site = spec.at(path)
        if keys[-1] != WEIGHT or path not in layouts or site.weight_bits is None:
            return leaf
        grouping, granularity = weight_grouping(layouts[path], site.weight_granularity)
        x = grouping.merged(leaf)
        within = weight_range(leaf, site, layouts[path])
        if within is not None:
            y = fake_quant_within(x, within, site.weight_bits)
        else:
            y = fake_quant(x, bits=site.weight_bits, granularity=granularity, impl=impl)
        return grouping.split(y, leaf.shape)

    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({keys: quantized(keys, leaf) for keys, leaf in flat.items()})


def quantize_weight(weight: jax.Array, site: QuantSpec, layout: Layout | None = None) -> QuantizedArray | None:
    """The codes of a weight, by XLA; ``site`` is the spec at its module. ``None`` in full precision."""
    if site.weight_bits is None:
        return None
    layout = plain_layout(weight.ndim) if layout is None else layout
    grouping, granularity = weight_grouping(layout, site.weight_granularity)
    x, within = grouping.merged(weight), weight_range(weight, site, layout)
    if within is not None:
        q = codes_within(x, within, site.weight_bits)
    else:
        q = quantize_codes(x, bits=site.weight_bits, granularity=granularity, impl="xla")
    return jax.tree.map(lambda part: grouping.split(part, weight.shape), q)


def weight_range(weight: jax.Array, site: QuantSpec, layout: Layout) -> jax.Array | None:
    """The range to quantize the plain form of a weight in, as :mod:`granq_jax.quant.ranges` has it.

    ``None`` for all of its values.
    """
    if site.weight_ranges == "minmax" or site.weight_bits is None:
        return None
    grouping, granularity = weight_grouping(layout, site.weight_granularity)
    return of_least_error(grouping.merged(weight), granularity, site.weight_bits)
