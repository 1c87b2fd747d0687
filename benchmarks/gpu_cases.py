"""The kernels' cases, as the parts of the GPU campaign run them: the kernel, XLA's form, and the order they come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from granq_jax.kernels import codes, out_channel, sample_channel

from tools.gpu_check.kernels import BITS, DTYPES, Case, cases

# Shapes that no tile divides, or hardly any: few pixels and channels, odd ones, two sweeps with a rest.
RAGGED = (
    (3, 5, 7, 13),
    (2, 17, 31, 3),
    (5, 1, 1, 1),
    (2, 9, 11, 1001),
    (3, 77, 5),
    (1, 113, 111, 20),
    (2, 131, 127, 36),
)


def in_order() -> list[Case]:
    """All cases of the networks: float32 first, then bfloat16, of each the fused kernels first and weights last."""
    dtypes = [jnp.dtype(dtype).name for dtype in DTYPES]
    kinds = ("fake_quant", "quantize", "weight")

    def place(case):
        return dtypes.index(case.dtype), kinds.index(case.what), not case.norm, bool(case.activation) != case.norm

    return sorted(cases(), key=place)


def ragged() -> list[Case]:
    """All kinds of kernels at shapes that divide by nothing."""
    found = []
    for dtype in (jnp.dtype(dtype).name for dtype in DTYPES):
        for shape in RAGGED:
            found += [
                Case("fake_quant", shape, dtype),
                Case("fake_quant", shape, dtype, norm=True, activation="relu6"),
                Case("fake_quant", shape, dtype, norm=True, residual=True, activation="relu"),
                Case("quantize", shape, dtype),
                Case("weight", shape, dtype),
            ]
    return found


def of_each_kind(chosen: list[Case]) -> list[Case]:
    """One case of each kind, of a size that an interpreter can run."""

    def shrunk(case):
        samples, *pixels, channels = case.shape
        return dataclasses.replace(case, shape=(min(samples, 2), *(min(n, 5) for n in pixels), min(channels, 8)))

    return list({case.name: shrunk(case) for case in reversed(chosen)}.values())


def kernel(case: Case, interpret: bool) -> Callable:
    """The kernel of a case: a function of the arguments that ``case.function()`` names."""
    if case.what == "weight":
        return lambda x: out_channel.fake_quant(x, BITS, interpret=interpret)
    if case.what == "quantize":
        return lambda x: codes.quantize(x, BITS, interpret=interpret)
    return lambda x, *rest: sample_channel.fake_quant(x, BITS, interpret=interpret, **_fused(case, rest))


def xla_form(case: Case) -> Callable:
    """XLA's form of the same."""
    if case.what == "weight":
        return lambda x: out_channel.reference(x, BITS)
    if case.what == "quantize":
        return lambda x: codes.reference(x, BITS)
    return lambda x, *rest: sample_channel.reference(x, BITS, **_fused(case, rest))


def _fused(case, rest):
    names = ["norm"] * case.norm + ["residual"] * case.residual
    return {"activation": case.activation, **dict(zip(names, rest, strict=True))}
