"""``collected``: arrays from within a Flax model, out of the transforms that its modules are called in.

A list that modules are intercepted to append to does for modules called as they are. In ``nn.jit``, ``nn.remat``,
``nn.scan`` or ``nn.vmap`` it would be given tracers of an inner trace, which mean nothing outside; and a Flax
collection leaves ``nn.scan`` and ``nn.vmap`` only where the model names it. So there arrays are marked, by a primitive
that does nothing, and the program is evaluated again with what is marked among the outputs of every part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.extend.core as jex
from jax.interpreters import batching, mlir, partial_eval

from granq_jax.errors import InputError

Leave = Callable[..., Any]


class Record(flax.struct.PyTreeNode):
    """Arrays that belong together.

    Attributes:
      kind: what they are of, static.
      path: of the module, static.
      arrays: by name; or ``None`` where there is none.
    """

    arrays: dict[str, Any]
    kind: str = flax.struct.field(pytree_node=False)
    path: str = flax.struct.field(pytree_node=False)
    copies: int = flax.struct.field(default=0, pytree_node=False)  # leading axes that vmaps have put there


def is_array(x: Any) -> bool:
    """Whether ``x`` has a shape and a dtype."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def over_arrays(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Any]]:
    """``function`` of the arrays in ``args`` alone, and these; all else is seen as it is.

    Examples:
      >>> of_arrays, arrays = over_arrays(lambda x, train: x + 1 if train else x, jax.numpy.ones(2), True)
      >>> jax.eval_shape(of_arrays, *arrays)
      ShapeDtypeStruct(shape=(2,), dtype=float32)
    """
    leaves, tree = jax.tree.flatten(args)

    def of_arrays(*arrays):
        given = iter(arrays)
        return function(*jax.tree.unflatten(tree, [next(given) if is_array(leaf) else leaf for leaf in leaves]))

    return of_arrays, [leaf for leaf in leaves if is_array(leaf)]


def collected(function: Callable[..., Any], *args: Any, is_lifted: bool) -> tuple[Any, list[Record]]:
    """``function(leave, *args)``, and what it left, in the order of the calls.

    Args:
      function: of ``leave(x, kind, path, **arrays)``, which leaves arrays and returns ``x``, to be used from
        there on; and of ``args``.
      *args: pytrees; their arrays are passed, all else is seen as it is.
      is_lifted: whether arrays are left inside transforms. Where they are, one that is left in each step of a
        scan, or for each index of a mapped axis, is so many records.

    Raises:
      InputError: if one is left where it cannot be brought out.

    Examples:
      >>> def cumulated(leave, xs):
      ...     return jax.lax.scan(lambda total, x: (leave(total + x, "sum", "", total=total + x), None), 0.0, xs)[0]
      >>> total, records = collected(cumulated, jax.numpy.array([1.0, 2.0]), is_lifted=True)
      >>> total.item(), [record.arrays["total"].item() for record in records]
      (3.0, [1.0, 3.0])
    """
    if not is_lifted:
        records: list[Record] = []

        def leave(x, kind, path, /, **arrays):
            records.append(Record(arrays, kind, path))
            return x

        return function(leave, *args), records

    of_arrays, arrays = over_arrays(partial(function, mark), *args)
    closed, shape = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    # A trace may mark an array and then not be used, as the first one of nn.scan's is.
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    outputs, records = _evaluated(jaxpr, closed.consts, arrays)
    return jax.tree.unflatten(jax.tree.structure(shape), outputs), [one for record in records for one in _each(record)]


mark_p = jex.Primitive("granq_mark")
mark_p.multiple_results = True
mark_p.def_impl(lambda *arrays, **_: arrays)
mark_p.def_abstract_eval(lambda *arrays, **_: arrays)
mlir.register_lowering(mark_p, lambda _, *arrays, **__: arrays)


def mark(x: jax.Array, kind: str, path: str, /, **arrays: jax.Array | None) -> jax.Array:
    """``x``; whoever looks at the program finds the arrays there."""
    leaves, tree = jax.tree.flatten(Record(arrays, kind, path))
    marked: jax.Array = mark_p.bind(x, *leaves, tree=tree)[0]
    return marked


