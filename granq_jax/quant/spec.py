"""What is quantized, and how: :class:`QuantSpec` and the granularities it names."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from granq_jax.errors import InputError, InputTypeError, check_choice, check_settings, choice, is_whole, setting, whole

MIN_BITS, MAX_BITS = 2, 8

WEIGHT_GRANULARITIES = ("out_channel", "kernel", "tensor")
ACT_GRANULARITIES = ("sample_channel", "channel", "sample", "tensor")
GRANULARITIES = ("sample_channel", "channel", "sample", "tensor", "out_channel", "kernel")
WEIGHT_RANGES = ("minmax", "mse")
ACT_RANGES = ("dynamic", "moving_average")
KEPT_GRANULARITIES = ("channel", "tensor")  # of moving averages: those that do not tell samples apart
PLACEMENTS = ("activation", "operand")

_OVERRIDE = "a pair of a regular expression and a dict of fields"
_BITS = whole(MIN_BITS, MAX_BITS)
_OVERRIDES = (lambda v: isinstance(v, tuple), "tuples of pairs of a pattern and its (field, value) pairs")
_OVERRIDABLE = ("weight_bits", "act_bits", "weight_granularity", "act_granularity")


def check_bits(field: str, value: Any) -> None:
    """Raises, naming ``field``, if ``value`` is not a bit width from 2 to 8; NumPy's whole numbers may be.

    Raises:
      InputTypeError: if it is not an integer.
      InputError: if it lies outside 2 to 8.
    """
    if not is_whole(value):
        raise InputTypeError(f"{field}: got {value!r}, allowed are whole numbers from {MIN_BITS} to {MAX_BITS}")
    if not MIN_BITS <= value <= MAX_BITS:
        raise InputError(f"{field}: got {value}, allowed are whole numbers from {MIN_BITS} to {MAX_BITS}")


def kept_axes(granularity: str, ndim: int) -> tuple[int, ...]:
    """The axes along which every index has a range of its own; all the others share one.

    ================== ================================== =====================
    granularity        a range for each                   scale of an NHWC / HWIO array
    ================== ================================== =====================
    ``sample_channel`` (first, last) index                (N, 1, 1, C)
    ``sample``         first index                        (N, 1, 1, 1)
    ``channel``        last index                         (1, 1, 1, C)
    ``tensor``         the whole array                    (1, 1, 1, 1)
    ``out_channel``    last index                         (1, 1, 1, O)
    ``kernel``         (next to last, last) index         (1, 1, I, O)
    ================== ================================== =====================

    Two-dimensional arrays have no axis left between the two kept ones, so there
    ``sample_channel`` keeps the row alone and ``kernel`` the output alone, as the released code
    does for linear layers; so does ``sample_channel`` of a single pixel, see :func:`granularity_of`.

    Raises:
      InputError: for an unknown granularity or an array of fewer than two dimensions.

    Examples:
      >>> kept_axes("sample_channel", 4), kept_axes("kernel", 4), kept_axes("kernel", 2)
      ((0, 3), (2, 3), (1,))
    """
    check_choice("granularity", granularity, GRANULARITIES)
    if ndim < 2:
        raise InputError(f"granularity {granularity!r}: got an array of {ndim} dimensions, allowed are 2 or more")
    first, before_last, last = 0, ndim - 2, ndim - 1
    return {
        "sample_channel": (first,) if ndim == 2 else (first, last),
        "sample": (first,),
        "channel": (last,),
        "tensor": (),
        "out_channel": (last,),
        "kernel": (last,) if ndim == 2 else (before_last, last),
    }[granularity]


def granularity_of(granularity: str, shape: Sequence[int]) -> str:
    """``granularity`` for an array of ``shape``: with ``"sample_channel"`` one pixel (N, 1, 1, C) counts as (N, C).

    A range for each of its elements would quantize none of them.

    Examples:
      >>> granularity_of("sample_channel", (8, 1, 1, 32)), granularity_of("sample_channel", (8, 2, 2, 32))
      ('sample', 'sample_channel')
    """
    return "sample" if granularity == "sample_channel" and math.prod(shape[1:-1]) == 1 else granularity


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Which arrays of a model are quantized, to how many bits, and which elements share a range.

    Attributes:
      weight_bits: bits of convolution and dense kernels, 2 to 8; ``None`` leaves them as they are.
      act_bits: bits of activations, 2 to 8; ``None`` leaves them as they are.
      weight_granularity: ``"out_channel"`` (a range per output channel), ``"kernel"`` (a range per
        input and output pair, as the released GranQ code has it) or ``"tensor"``.
      weight_ranges: ``"minmax"``, from the least to the greatest weight; or ``"mse"``, the one of least
        squared error, see :func:`granq_jax.quant.ranges.of_least_error`.
      act_granularity: ``"sample_channel"`` (GranQ: a range per sample and channel), ``"channel"``,
        ``"sample"`` or ``"tensor"``.
      act_ranges: ``"dynamic"``, measured on the batch at hand, at test time too; or
        ``"moving_average"``, kept in the variables (see :mod:`granq_jax.quant.ranges`), for
        granularities that do not tell samples apart.
      placement: where activations are quantized: ``"activation"``, the outputs of activation
        modules, or ``"operand"``, the inputs of convolutions and dense layers.
      activation_modules: further module classes (or their names) whose outputs count as
        activations, beside the package's own ``Activation``. Only for ``placement="activation"``.
      overrides: ``(pattern, fields)`` pairs. ``fields`` replaces ``weight_bits``, ``act_bits``,
        ``weight_granularity`` or ``act_granularity`` at every module whose ``/``-joined path
        ``pattern`` (a regular expression, :func:`re.search`) matches; of two overrides that match
        the same module, the later one wins, field by field.

    Raises:
      ValueError or TypeError: at construction, naming the field, what was given and what is allowed.

    Examples:
      >>> spec = QuantSpec(weight_bits=3, act_bits=3, overrides=((r"^stem/", dict(weight_bits=8)),))
      >>> spec.at("stem/conv").weight_bits, spec.at("stage1/unit1/conv1/conv").weight_bits
      (8, 3)
    """

    weight_bits: int | None = setting(3, _BITS)
    act_bits: int | None = setting(3, _BITS)
    weight_granularity: str = setting("out_channel", choice(*WEIGHT_GRANULARITIES))
    weight_ranges: str = setting("minmax", choice(*WEIGHT_RANGES))
    act_granularity: str = setting("sample_channel", choice(*ACT_GRANULARITIES))
    act_ranges: str = setting("dynamic", choice(*ACT_RANGES))
    placement: str = setting("activation", choice(*PLACEMENTS))
    activation_modules: tuple[str | type, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = setting((), _OVERRIDES)

    def __post_init__(self) -> None:
        for field in ("weight_bits", "act_bits"):
            if getattr(self, field) is not None:
                check_bits(f"QuantSpec.{field}", getattr(self, field))
                object.__setattr__(self, field, int(getattr(self, field)))
        check_settings(self, but=("weight_bits", "act_bits", "overrides"))
        if self.act_ranges == "moving_average" and self.act_granularity not in KEPT_GRANULARITIES:
            raise InputError(
                f"QuantSpec.act_granularity: got {self.act_granularity!r} with act_ranges='moving_average', "
                f"allowed are {', '.join(map(repr, KEPT_GRANULARITIES))}"
            )
        object.__setattr__(self, "activation_modules", _checked_modules(self.activation_modules, self.placement))
        if not isinstance(self.overrides, tuple | list):
            raise InputTypeError(f"QuantSpec.overrides: got {self.overrides!r}, allowed is a tuple of {_OVERRIDE}")
        object.__setattr__(self, "overrides", tuple(_checked_override(o) for o in self.overrides))
        for pattern, fields in self.overrides:
            try:
                dataclasses.replace(self, overrides=(), **dict(fields))
            except (TypeError, ValueError) as error:
                raise type(error)(f"QuantSpec.overrides[{pattern!r}]: {error}") from None

    def at(self, path: str) -> QuantSpec:
        """The spec that holds at the module ``path`` (``/``-joined), its overrides applied."""
        fields = {k: v for pattern, items in self.overrides if re.search(pattern, path) for k, v in items}
        return dataclasses.replace(self, overrides=(), **fields)

    def check_overrides_match(self, weights: Iterable[str], activations: Iterable[str]) -> None:
        """Raises an ``InputError`` if a field of an override matches none of the module paths it is for."""
        paths = {"weight": sorted(set(weights)), "act": sorted(set(activations))}
        for pattern, items in self.overrides:
            for name, _ in items:
                kind = name.partition("_")[0]
                if not any(re.search(pattern, path) for path in paths[kind]):
                    raise InputError(
                        f"QuantSpec.overrides: {pattern!r} with {name} matches nothing; "
                        f"the paths there are {', '.join(paths[kind]) or 'none'}"
                    )


def in_full_precision(spec: QuantSpec) -> QuantSpec:
    """``spec`` with nothing quantized: what counts as an activation stays the same."""
    return dataclasses.replace(spec, weight_bits=None, act_bits=None, overrides=())


def without_weights(spec: QuantSpec) -> QuantSpec:
    """``spec`` for a model whose weights are quantized already: its activations alone.

    Examples:
      >>> without_weights(QuantSpec(overrides=((r"^stem/", dict(weight_bits=8, act_bits=8)),))).overrides
      (('^stem/', (('act_bits', 8),)),)
    """
    overrides = [
        (pattern, tuple((key, value) for key, value in fields if not key.startswith("weight_")))
        for pattern, fields in spec.overrides
    ]
    return dataclasses.replace(spec, weight_bits=None, overrides=tuple(o for o in overrides if o[1]))


def _checked_modules(modules: Any, placement: str) -> tuple[str | type, ...]:
    if not isinstance(modules, tuple | list | set | frozenset):
        raise InputTypeError(
            f"QuantSpec.activation_modules: got {modules!r}, allowed is a tuple of classes or class names"
        )
    modules = tuple(modules)
    for module in modules:
        if not isinstance(module, str | type):
            raise InputTypeError(f"QuantSpec.activation_modules: got {module!r}, allowed are classes or class names")
    if modules and placement != "activation":
        raise InputError(
            f"QuantSpec.activation_modules: got {modules!r} with placement={placement!r}, "
            "allowed only with placement='activation'"
        )
    return modules


def _checked_override(override: Any) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """Normalises one override to ``(pattern, sorted items)``, which is hashable."""
    if not isinstance(override, tuple | list) or len(override) != 2:
        raise InputTypeError(f"QuantSpec.overrides: got {override!r}, allowed is {_OVERRIDE}")
    pattern, fields = override
    if not isinstance(pattern, str) or not isinstance(fields, Mapping | tuple):
        raise InputTypeError(f"QuantSpec.overrides: got {override!r}, allowed is {_OVERRIDE}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"QuantSpec.overrides: {pattern!r} is not a regular expression: {error}") from None
    try:
        fields = dict(fields)
    except (TypeError, ValueError):
        raise InputTypeError(f"QuantSpec.overrides: got {override!r}, allowed is {_OVERRIDE}") from None
    for name in fields:
        check_choice(f"QuantSpec.overrides[{pattern!r}]", name, _OVERRIDABLE)
    return pattern, tuple(sorted(fields.items()))
