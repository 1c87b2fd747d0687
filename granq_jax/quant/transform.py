"""``quantize``: a quantized view of any Flax (linen) model, over the model's own variables.

Weights are quantized as a function of the parameter tree before the model is applied, activations
by intercepting module calls while it is. The model is not edited and does not know.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from granq_jax.errors import InputError, InputTypeError, check_choice
from granq_jax.models.layers import NORM_EPSILON, Activation, NormAct
from granq_jax.quant import integer
from granq_jax.quant.affine import QuantizedArray, quantize_codes
from granq_jax.quant.collecting import Leave, Record, collected, is_array, mark, over_arrays
from granq_jax.quant.dispatch import IMPLEMENTATIONS, has_kernel
from granq_jax.quant.fake_quant import FrozenNorm, fake_quant, norm_act_fake_quant
from granq_jax.quant.flow import INPUT, LEVELS, LayerInput, layer_inputs
from granq_jax.quant.layers import LAYERS, WEIGHT, Layout, layer_call, weight_grouping
from granq_jax.quant.ranges import RANGES, codes_within, fake_quant_within, measured, moved
from granq_jax.quant.spec import QuantSpec, granularity_of, in_full_precision
from granq_jax.quant.storage import effective_act_bits, effective_weight
from granq_jax.quant.survey import (
    Interceptor,
    Survey,
    applied,
    einsum_of,
    first_input,
    of_calls,
    own_token,
    surveyed,
    token_of,
    with_first_input,
)
from granq_jax.quant.weights import quantize_params, quantize_weight, weight_paths, weight_range

_LOGGER = logging.getLogger(__name__)

ARITHMETICS = ("float", "integer")
Watch = Callable[[nn.Module, Any], dict[str, jax.Array] | None]
_ACTIVATION, _WATCHED = "activation", "watched"
# Parameters that nobody takes for weights, though an array of them may have two dimensions.
_NO_WEIGHTS = ("bias", "scale", "embedding")


@dataclasses.dataclass(frozen=True)
class Site:
    """One array of a model that is, or could have been, quantized.

    Attributes:
      path: ``/``-joined path of the module; of an array that is no layer's weight, its own.
      kind: ``"weight"``, ``"activation"``, or ``"input"``: of a layer, and no activation.
      shape: of the array.
      bits: ``None`` where it stays in full precision.
      granularity: which of its elements share a range; ``None`` in full precision.
      effective_bits: bits an element, with float32 scales and zero points counted; of an activation, for
        one image, and without ranges that are kept.
      plain_shape: of an activation, as ranges see it: (N, ..., C), with all axes of input channels as one.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    granularity: str | None
    effective_bits: float
    plain_shape: tuple[int, ...] | None = None


class Shares(NamedTuple):
    """How much of a model is quantized, from 0 to 1.

    Attributes:
      weights: of the numbers in parameters of two or more dimensions.
      layer_inputs: of the numbers that convolutions and products are computed on, weights aside.
    """

    weights: float
    layer_inputs: float

    def __str__(self) -> str:
        weights, inputs = (f"{100 * share:.1f} %" for share in self)
        return f"{weights} of the weights and {inputs} of the layers' inputs are quantized"


def _share(arrays: Iterable[tuple[tuple[int, ...], bool]]) -> float:
    """Of the numbers in arrays, given their shapes, those that are in one for which it is true."""
    sizes = [(math.prod(shape), is_quantized) for shape, is_quantized in arrays]
    return sum(size for size, is_quantized in sizes if is_quantized) / max(sum(size for size, _ in sizes), 1)


