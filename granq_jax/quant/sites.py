"""Sites: what of a model is quantized, at what cost, and what that does to its arrays."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from granq_jax.quant.affine import quantize_codes
from granq_jax.quant.collecting import Record
from granq_jax.quant.fake_quant import fake_quant
from granq_jax.quant.layers import LAYERS, WEIGHT, Layout, weight_grouping
from granq_jax.quant.ranges import codes_within, fake_quant_within
from granq_jax.quant.spec import QuantSpec
from granq_jax.quant.storage import effective_act_bits, effective_weight
from granq_jax.quant.weights import weight_range

_LOGGER = logging.getLogger(__name__)
Observed = tuple[Mapping[str, Any], list[Record]]
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
    bits: int | None = None
    granularity: str | None = None
    effective_bits: float = 32.0
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


def share(arrays: Iterable[tuple[tuple[int, ...], bool]]) -> float:
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


def observations(
    spec: QuantSpec, layouts: Mapping[str, Layout], student: Observed, teacher: Observed
) -> tuple[Observation, ...]:
    """An observation of each parameter of two or more dimensions, then of each activation.

    Args:
      spec: how the student is quantized.
      layouts: of its weights, see :func:`granq_jax.quant.weight_paths`.
      student: its parameters, and what was recorded of its activations.
      teacher: the same of the teacher.
    """
    params, of_teacher = (flax.traverse_util.flatten_dict(of_model[0]) for of_model in (student, teacher))
    matrices = {keys: x for keys, x in params.items() if x.ndim >= 2}
    weights = [_weight_observation(keys, x, of_teacher[keys], spec, layouts) for keys, x in matrices.items()]
    activations = [_activation_observation(*pair, spec) for pair in zip(student[1], teacher[1], strict=True)]
    return *weights, *activations


def _weight_observation(keys, x, reference, spec, layouts):
    path = "/".join(keys[:-1])
    spec = spec.at(path)
    if keys[-1] != WEIGHT or path not in layouts or spec.weight_bits is None:
        site = Site(path if keys[-1] == WEIGHT else "/".join(keys), "weight", x.shape)
        return Observation(site, *_errors_and_counts(None, None, x, None, reference))
    layout, bits, granularity = layouts[path], spec.weight_bits, spec.weight_granularity
    site = Site(path, "weight", x.shape, bits, granularity, effective_weight(x.shape, bits, granularity, layout))
    grouping, of_groups = weight_grouping(layout, granularity)
    within = weight_range(x, spec, layout)
    x, reference = grouping.merged(x), grouping.merged(reference)
    return Observation(site, *_errors_and_counts(bits, of_groups, x, within, reference))


def _activation_observation(student, teacher, spec):
    x, shape, spec = student.arrays["x"], student.arrays["quantized"].shape, spec.at(student.path)
    site = Site(student.path, "activation", shape, plain_shape=x.shape)
    if spec.act_bits is not None:
        effective = effective_act_bits(x.shape, spec.act_bits, spec.act_granularity, spec.act_ranges)
        site = dataclasses.replace(site, bits=spec.act_bits, granularity=spec.act_granularity, effective_bits=effective)
    arrays = x, student.arrays["within"], teacher.arrays["x"]
    return Observation(site, *_errors_and_counts(site.bits, site.granularity, *arrays))


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


def warn_of_weights_left(sites: Iterable[Site], spec: QuantSpec) -> None:
    """Names weights that ``spec`` would have quantized if they belonged to a layer that is known."""

    def would_be_quantized(path):
        module, _, name = path.rpartition("/")
        return name not in _NO_WEIGHTS and all(spec.at(p).weight_bits is not None for p in (path, module))

    left = [x.path for x in sites if x.kind == "weight" and not x.bits and would_be_quantized(x.path)]
    if left:
        _LOGGER.warning(
            "these weights stay in full precision, for they belong to no layer that is known (%s): %s",
            ", ".join(layer.__name__ for layer in LAYERS),
            ", ".join(left),
        )
