"""The transform: interceptors that quantize activations while a model is applied.

The model is not edited and does not know. Weights are quantized before, as a function of the parameter
tree (:mod:`granq_jax.quant.weights`).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from granq_jax.errors import InputError
from granq_jax.models.layers import NORM_EPSILON, Activation, NormAct
from granq_jax.quant import integer
from granq_jax.quant.affine import QuantizedArray
from granq_jax.quant.calls import Interceptor, einsum_of, first_input, with_first_input
from granq_jax.quant.collecting import Leave, is_array
from granq_jax.quant.dispatch import has_kernel
from granq_jax.quant.fake_quant import FrozenNorm, fake_quant, norm_act_fake_quant
from granq_jax.quant.grouping import Grouping, plain_grouping
from granq_jax.quant.layers import LAYERS, WEIGHT, Layout, is_of_class, layer_call
from granq_jax.quant.ranges import RANGES, codes_within, fake_quant_within, measured, moved
from granq_jax.quant.spec import QuantSpec, granularity_of
from granq_jax.quant.weights import quantize_weight

Watch = Callable[[nn.Module, Any], dict[str, jax.Array] | None]
ACTIVATION, WATCHED = "activation", "watched"  # kinds of what is left


@dataclasses.dataclass(frozen=True)
class FakeQuantization:
    """Interceptor that quantizes activations in floating point, in the ranges of the batch at hand.

    Attributes:
      spec: of the model.
      leave: what each activation is left with, see :func:`granq_jax.quant.collecting.collected`.
      impl: see :func:`granq_jax.fake_quant`.
      axis_name: mapped axis that splits the batch.
    """

    spec: QuantSpec
    leave: Leave
    impl: str
    axis_name: str | None

    def __call__(self, next_call, args, kwargs, context):
        """The output of a call, its input or itself quantized where the spec's placement says so."""
        module = context.module
        if self.spec.placement == "operand":
            if isinstance(module, LAYERS):
                args, kwargs = with_first_input(args, kwargs, self._operand(module, args, kwargs))
            return next_call(*args, **kwargs)
        is_named = any(is_of_class(type(module), wanted) for wanted in self.spec.activation_modules)
        if type(module) in (NormAct, Activation) and not is_named and self.impl != "xla":
            y = self._fused(module, *args, **kwargs)
            if y is not None:
                return y
        outputs = next_call(*args, **kwargs)
        if not is_named and not isinstance(module, Activation):
            return outputs
        if not is_array(outputs):
            raise InputError(
                f"QuantSpec.activation_modules: {'/'.join(module.path)!r} of class {type(module).__name__} returns "
                f"a {type(outputs).__name__}, allowed are modules that return one array"
            )
        return self._quantized(module, outputs, plain_grouping(outputs.ndim))

    def _operand(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> jax.Array:
        """The input of a layer, quantized."""
        x, path = jnp.asarray(first_input(args, kwargs)), "/".join(module.path)
        weight: Any = module.get_variable("params", WEIGHT)
        shape = None if weight is None else weight.shape
        operand = layer_call(module, shape, x.ndim, einsum_of(module, args, kwargs)).operand
        if operand is None and self.spec.at(path).act_bits is not None:
            raise InputError(
                f"QuantSpec.act_bits: the input of {path!r} cannot be quantized: {type(module).__name__} does not "
                "tell which of its axes are input channels; leave it in full precision with the override "
                f"({f'^{re.escape(path)}$'!r}, dict(act_bits=None))"
            )
        return self._quantized(module, x, plain_grouping(x.ndim) if operand is None else operand.grouping(x.ndim))

    def _quantized(self, module: nn.Module, x: jax.Array, grouping: Grouping) -> jax.Array:
        path = "/".join(module.path)
        site, shape = self.spec.at(path), x.shape
        if len(shape) < 2 and site.act_bits is not None:
            raise InputError(
                f"QuantSpec.placement: {self.spec.placement!r} finds an array of shape {shape} at {path!r}; "
                "allowed are two or more dimensions, samples first"
            )
        x = grouping.merged(x)
        y, within = (x, None) if site.act_bits is None else self._values(module, x, site.act_bits, site.act_granularity)
        y = grouping.split(y, shape)
        return self.leave(y, ACTIVATION, path, x=x, quantized=y, within=within)

    def _values(self, module, x, bits, granularity):
        """What the values of an activation become, and their ranges unless those are of ``x`` itself."""
        return fake_quant(x, bits=bits, granularity=granularity, impl=self.impl, axis_name=self.axis_name), None

    def _fused(self, module, x, residual=None, *, train=False):
        """The output of a module whose end one kernel computes together with the quantizer, or ``None``.

        That is where there is no kernel or activation, in training, and if the dtype would change.
        """
        if isinstance(module, Activation):
            return self._by_kernel(module.path, x, activation=module.kind)
        if module.activation is None or train:
            return None
        params, statistics = module.variables["params"]["bn"], module.variables["batch_stats"]["bn"]
        if jnp.result_type(x, params["scale"], params["bias"]) != x.dtype:
            return None
        factor = jax.lax.rsqrt(statistics["var"] + NORM_EPSILON) * params["scale"]
        norm = FrozenNorm(statistics["mean"], factor, params["bias"])
        return self._by_kernel((*module.path, "act"), x, norm=norm, residual=residual, activation=module.activation)

    def _by_kernel(self, path, x, **before):
        path = "/".join(path)
        site = self.spec.at(path)
        if site.act_bits is None or not has_kernel(x, granularity_of(site.act_granularity, x.shape)):
            return None
        y = norm_act_fake_quant(x, bits=site.act_bits, impl=self.impl, **before)
        return self.leave(y, ACTIVATION, path, x=x, quantized=y, within=None)


@dataclasses.dataclass(frozen=True)
class KeptRanges(FakeQuantization):
    """The same in ranges that are a moving average, in the model's variables.

    Attributes:
      are_kept: whether the variables have ranges, or will: one that is missing is then an error.
      calls: how many activations of each module were met.
    """

    are_kept: bool
    calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def _values(self, module, x, bits, granularity):
        within = self._range(module, x, granularity)
        return fake_quant_within(x, within, bits), within

    def _range(self, module: nn.Module, x: jax.Array, granularity: str) -> jax.Array:
        """The moving average to quantize an activation of ``module`` with, moved first where it may be."""
        path = "/".join(module.path)
        name = f"range{self.calls[path]}"
        self.calls[path] += 1
        average: jax.Array | None = module.get_variable(RANGES, name)
        moves = module.is_mutable_collection(RANGES)
        if average is not None and not moves:
            return average
        if average is None and self.are_kept and not moves:
            raise InputError(
                f"QuantSpec.act_ranges: got 'moving_average', but no range is kept for {path!r}: the "
                "ranges are another model's, or a transform keeps them out; allowed are act_ranges='dynamic', "
                f"or nn.scan and nn.vmap with {RANGES!r} among their variable_axes"
            )
        within = measured(x, granularity, self.axis_name)
        if average is not None:
            within = moved(average, within)
        if moves:
            module.put_variable(RANGES, name, within)
        return within


@dataclasses.dataclass(frozen=True)
class OnCodes:
    """Interceptor of layers that computes on integer codes, within one that quantizes activations.

    Attributes:
      spec: of the model.
      then: what activations are left with once their codes are known.
      axis_name: mapped axis that splits the batch.
      weights: of the model, in full precision, by the path of their module.
      layouts: of these.
      codes: of each activation so far.
    """

    spec: QuantSpec
    then: Leave
    axis_name: str | None
    weights: Mapping[str, jax.Array]
    layouts: Mapping[str, Layout]
    codes: list[tuple[jax.Array, QuantizedArray]] = dataclasses.field(default_factory=list)

    def leave(self, y: jax.Array, kind: str, path: str, /, **arrays: Any) -> jax.Array:
        """What the interceptor of activations is to leave them with."""
        y = self.then(y, kind, path, **arrays)
        site, x, within = self.spec.at(path), arrays["x"], arrays["within"]
        if site.act_bits is not None and site.act_granularity in integer.ACT_GRANULARITIES:
            within = measured(x, site.act_granularity, self.axis_name) if within is None else within
            self.codes.append((y, codes_within(x, within, site.act_bits)))
        return y

    def __call__(self, next_call, args, kwargs, context):
        """The output of a call, computed on codes where there are some and the module is a layer that can be."""
        y = self._on_codes(context.module, first_input(args, kwargs))
        return next_call(*args, **kwargs) if y is None else y

    def _on_codes(self, module: nn.Module, x: Any) -> jax.Array | None:
        # An input has the codes of an activation if it is that very object: whatever a model does in between, a sum or
        # pooling, makes another one. The list keeps the objects alive, so that none can take the place of another.
        q = next((q for y, q in self.codes if y is x), None)
        path = "/".join(module.path)
        site, weight = self.spec.at(path), self.weights.get(path)
        if q is None or weight is None or site.weight_granularity not in integer.WEIGHT_GRANULARITIES:
            return None
        w = quantize_weight(weight, site)
        if w is None or not self.layouts[path].is_plain or not integer.can_be_summed(module, w, q):
            return None
        y = integer.integer_layer(module, q, w).astype(x.dtype)
        return integer.without_gradient(y, x, weight)


def watching(watch: Watch, leave: Leave) -> Interceptor:
    """An interceptor that leaves with the input of each call what ``watch`` makes of the module and its input."""

    def intercept(next_call, args, kwargs, context):
        x = first_input(args, kwargs)
        seen = None if x is None else watch(context.module, x)
        if seen is not None:
            x = leave(x, WATCHED, "/".join(context.module.path), **seen)
            args, kwargs = with_first_input(args, kwargs, x)
        return next_call(*args, **kwargs)

    return intercept