class Observation(flax.struct.PyTreeNode):
    """What quantization did at one site: a pytree.

    Errors are ratios of Euclidean norms.

    Attributes:
      site: which, static.
      quantization_error: |Q(x) - x| / |x| of the student's array x; 0 in full precision.
      teacher_error: |Q(x) - t| / |t|, where t is the teacher's array at the same place.
      code_counts: (2^bits,), how many elements have each code, the lowest first; ``None`` in full
        precision.
    """

    site: Site = flax.struct.field(pytree_node=False)
    quantization_error: jax.Array
    teacher_error: jax.Array
    code_counts: jax.Array | None


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A model together with how it is quantized. Made by :func:`quantize`."""

    model: nn.Module
    spec: QuantSpec
    impl: str = "auto"
    axis_name: str | None = None
    arithmetic: str = "float"

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """The float model's own ``init``: both models share one variable tree, but for ranges that are kept."""
        return self.model.init(*args, **kwargs)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """``model.apply`` with quantized weights and activations.

        Args:
          variables: the float model's variables, and for ``act_ranges="moving_average"`` the collection
            :data:`~granq_jax.quant.ranges.RANGES`. Without it, ranges are measured on the batch at hand.
          *args: as for ``model.apply``.
          **kwargs: as for ``model.apply``, ``mutable``, ``rngs`` and ``method`` included.

        Returns:
          What ``model.apply`` returns.

        Raises:
          InputError: if the spec's placement, activation modules or an override match nothing, or if it
            cannot be told which axes of a weight that is to be quantized are output features.
        """
        outputs, _ = self._apply(variables, args, kwargs)
        return outputs

    def apply_with_activations(self, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        """:meth:`apply`, and every activation as later layers read it, in the order of the calls.

        With the bits of ``spec`` ``None`` these are the float model's. Of layers that a transform stacks, each
        has its own.
        """
        outputs, records = self._apply(variables, args, kwargs, keep=True)
        return outputs, tuple(record.arrays["quantized"] for record in records)

    def apply_and_watch(
        self, watch: Watch, variables: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, list[Record], tuple[jax.Array, ...]]:
        """:meth:`apply_with_activations`, and what ``watch`` makes of the modules that are called.

        Args:
          watch: of a bound module and its first argument; returns arrays by name, or ``None``.
          variables: as for ``apply``.
          *args: as for ``apply``.
          **kwargs: as for ``apply``.

        Returns:
          What ``model.apply`` returns; a record of each call for which there were arrays; the activations.
        """
        outputs, records = self._apply(variables, args, kwargs, keep=True, watch=watch)
        activations = tuple(record.arrays["quantized"] for record in records if record.kind == _ACTIVATION)
        return outputs, [record for record in records if record.kind != _ACTIVATION], activations

    def layouts(self, variables: Any, *args: Any, **kwargs: Any) -> dict[str, Layout]:
        """Which axes of each weight are output features, by the path of its module; nothing is computed.

        For :func:`~granq_jax.quant.quantize_params` and other functions of parameters alone, which cannot know.
        Takes what ``apply`` takes.
        """
        return dict(self._surveyed(nn.meta.unbox(variables), args, kwargs).layouts)

    def sites(self, variables: Any, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
        """Every array of two or more dimensions of ``params``, and every activation; nothing is computed.

        Each is there once, with its bits and granularity; what stays in full precision, as such. With
        ``placement="activation"`` that includes inputs of layers that do not come from a quantized activation.
        Weights that the spec would have quantized, but that belong to no layer that is known, are named in a warning.
        Takes what ``apply`` takes; of arrays, shapes and dtypes are enough.
        """

        def observed(variables, args, kwargs):
            return self.observe(variables, variables, *args, **kwargs)

        of_arrays, arrays = over_arrays(observed, variables, args, kwargs)
        sites = [observation.site for observation in jax.eval_shape(of_arrays, *arrays)]
        if self.spec.placement == "activation":
            sites += [
                Site(x.path, "input", x.shape, None, None, 32.0)
                for x in self._layer_inputs(variables, args, kwargs)
                if not x.is_quantized
            ]
        if left := [
            site.path for site in sites if site.kind == "weight" and not site.bits and self._is_left(site.path)
        ]:
            _LOGGER.warning(
                "these weights stay in full precision, for they belong to no layer that is known (%s): %s",
                ", ".join(layer.__name__ for layer in LAYERS),
                ", ".join(left),
            )
        return tuple(sites)

    def shares(self, variables: Any, *args: Any, **kwargs: Any) -> Shares:
        """How much of the model is quantized; nothing is computed. Takes what ``sites`` takes.

        Examples:
          >>> import jax, flax.linen as nn
          >>> model = nn.Sequential([nn.Dense(2), nn.relu, nn.Dense(6)])
          >>> variables = model.init(jax.random.key(0), jax.numpy.ones((1, 4)))
          >>> spec = QuantSpec(placement="operand", overrides=(("0$", dict(act_bits=None)),))
          >>> print(quantize(model, spec).shares(variables, jax.numpy.ones((1, 4))))
          100.0 % of the weights and 33.3 % of the layers' inputs are quantized
        """
        sites = self.sites(variables, *args, **kwargs)
        if self.spec.placement == "operand":
            inputs = [(site.shape, site.bits is not None) for site in sites if site.kind == "activation"]
        else:
            inputs = [(x.shape, x.is_quantized) for x in self._layer_inputs(variables, args, kwargs)]
        return Shares(_share((s.shape, s.bits is not None) for s in sites if s.kind == "weight"), _share(inputs))

    def _layer_inputs(self, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[LayerInput]:
        """The inputs of layers, with ``placement="activation"``."""

        def interceptor(next_call, args, kwargs, context):
            module, path = context.module, "/".join(context.module.path)
            if isinstance(module, LAYERS):
                args, kwargs = with_first_input(args, kwargs, mark(jnp.asarray(first_input(args, kwargs)), INPUT, path))
            outputs = next_call(*args, **kwargs)
            is_quantized = self._is_activation(type(module)) and self.spec.at(path).act_bits is not None
            return mark(outputs, LEVELS, path) if is_quantized else outputs

        def run(variables, args, kwargs):
            return applied(self.model, of_calls(interceptor), own_token(), variables, args, kwargs)

        of_arrays, arrays = over_arrays(run, nn.meta.unbox(variables), args, kwargs)
        return layer_inputs(jax.make_jaxpr(of_arrays)(*arrays).jaxpr)

    def _is_activation(self, cls: type[nn.Module]) -> bool:
        """Whether outputs of modules of a class are activations, with ``placement="activation"``."""
        return any(_is_of_class(cls, wanted) for wanted in (Activation, *self.spec.activation_modules))

    def observe(self, teacher: Any, variables: Any, *args: Any, **kwargs: Any) -> tuple[Observation, ...]:
        """How far quantization moves every weight and every activation of one batch.

        Args:
          teacher: the float model's variables that the student is set beside.
          variables: the student's.
          *args: as for ``apply``.
          **kwargs: as for ``apply``.

        Returns:
          An :class:`Observation` for each weight and activation of ``sites``, in the same order: weights, then
          activations as the model comes to them. May be jitted.

        Examples:
          >>> import jax, flax.linen as nn
          >>> model, x = nn.Dense(2), jax.numpy.ones((1, 3))
          >>> variables = model.init(jax.random.key(0), x)
          >>> student = quantize(model, QuantSpec(weight_bits=2, act_bits=None, placement="operand"))
          >>> weight, _ = student.observe(variables, variables, x)
          >>> weight.site.kind, weight.code_counts.sum().item()
          ('weight', 6)
        """
        teacher, variables = nn.meta.unbox(teacher), nn.meta.unbox(variables)
        in_full = dataclasses.replace(self, spec=in_full_precision(self.spec), impl="xla", arithmetic="float")
        _, teachers = in_full._apply(teacher, args, kwargs, keep=True)
        _, students = dataclasses.replace(self, impl="xla", arithmetic="float")._apply(
            variables, args, kwargs, keep=True
        )
        layouts = self._surveyed(variables, args, kwargs).layouts
        of_teacher = flax.traverse_util.flatten_dict(teacher["params"])
        return tuple(
            [
                self._weight_observation(keys, x, of_teacher[keys], layouts)
                for keys, x in flax.traverse_util.flatten_dict(variables["params"]).items()
                if x.ndim >= 2
            ]
            + [
                self._activation_observation(student, of_teacher)
                for student, of_teacher in zip(students, teachers, strict=True)
            ]
        )

    def _weight_observation(
        self, keys: tuple[str, ...], x: jax.Array, reference: jax.Array, layouts: Mapping[str, Layout]
    ) -> Observation:
        path, spec = "/".join(keys[:-1]), self.spec.at("/".join(keys[:-1]))
        if keys[-1] != WEIGHT or path not in layouts or spec.weight_bits is None:
            site = Site(path if keys[-1] == WEIGHT else "/".join(keys), "weight", x.shape, None, None, 32.0)
            return Observation(site, *_errors_and_counts(None, None, x, None, reference))
        layout, bits, granularity = layouts[path], spec.weight_bits, spec.weight_granularity
        effective = effective_weight(x.shape, bits, granularity, layout)
        site = Site(path, "weight", x.shape, bits, granularity, effective)
        grouping, of_groups = weight_grouping(layout, granularity)
        within = weight_range(x, spec, layout)
        x, reference = grouping.merged(x), grouping.merged(reference)
        return Observation(site, *_errors_and_counts(bits, of_groups, x, within, reference))

    def _activation_observation(self, student: Record, teacher: Record) -> Observation:
        spec, x, shape = self.spec.at(student.path), student.arrays["x"], student.arrays["quantized"].shape
        effective = 32.0
        if spec.act_bits is not None:
            effective = effective_act_bits(x.shape, spec.act_bits, spec.act_granularity, spec.act_ranges)
        granularity = None if spec.act_bits is None else spec.act_granularity
        site = Site(student.path, "activation", shape, spec.act_bits, granularity, effective, x.shape)
        within = student.arrays["within"]
        return Observation(site, *_errors_and_counts(spec.act_bits, granularity, x, within, teacher.arrays["x"]))

    def _is_left(self, path: str) -> bool:
        """Whether the spec would quantize an array that stays in full precision, if it were a layer's weight."""
        module, _, name = path.rpartition("/")
        return name not in _NO_WEIGHTS and all(self.spec.at(p).weight_bits is not None for p in (path, module))

    def _surveyed(self, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Survey:
        """The survey of the model, in which the spec was found to match something."""
        survey = surveyed(self.model, variables, args, kwargs)
        self._check_matched(survey)
        for path, reason in survey.unknown.items():
            if self.spec.at(path).weight_bits is not None:
                raise InputError(
                    f"QuantSpec.weight_bits: the weight of {path!r} cannot be quantized: {reason}; leave it in full "
                    f"precision with the override ({f'^{re.escape(path)}$'!r}, dict(weight_bits=None))"
                )
        return survey

    def _apply(
        self,
        variables: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: bool = False,
        watch: Watch | None = None,
    ) -> tuple[Any, list[Record]]:
        """The model's outputs, and records of its activations and of what was watched."""
        variables = nn.meta.unbox(dict(variables))
        survey = self._surveyed(variables, args, kwargs)
        params = variables.get("params", {})
        how = self.spec, self.impl, self.axis_name, self.arithmetic
        # On integers, what intercepts holds weights of this call.
        token = own_token() if self.arithmetic == "integer" else token_of(*how, keep, watch)

        def run(leave, variables, args, kwargs):
            are_kept = RANGES in variables or flax.core.scope.in_filter(kwargs.get("mutable", False), RANGES)
            interceptor = of_calls(self._interceptor(leave, watch, params, survey, are_kept))
            return applied(self.model, interceptor, token, variables, args, kwargs)

        if "params" in variables:
            quantized = quantize_params(params, self.spec, self.impl, survey.layouts)
            variables = {**variables, "params": quantized}
        if not keep:
            return run(lambda x, /, *_, **__: x, variables, args, kwargs), []
        return collected(run, variables, args, kwargs, is_lifted=survey.is_lifted)

    def _interceptor(
        self, leave: Leave, watch: Watch | None, params: Any, survey: Survey, are_kept: bool
    ) -> Interceptor:
        codes: dict[int, tuple[jax.Array, QuantizedArray]] = {}  # of activations, by the identity of the array
        calls: collections.Counter[str] = collections.Counter()
        weights = weight_paths(params, survey.layouts)

        def quantized(module, x, grouping=None):
            path = "/".join(module.path)
            site, shape = self.spec.at(path), x.shape
            if len(shape) < 2 and site.act_bits is not None:
                raise InputError(
                    f"QuantSpec.placement: {self.spec.placement!r} finds an array of shape {shape} at {path!r}; "
                    "allowed are two or more dimensions, samples first"
                )
            x = x if grouping is None else grouping.merged(x)
            y, within = x, None
            if site.act_bits is not None and site.act_ranges == "moving_average":
                within = self._range(module, f"range{calls[path]}", x, site.act_granularity, are_kept)
                calls[path] += 1
                y = fake_quant_within(x, within, site.act_bits)
            elif site.act_bits is not None:
                y = fake_quant(
                    x, bits=site.act_bits, granularity=site.act_granularity, impl=self.impl, axis_name=self.axis_name
                )
            y = y if grouping is None else grouping.split(y, shape)
            y = leave(y, _ACTIVATION, path, x=x, quantized=y, within=within)
            on_integers = self.arithmetic == "integer" and site.act_granularity in integer.ACT_GRANULARITIES
            if on_integers and site.act_bits is not None:
                of_batch = measured(x, site.act_granularity, self.axis_name) if within is None else within
                codes[id(y)] = y, codes_within(x, of_batch, site.act_bits)
            return y

        def on_codes(module, x):
            """The output of a layer on codes, or ``None`` where there are none or it does not work on them."""
            if id(x) not in codes:
                return None
            path = "/".join(module.path)
            site, kernel = self.spec.at(path), weights.get(path)
            if kernel is None or site.weight_granularity not in integer.WEIGHT_GRANULARITIES:
                return None
            w, (_, q) = quantize_weight(kernel, site), codes[id(x)]
            if w is None or not survey.layouts[path].is_plain or not integer.can_be_summed(module, w, q):
                return None
            y = integer.integer_layer(module, q, w).astype(x.dtype)
            return integer.without_gradient(y, x, kernel)

        def at_operand(next_call, args, kwargs, module):
            x = jnp.asarray(first_input(args, kwargs))
            weight = module.get_variable("params", WEIGHT)
            operand = layer_call(
                module, None if weight is None else weight.shape, x.ndim, einsum_of(module, args, kwargs)
            ).operand
            path = "/".join(module.path)
            if operand is None and self.spec.at(path).act_bits is not None:
                raise InputError(
                    f"QuantSpec.act_bits: the input of {path!r} cannot be quantized: {type(module).__name__} does not "
                    "tell which of its axes are input channels; leave it in full precision with the override "
                    f"({f'^{re.escape(path)}$'!r}, dict(act_bits=None))"
                )
            x = quantized(module, x, None if operand is None else operand.grouping(x.ndim))
            y = on_codes(module, x)
            if y is not None:
                return y
            args, kwargs = with_first_input(args, kwargs, x)
            return next_call(*args, **kwargs)

        def fused(args, kwargs, module):
            """The output of a module whose end one kernel computes with the quantizer, or ``None``."""
            epilogue = _epilogue(module, *args, **kwargs)
            if epilogue is None:
                return None
            site = self.spec.at(epilogue.path)
            granularity = granularity_of(site.act_granularity, epilogue.x.shape)
            if site.act_bits is None or not has_kernel(epilogue.x, granularity):
                return None
            y = norm_act_fake_quant(
                epilogue.x,
                bits=site.act_bits,
                norm=epilogue.norm,
                residual=epilogue.residual,
                activation=epilogue.activation,
                impl=self.impl,
            )
            return leave(y, _ACTIVATION, epilogue.path, x=epilogue.x, quantized=y, within=None)

        def interceptor(next_call, args, kwargs, context):
            module = context.module
            if watch is not None and (x := first_input(args, kwargs)) is not None:
                seen = watch(module, x)
                if seen is not None:
                    args, kwargs = with_first_input(args, kwargs, leave(x, _WATCHED, "/".join(module.path), **seen))
            if self.spec.placement == "operand":
                if not isinstance(module, LAYERS):
                    return next_call(*args, **kwargs)
                return at_operand(next_call, args, kwargs, module)
            is_named = any(_is_of_class(type(module), wanted) for wanted in self.spec.activation_modules)
            if codes and isinstance(module, LAYERS):
                y = on_codes(module, first_input(args, kwargs))
                if y is not None:
                    return quantized(module, y) if is_named else y
            if type(module) in (NormAct, Activation) and not is_named and self.impl != "xla":
                y = fused(args, kwargs, module)
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
            return quantized(module, outputs)

        return interceptor

    def _range(self, module: nn.Module, name: str, x: jax.Array, granularity: str, are_kept: bool) -> jax.Array:
        """The moving average to quantize an activation of ``module`` with, moved first where it may be."""
        average: jax.Array | None = module.get_variable(RANGES, name)
        moves = module.is_mutable_collection(RANGES)
        if average is not None and not moves:
            return average
        if average is None and are_kept and not moves:
            raise InputError(
                f"QuantSpec.act_ranges: got 'moving_average', but no range is kept for {'/'.join(module.path)!r}: the "
                "ranges are another model's, or a transform keeps them out; allowed are act_ranges='dynamic', "
                f"or nn.scan and nn.vmap with {RANGES!r} among their variable_axes"
            )
        within = measured(x, granularity, self.axis_name)
        if average is not None:
            within = moved(average, within)
        if moves:
            module.put_variable(RANGES, name, within)
        return within

    def _check_matched(self, survey: Survey) -> None:
        name, weights, spec = type(self.model).__name__, survey.layouts, self.spec
        if spec.weight_bits is not None and not weights and not survey.unknown:
            raise InputError(
                f"QuantSpec.weight_bits: {name} has no parameter named {WEIGHT!r} to quantize: of the layers of "
                f"flax.linen ({', '.join(layer.__name__ for layer in LAYERS)}) none was called"
            )
        if spec.placement == "operand":
            activations = [path for path, cls in survey.calls if issubclass(cls, LAYERS)]
        else:
            activations = [path for path, cls in survey.calls if self._is_activation(cls)]
        if spec.act_bits is not None and not activations:
            what = "no Activation module" if spec.placement == "activation" else "no convolution or dense layer"
            raise InputError(
                f"QuantSpec.placement: {spec.placement!r} matches nothing in {name}: {what} was called. "
                "Allowed are placement='operand', or placement='activation' with the model's own activation "
                f"classes named in activation_modules; the layers with weights are {', '.join(weights)}"
            )
        for wanted in spec.activation_modules:
            if not any(_is_of_class(cls, wanted) for _, cls in survey.calls):
                raise InputError(
                    f"QuantSpec.activation_modules: no module of class {wanted!r} was called in {name}; "
                    f"the activations that were met are {', '.join(activations) or 'none'}"
                )
        spec.check_overrides_match([*weights, *survey.unknown], activations)


def quantize(
    model: nn.Module,
    spec: QuantSpec,
    *,
    impl: str = "auto",
    axis_name: str | None = None,
    arithmetic: str = "float",
) -> QuantizedModel:
    """A quantized view of ``model``: same variables, same call, quantized weights and activations.

    With ``placement="activation"`` the outputs of activation modules are quantized, once, whatever
    reads them. With ``placement="operand"`` the input of every convolution and dense layer is, the
    first and the last included (an override with ``act_bits=None`` exempts one): the form for
    models that call ``nn.relu`` as a function.

    Args:
      model: any linen module. It may be jitted, differentiated, and mapped as before.
      spec: what to quantize and how.
      impl: how ``fake_quant`` is computed, see :func:`granq_jax.fake_quant`.
      axis_name: mapped axis that splits the batch, for ranges that several samples share.
      arithmetic: ``"float"``, or ``"integer"``: ``nn.Conv`` and ``nn.Dense`` whose input and weight are
        quantized compute on integer codes and accumulate in int32 (:mod:`granq_jax.quant.integer`). For
        inference: to ask for a gradient is an error.

    Returns:
      An object with ``apply``, ``init``, ``sites`` and ``observe``.

    Raises:
      InputTypeError: if ``model`` is not a linen module or ``spec`` not a ``QuantSpec``.
      InputError: for an ``impl`` that is not allowed.

    Examples:
      >>> import jax, flax.linen as nn
      >>> model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(2, (3, 3))])
      >>> x = jax.numpy.ones((1, 8, 8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> student = quantize(model, QuantSpec(weight_bits=4, act_bits=4, placement="operand"))
      >>> student.apply(variables, x).shape
      (1, 8, 8, 2)
      >>> [(site.path, site.kind, site.bits) for site in student.sites(variables, x)][:2]
      [('layers_0', 'weight', 4), ('layers_2', 'weight', 4)]
    """
    check_linen("model", model)
    if not isinstance(spec, QuantSpec):
        raise InputTypeError(f"spec: got {type(spec).__name__}, allowed is a QuantSpec")
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic == "integer":
        for field in ("weight_bits", "act_bits"):
            if getattr(spec, field) is None:
                raise InputError(f"QuantSpec.{field}: got None with arithmetic='integer', allowed are 2 to 8")
        for field, allowed in (
            ("act_granularity", integer.ACT_GRANULARITIES),
            ("weight_granularity", integer.WEIGHT_GRANULARITIES),
        ):
            if getattr(spec, field) not in allowed:
                raise InputError(
                    f"QuantSpec.{field}: got {getattr(spec, field)!r} with arithmetic='integer', whose ranges must not "
                    f"depend on what is summed over; allowed are {', '.join(map(repr, allowed))}"
                )
        impl = "xla"
    return QuantizedModel(model, spec, impl, axis_name, arithmetic)


def check_linen(field: str, model: Any) -> None:
    """Raises a ``TypeError``, naming ``field``, if ``model`` is not a linen module; what to do if it is one of nnx."""
    if isinstance(model, nn.Module):
        return
    from flax import nnx  # here: linen's users need not wait for it

    if isinstance(model, nnx.Module):
        raise InputTypeError(
            f"{field}: got {type(model).__name__}, a module of flax.nnx, which cannot be quantized yet; allowed is an "
            "instance of flax.linen.Module: write the network in linen and give it the same values as variables"
        )
    got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise InputTypeError(f"{field}: got {got}, allowed is an instance of flax.linen.Module")


class _Epilogue(NamedTuple):
    """The call of a module that ends in an activation, taken apart for one kernel to do it all.

    Attributes:
      path: of the :class:`Activation`.
    """

    path: str
    x: jax.Array
    norm: FrozenNorm | None
    residual: jax.Array | None
    activation: str


def _epilogue(
    module: NormAct | Activation, x: jax.Array, residual: jax.Array | None = None, *, train: bool = False
) -> _Epilogue | None:
    """``None`` without an activation, in training, and if the dtype would change."""
    if isinstance(module, Activation):
        return _Epilogue("/".join(module.path), x, None, None, module.kind)
    if module.activation is None or train:
        return None
    params, statistics = module.variables["params"]["bn"], module.variables["batch_stats"]["bn"]
    if jnp.result_type(x, params["scale"], params["bias"]) != x.dtype:
        return None
    factor = jax.lax.rsqrt(statistics["var"] + NORM_EPSILON) * params["scale"]
    norm = FrozenNorm(statistics["mean"], factor, params["bias"])
    return _Epilogue("/".join((*module.path, "act")), x, norm, residual, module.activation)


def _is_of_class(cls: type[nn.Module], wanted: str | type) -> bool:
    return issubclass(cls, wanted) if isinstance(wanted, type) else cls.__name__ == wanted


# Jitted, so that arrays of one shape are traced once.
@partial(jax.jit, static_argnums=(0, 1))
def _errors_and_counts(bits, granularity, x, within, reference):
    quantized, counts = x, None
    if bits is not None and granularity is not None:
        if within is not None:
            quantized = fake_quant_within(x, within, bits)
            codes = codes_within(x, within, bits).codes
        else:
            quantized = fake_quant(x, bits=bits, granularity=granularity, impl="xla")
            codes = quantize_codes(x, bits=bits, granularity=granularity, impl="xla").codes
        counts = jnp.bincount(codes.ravel().astype(jnp.int32) + 2 ** (bits - 1), length=2**bits)
    return _relative_error(quantized, x), _relative_error(quantized, reference), counts


def _relative_error(x: jax.Array, reference: jax.Array) -> jax.Array:
    # An array of zeros that is met exactly has no error, not 0 / 0.
    tiny = jnp.finfo(reference.dtype).tiny
    return jnp.linalg.norm((x - reference).ravel()) / jnp.maximum(jnp.linalg.norm(reference.ravel()), tiny)
