"""Which inputs of layers hold nothing but levels of quantized activations: followed through a program, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp

from granq_jax.quant.calls import applied, first_input, of_calls, own_token, with_first_input
from granq_jax.quant.collecting import mark, mark_p, over_arrays, programs, scan_operands
from granq_jax.quant.layers import LAYERS, is_activation
from granq_jax.quant.spec import QuantSpec

# What moves or picks values, and makes no new ones.
_MOVES = frozenset(
    (
        *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "rev", "slice", "dynamic_slice"),
        *("gather", "concatenate", "reduce_window_max", "reduce_max", "copy", "stop_gradient", "split"),
    )
)
_LEVELS, _INPUT = "levels", "input"  # kinds of marks


class LayerInput(NamedTuple):
    """An input of a layer, and whether it holds nothing but levels."""

    path: str
    shape: tuple[int, ...]
    is_quantized: bool


def layer_inputs(
    model: nn.Module, spec: QuantSpec, variables: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[LayerInput]:
    """The inputs of a model's layers, with ``placement="activation"``."""

    def interceptor(next_call, args, kwargs, context):
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, LAYERS):
            args, kwargs = with_first_input(args, kwargs, mark(jnp.asarray(first_input(args, kwargs)), _INPUT, path))
        outputs = next_call(*args, **kwargs)
        is_quantized = is_activation(type(module), spec) and spec.at(path).act_bits is not None
        return mark(outputs, _LEVELS, path) if is_quantized else outputs

    def run(variables, args, kwargs):
        return applied(model, of_calls(interceptor), own_token(), variables, args, kwargs)

    of_arrays, arrays = over_arrays(run, nn.meta.unbox(variables), args, kwargs)
    jaxpr = jax.make_jaxpr(of_arrays)(*arrays).jaxpr
    return _followed(jaxpr, [False] * len(jaxpr.invars))[1]


def _followed(jaxpr: jex.Jaxpr, holds_levels: Sequence[bool]) -> tuple[list[bool], list[LayerInput]]:
    known: dict[Any, bool] = dict(zip(jaxpr.invars, holds_levels, strict=True))
    found: list[LayerInput] = []

    def holds(atom):
        return not isinstance(atom, jex.Literal) and known.get(atom, False)

    for eqn in jaxpr.eqns:
        of_operands, inner = [holds(atom) for atom in eqn.invars], programs(eqn.params)
        results = [False] * len(eqn.outvars)
        if eqn.primitive is mark_p:
            record = jax.tree.unflatten(eqn.params["tree"], eqn.invars[1:])
            results = [record.kind == _LEVELS or of_operands[0]] * len(eqn.outvars)
            if record.kind == _INPUT:
                aval: Any = eqn.invars[0].aval
                found.append(LayerInput(record.path, aval.shape, of_operands[0]))
        elif eqn.primitive.name in _MOVES:
            results = [all(of_operands)] * len(eqn.outvars)
        elif eqn.primitive.name == "scan":
            results, of_steps = _scan(eqn, inner[0], of_operands)
            found += of_steps
        elif len(inner) == 1 and len(inner[0].invars) == len(eqn.invars):
            results, of_call = _followed(inner[0], of_operands)
            found += of_call
        known.update(zip(eqn.outvars, results, strict=True))
    return [holds(atom) for atom in jaxpr.outvars], found


def _scan(eqn, body, of_operands):
    """What holds in every step: a carry holds levels if it does at the beginning, and after a step if before it."""
    consts, carry, xs = scan_operands(eqn, of_operands)
    while True:
        results, found = _followed(body, [*consts, *carry, *xs])
        after = [before and result for before, result in zip(carry, results, strict=False)]
        if after == carry:
            return results, found * eqn.params["length"]
        carry = after
