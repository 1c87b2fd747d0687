"""``quantize``: a quantized view of any Flax (linen) model, over the model's own variables.

Weights are quantized as a function of the parameter tree before the model is applied, activations
by intercepting module calls while it is. The model is not edited and does not know.
"""

from __future__ import annotations

import collections
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from granq_jax.checks import check_choice
from granq_jax.models.layers import NORM_EPSILON, Activation, NormAct
from granq_jax.quant import integer
from granq_jax.quant.affine import QuantizedArray, quantize_codes
from granq_jax.quant.dispatch import IMPLEMENTATIONS, has_kernel
from granq_jax.quant.fake_quant import FrozenNorm, fake_quant, norm_act_fake_quant
from granq_jax.quant.ranges import RANGES, codes_within, fake_quant_within, measured, moved
from granq_jax.quant.spec import QuantSpec, in_full_precision
from granq_jax.quant.storage import effective_act_bits, effective_bits
from granq_jax.quant.weights import quantize_params, quantize_weight, weight_paths, weight_range

ARITHMETICS = ("float", "integer")
OPERAND_MODULES = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)


@dataclasses.dataclass(frozen=True)
class Site:
    """One array of a model that is, or could have been, quantized.

    Attributes:
      path: ``/``-joined path of the module.
      kind: ``"weight"`` or ``"activation"``.
      shape: of the array.
      bits: ``None`` where it stays in full precision.
      granularity: which of its elements share a range; ``None`` in full precision.
      effective_bits: bits an element, with float32 scales and zero points counted; of an activation, for
        one image, and without ranges that are kept.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    granularity: str | None
    effective_bits: float


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
          ValueError: if the spec's placement, activation modules or an override match nothing.
        """
        outputs, _ = self._apply(variables, args, kwargs)
        return outputs

    def apply_with_activations(self, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        """:meth:`apply`, and every activation as later layers read it, in the order of the calls.

        With the bits of ``spec`` ``None`` these are the float model's.
        """
        outputs, activations = self._apply(variables, args, kwargs)
        return outputs, tuple(activation.quantized for activation in activations)

    def sites(self, variables: Any, *args: Any, **kwargs: Any) -> tuple[Site, ...]:
        """Every weight and activation with its bits and granularity; nothing is computed.

        Takes what ``apply`` takes.
        """
        observations = jax.eval_shape(lambda v: self.observe(v, v, *args, **kwargs), variables)
        return tuple(observation.site for observation in observations)

    def observe(self, teacher: Any, variables: Any, *args: Any, **kwargs: Any) -> tuple[Observation, ...]:
        """How far quantization moves every weight and every activation of one batch.

        Args:
          teacher: the float model's variables that the student is set beside.
          variables: the student's.
          *args: as for ``apply``.
          **kwargs: as for ``apply``.

        Returns:
          An :class:`Observation` for each of ``sites``, in the same order: weights, then activations
          as the model comes to them. May be jitted.

        Examples:
          >>> import jax, flax.linen as nn
          >>> model, x = nn.Dense(2), jax.numpy.ones((1, 3))
          >>> variables = model.init(jax.random.key(0), x)
          >>> student = quantize(model, QuantSpec(weight_bits=2, act_bits=None, placement="operand"))
          >>> weight, _ = student.observe(variables, variables, x)
          >>> weight.site.kind, weight.code_counts.sum().item()
          ('weight', 6)
        """
        in_full = dataclasses.replace(self, spec=in_full_precision(self.spec), impl="xla", arithmetic="float")
        _, teachers = in_full._apply(teacher, args, kwargs)
        _, students = dataclasses.replace(self, impl="xla", arithmetic="float")._apply(variables, args, kwargs)
        teachers_weights, weights = weight_paths(teacher["params"]), weight_paths(variables["params"])
        return tuple(
            [
                self._observation(path, "weight", x, weight_range(x, self.spec.at(path)), teachers_weights[path])
                for path, x in weights.items()
            ]
            + [
                self._observation(student.path, "activation", student.x, student.within, of_teacher.x)
                for student, of_teacher in zip(students, teachers, strict=True)
            ]
        )

    def _observation(
        self, path: str, kind: str, x: jax.Array, within: jax.Array | None, reference: jax.Array
    ) -> Observation:
        site = _site(path, kind, x.shape, self.spec.at(path))
        return Observation(site, *_errors_and_counts(site.bits, site.granularity, x, within, reference))

    def _apply(self, variables, args, kwargs):
        """The model's outputs, and the activations that were met."""
        activations: list[_Activation] = []
        codes: dict[int, QuantizedArray] = {}  # of activations, by the identity of the array they stand for
        calls: collections.Counter[str] = collections.Counter()
        matched_modules: set[str | type] = set()

        def quantized(module, x):
            path = "/".join(module.path)
            site = self.spec.at(path)
            y, within = x, None
            if site.act_bits is not None and site.act_ranges == "moving_average":
                within = self._range(module, f"range{calls[path]}", x, site.act_granularity)
                calls[path] += 1
                y = fake_quant_within(x, within, site.act_bits)
            elif site.act_bits is not None:
                y = fake_quant(
                    x, bits=site.act_bits, granularity=site.act_granularity, impl=self.impl, axis_name=self.axis_name
                )
            on_integers = self.arithmetic == "integer" and site.act_granularity in integer.ACT_GRANULARITIES
            if on_integers and site.act_bits is not None:
                of_batch = measured(x, site.act_granularity, self.axis_name) if within is None else within
                codes[id(y)] = codes_within(x, of_batch, site.act_bits)
            activations.append(_Activation(path, x, y, within))  # which keeps it, and so its identity
            return y

        def on_codes(module, x):
            """The output of a layer on codes, or ``None`` where there are none or it does not work on them."""
            if id(x) not in codes:
                return None
            path = "/".join(module.path)
            site, kernel = self.spec.at(path), weights.get(path)
            if kernel is None or site.weight_granularity not in integer.WEIGHT_GRANULARITIES:
                return None
            w = quantize_weight(kernel, site)
            if w is None or not integer.can_be_summed(module, w, codes[id(x)]):
                return None
            y = integer.integer_layer(module, codes[id(x)], w).astype(x.dtype)
            return integer.without_gradient(y, x, kernel)

        def interceptor(next_call, call_args, call_kwargs, context):
            module = context.module
            if context.method_name != "__call__":
                return next_call(*call_args, **call_kwargs)
            if self.spec.placement == "operand":
                if not isinstance(module, OPERAND_MODULES):
                    return next_call(*call_args, **call_kwargs)
                x = quantized(module, call_args[0] if call_args else call_kwargs.pop("inputs"))
                y = on_codes(module, x)
                return next_call(x, *call_args[1:], **call_kwargs) if y is None else y
            named = {wanted for wanted in self.spec.activation_modules if _is_of_class(type(module), wanted)}
            matched_modules.update(named)
            if codes and isinstance(module, OPERAND_MODULES):
                y = on_codes(module, call_args[0] if call_args else call_kwargs["inputs"])
                if y is not None:
                    return quantized(module, y) if named else y
            fusible = type(module) in (NormAct, Activation) and not named and self.impl != "xla"
            epilogue = _epilogue(module, *call_args, **call_kwargs) if fusible else None
            if epilogue is not None:
                site = self.spec.at(epilogue.path)
                if site.act_bits is not None and has_kernel(epilogue.x, site.act_granularity):
                    y = norm_act_fake_quant(
                        epilogue.x,
                        bits=site.act_bits,
                        norm=epilogue.norm,
                        residual=epilogue.residual,
                        activation=epilogue.activation,
                        impl=self.impl,
                    )
                    activations.append(_Activation(epilogue.path, epilogue.x, y, None))
                    # The module that NormAct would have called.
                    matched_modules.update(w for w in self.spec.activation_modules if _is_of_class(Activation, w))
                    return y
            outputs = next_call(*call_args, **call_kwargs)
            return quantized(module, outputs) if named or isinstance(module, Activation) else outputs

        weights = weight_paths(variables["params"])
        quantized_params = quantize_params(variables["params"], self.spec, self.impl)
        with nn.intercept_methods(interceptor):
            outputs = self.model.apply({**variables, "params": quantized_params}, *args, **kwargs)
        self._check_matched(list(weights), activations, matched_modules)
        return outputs, activations

    def _range(self, module: nn.Module, name: str, x: jax.Array, granularity: str) -> jax.Array:
        """The moving average to quantize an activation of ``module`` with, moved first where it may be."""
        average: jax.Array | None = module.get_variable(RANGES, name)
        moves = module.is_mutable_collection(RANGES)
        if average is not None and not moves:
            return average
        within = measured(x, granularity, self.axis_name)
        if average is not None:
            within = moved(average, within)
        if moves:
            module.put_variable(RANGES, name, within)
        return within

    def _check_matched(self, weights, activations, matched_modules):
        name = type(self.model).__name__
        if self.spec.weight_bits is not None and not weights:
            raise ValueError(f"QuantSpec.weight_bits: {name} has no parameter named 'kernel' to quantize")
        if self.spec.act_bits is not None and not activations:
            what = "no Activation module" if self.spec.placement == "activation" else "no convolution or dense layer"
            raise ValueError(
                f"QuantSpec.placement: {self.spec.placement!r} matches nothing in {name}: {what} was called. "
                "Allowed are placement='operand', or placement='activation' with the model's own activation "
                f"classes named in activation_modules; the layers with weights are {', '.join(weights)}"
            )
        for wanted in self.spec.activation_modules:
            if wanted not in matched_modules:
                paths = ", ".join(activation.path for activation in activations) or "none"
                raise ValueError(
                    f"QuantSpec.activation_modules: no module of class {wanted!r} was called in {name}; "
                    f"the activations that were met are {paths}"
                )
        self.spec.check_overrides_match(weights, [activation.path for activation in activations])


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
      TypeError: if ``model`` is not a linen module or ``spec`` not a ``QuantSpec``.
      ValueError: for an ``impl`` that is not allowed.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is an instance of flax.linen.Module")
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec: got {type(spec).__name__}, allowed is a QuantSpec")
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_choice("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic == "integer":
        for field in ("weight_bits", "act_bits"):
            if getattr(spec, field) is None:
                raise ValueError(f"QuantSpec.{field}: got None with arithmetic='integer', allowed are 2 to 8")
        for field, allowed in (
            ("act_granularity", integer.ACT_GRANULARITIES),
            ("weight_granularity", integer.WEIGHT_GRANULARITIES),
        ):
            if getattr(spec, field) not in allowed:
                raise ValueError(
                    f"QuantSpec.{field}: got {getattr(spec, field)!r} with arithmetic='integer', whose ranges must not "
                    f"depend on what is summed over; allowed are {', '.join(map(repr, allowed))}"
                )
        impl = "xla"
    return QuantizedModel(model, spec, impl, axis_name, arithmetic)


class _Activation(NamedTuple):
    """An activation that was met.

    Attributes:
      path: of its module.
      x: before it was quantized; where what comes before is fused with the quantizer, before that.
      quantized: after it.
      within: the moving average that it was quantized with, if it was with one.
    """

    path: str
    x: jax.Array
    quantized: jax.Array
    within: jax.Array | None


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


def _site(path: str, kind: str, shape: tuple[int, ...], spec: QuantSpec) -> Site:
    bits, granularity = (
        (spec.weight_bits, spec.weight_granularity) if kind == "weight" else (spec.act_bits, spec.act_granularity)
    )
    if bits is None:
        return Site(path, kind, tuple(shape), None, None, 32.0)
    if kind == "weight":
        effective = effective_bits(shape, bits, granularity)
    else:
        effective = effective_act_bits(shape, bits, granularity, spec.act_ranges)
    return Site(path, kind, tuple(shape), bits, granularity, effective)