def _batched(operands, axes, *, tree):
    (size,) = {x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None}
    in_front = [batching.bdim_at_front(x, axis, size) for x, axis in zip(operands, axes, strict=True)]
    record = jax.tree.unflatten(tree, in_front[1:])
    tree = jax.tree.structure(record.replace(copies=record.copies + 1))
    return mark_p.bind(*in_front, tree=tree), [0] * len(in_front)


batching.primitive_batchers[mark_p] = _batched


def _evaluated(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], list[Record]]:
    """The outputs of a program, and what is marked in it."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    records: list[Record] = []

    def read(atom):
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if eqn.primitive is mark_p:
            records.append(jax.tree.unflatten(eqn.params["tree"], operands[1:]))
            results = operands
        elif not _marks(eqn):
            results = _as_it_is(eqn, operands)
        elif eqn.primitive.name in _EVALUATED:
            results, found = _EVALUATED[eqn.primitive.name](eqn, operands)
            records += found
        else:
            raise InputError(
                f"the model calls a module inside a {eqn.primitive.name}, which activations and moments cannot be "
                "brought out of; allowed are nn.jit, nn.remat, nn.scan and nn.vmap"
            )
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars], records


def _as_it_is(eqn, operands):
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _jit(eqn, operands):
    inner = eqn.params["jaxpr"]
    return jax.jit(lambda *args: _evaluated(inner.jaxpr, inner.consts, args))(*operands)


def _remat(eqn, operands):
    def inner(*args):
        return _evaluated(eqn.params["jaxpr"], (), args)

    return jax.checkpoint(inner, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*operands)


def _scan(eqn, operands):
    inner = eqn.params["jaxpr"]
    consts, carry, xs = scan_operands(eqn, operands)

    def body(carry, xs):
        outputs, records = _evaluated(inner.jaxpr, inner.consts, [*consts, *carry, *xs])
        return outputs[: len(carry)], (outputs[len(carry) :], records)

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carry, (ys, stacked) = jax.lax.scan(body, carry, xs, length, reverse, eqn.params["unroll"])
    steps = reversed(range(length)) if reverse else range(length)
    return [*carry, *ys], [jax.tree.map(lambda x, i=i: x[i], record) for i in steps for record in stacked]


_EVALUATED = {"jit": _jit, "pjit": _jit, "checkpoint": _remat, "remat2": _remat, "scan": _scan}


def _marks(eqn: Any) -> bool:
    """Whether anything is marked in the programs that an equation holds."""
    return any(inner.primitive is mark_p or _marks(inner) for program in programs(eqn.params) for inner in program.eqns)


def scan_operands(eqn: Any, operands: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Those of a scan that are the same in each step, its first carry, and what it has for each step.

    What is for each step has one axis less inside; that tells them apart in every version of JAX, whose names for their
    numbers change.
    """
    (body,) = programs(eqn.params)
    n_xs = sum(x.aval.ndim != a_step.aval.ndim for x, a_step in zip(eqn.invars, body.invars, strict=True))
    n_carry = sum(y.aval.ndim == of_a_step.aval.ndim for y, of_a_step in zip(eqn.outvars, body.outvars, strict=True))
    n_consts = len(operands) - n_carry - n_xs
    return operands[:n_consts], operands[n_consts:][:n_carry], operands[n_consts + n_carry :]


def programs(params: Any) -> list[Any]:
    """The programs among the parameters of an equation."""
    found = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, jex.Jaxpr | jex.ClosedJaxpr))
    return [getattr(x, "jaxpr", x) for x in found if isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)]


def _each(record: Record) -> list[Record]:
    """A record for each index of the axes that vmaps have put in front."""
    if not record.copies:
        return [record]
    size = jax.tree.leaves(record)[0].shape[0]
    inner = record.replace(copies=record.copies - 1)
    return [one for i in range(size) for one in _each(jax.tree.map(lambda x, i=i: x[i], inner))]
