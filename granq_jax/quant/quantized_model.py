"""``quantize``: a quantized view of any Flax (linen) model, over the model's own variables.

Weights are quantized as a function of the parameter tree before the model is applied, activations
by intercepting module calls while it is. The model is not edited and does not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax

from granq_jax.errors import InputError, InputTypeError, check_choice
from granq_jax.quant import integer
from granq_jax.quant.calls import Interceptor, applied, of_calls, own_token, token_of, within
from granq_jax.quant.collecting import Leave, Record, collected, over_arrays
from granq_jax.quant.dispatch import IMPLEMENTATIONS
from granq_jax.quant.flow import layer_inputs
from granq_jax.quant.layers import Layout
from granq_jax.quant.ranges import RANGES
from granq_jax.quant.sites import Observation, Shares, Site, observations, share, warn_of_weights_left
from granq_jax.quant.spec import QuantSpec, in_full_precision
from granq_jax.quant.survey import Survey, surveyed
from granq_jax.quant.transform import ACTIVATION, FakeQuantization, KeptRanges, OnCodes, Watch, watching
from granq_jax.quant.weights import quantize_params, weight_paths

ARITHMETICS = ("float", "integer")


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
        activations = tuple(record.arrays["quantized"] for record in records if record.kind == ACTIVATION)
        return outputs, [record for record in records if record.kind != ACTIVATION], activations

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
            inputs = layer_inputs(self.model, self.spec, variables, args, kwargs)
            sites += [Site(x.path, "input", x.shape) for x in inputs if not x.is_quantized]
        warn_of_weights_left(sites, self.spec)
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
            inputs = [(x.shape, x.is_quantized) for x in layer_inputs(self.model, self.spec, variables, args, kwargs)]
        return Shares(share((s.shape, s.bits is not None) for s in sites if s.kind == "weight"), share(inputs))

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
        student = dataclasses.replace(self, impl="xla", arithmetic="float")
        in_full = dataclasses.replace(student, spec=in_full_precision(self.spec))
        _, of_teacher = in_full._apply(teacher, args, kwargs, keep=True)
        _, of_student = student._apply(variables, args, kwargs, keep=True)
        layouts = self._surveyed(variables, args, kwargs).layouts
        return observations(self.spec, layouts, (variables["params"], of_student), (teacher["params"], of_teacher))

    def _surveyed(self, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Survey:
        """The survey of the model, in which the spec was found to match something."""
        survey = surveyed(self.model, variables, args, kwargs)
        survey.check_matched(self.spec, type(self.model).__name__)
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
            interceptor = self._interceptor(leave, params, survey.layouts, are_kept)
            if watch is not None:
                interceptor = within(watching(watch, leave), interceptor)
            return applied(self.model, of_calls(interceptor), token, variables, args, kwargs)

        if "params" in variables:
            variables = {**variables, "params": quantize_params(params, self.spec, self.impl, survey.layouts)}
        if not keep:
            return run(lambda x, /, *_, **__: x, variables, args, kwargs), []
        return collected(run, variables, args, kwargs, is_lifted=survey.is_lifted)

    def _interceptor(self, leave: Leave, params: Any, layouts: Mapping[str, Layout], are_kept: bool) -> Interceptor:
        on_codes = None
        if self.arithmetic == "integer":
            on_codes = OnCodes(self.spec, leave, self.axis_name, weight_paths(params, layouts), layouts)
            leave = on_codes.leave
        interceptor: Interceptor = FakeQuantization(self.spec, leave, self.impl, self.axis_name)
        if self.spec.act_ranges == "moving_average":
            interceptor = KeptRanges(self.spec, leave, self.impl, self.axis_name, are_kept)
        return interceptor if on_codes is None else within(interceptor, on_codes)


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
