"""Part b: whether the kernels compute on the device what they should, and the package what PyTorch's figures say."""

from __future__ import annotations

import itertools
import sys
import tempfile
from functools import partial
from pathlib import Path

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import Compiler, Context, named, random_arrays, reason

from granq_jax import QuantSpec, create_model, load_config, load_torch, quantize
from granq_jax.models.registry import network
from granq_jax.quant.fake_quant import FrozenNorm, norm_act_fake_quant
from granq_jax.teachers.load import load_teacher
from tools.gpu_check.kernels import BITS

ROOT = Path(__file__).parents[1]
NETWORKS = ("resnet20_cifar10", "resnet18", "resnet20_cifar100", "mobilenetv2_w1", "resnet50")
# A value that lies between two codes to within rounding may get either; no other may differ.
MOST_OTHER_CODES = 1e-4
# Of Euclidean norms: where rounding puts a number on the other side of an activation's kink, an element differs wholly.
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
GOLDEN_TOLERANCE = 1e-8
COLUMNS = ("what", "shape", "dtype", "elements", "other_codes", "worst_in_steps", "not_finite_differs", "passed")


def run(context: Context) -> None:
    """Writes ``correctness.csv``."""
    table = context.table("correctness", *COLUMNS)
    parts = (_kernels, _agreement, _golden, _gradients, _rest)
    for part in parts:
        if context.left < 5:
            print(f"left out: {part.__name__.strip('_')}", flush=True)
            continue
        part(context, table)


def _chosen(context):
    """The cases in two halves: those without which the rest says little, and all others."""
    first, rest = [], []
    for case in [*gpu_cases.in_order(), *gpu_cases.ragged()]:
        ragged = case.shape in gpu_cases.RAGGED
        important = case.what != "weight" and (case.dtype != "float16" or ragged)
        (first if important else rest).append(case)
    if context.rehearsal:
        first = gpu_cases.of_each_kind(first) + [c for c in first if c.shape == gpu_cases.RAGGED[0]][:4]
        rest = gpu_cases.of_each_kind(rest)
    return first, rest


def _kernels(context, table):
    _check(_chosen(context)[0], context, table)


def _rest(context, table):
    _check(_chosen(context)[1], context, table)


def _check(chosen, context, table):
    """In batches, so that the next compiles while one runs."""
    compiler, size = Compiler(), 24
    batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    ahead: list = []
    for batch in [*batches, None]:
        if batch is not None and context.left > 5:
            ahead.append([_compiled(case, context, compiler) for case in batch])
        elif batch is not None:
            print(
                f"left out: {len(batch)} kernels from {batch[0].name} {batch[0].shape} {batch[0].dtype} on", flush=True
            )
        if len(ahead) > 1 or (ahead and batch is None):
            for case, kernel, judge in ahead.pop(0):
                _check_one(case, kernel, judge, table)
    compiler.close()


def _compiled(case, context, compiler):
    arguments = case.function()[1]
    kernel = compiler(named("kernel", gpu_cases.kernel(case, context.rehearsal)), *arguments)
    outputs = jax.eval_shape(gpu_cases.xla_form(case), *arguments)
    with jax.enable_x64(True):
        judge = compiler(jax.jit(partial(judged, case)), outputs, *arguments)
    return case, kernel, judge


def _check_one(case, kernel, judge, table):
    row = {"what": case.name, "shape": "x".join(map(str, case.shape)), "dtype": case.dtype}
    try:
        values = [jax.device_put(value) for value in inputs(case)]
        outputs = kernel.result()(*values)
        other, worst, not_finite_differs = (float(v) for v in judge.result()(outputs, *values))
        _add(table, row, values[0].size, other, worst, not_finite_differs)
    except Exception as error:
        table.add(**row, passed=False, error=reason(error))


def _add(table, row, elements, other, worst, not_finite_differs=0.0):
    passed = other <= max(2, MOST_OTHER_CODES * elements) and worst <= 1.01 and not not_finite_differs
    table.add(
        **row,
        elements=elements,
        other_codes=other,
        worst_in_steps=worst,
        not_finite_differs=not_finite_differs,
        passed=passed,
    )


def inputs(case):
    """Random ones, of which channels of the first sample are constant, hold a NaN, and an infinity."""
    arguments = case.function()[1]
    values = [random_arrays(a.shape, a.dtype, 1, seed)[0].copy() for seed, a in enumerate(arguments)]
    _, pixels, channels = case.array
    for value in values:
        if value.ndim == 2 and case.norm and value.shape == (2, channels):
            value[0] = 1 + 0.25 * value[0]  # a scale is hardly ever 0
        elif channels >= 4 and pixels >= 2:
            view = value.reshape(case.array)
            view[0, :, 0] = 0.7
    if channels >= 4 and pixels >= 2:
        view = values[0].reshape(case.array)
        view[0, pixels // 2, 1], view[0, pixels // 2, 2] = np.nan, np.inf
    return values


def judged(case, outputs, x, *rest):
    """How a kernel's outputs differ from the formula in float64.

    Returns:
      How many elements have another code, the greatest difference in steps beyond what the dtype rounds, and how
      many are NaN on one side only.
    """
    rest, v = list(rest), x.astype(jnp.float64).reshape(case.array)
    if case.norm:
        factor, shift = rest.pop(0).astype(jnp.float64)
        v = v * factor[None, None, :] + shift[None, None, :]
    if case.residual:
        v = v + rest.pop(0).astype(jnp.float64).reshape(case.array)
    if case.activation:
        v = jnp.where(v <= 0, 0.0, v)
    if case.activation == "relu6":
        v = jnp.where(v >= 6, 6.0, v)
    if case.what == "quantize":
        codes, scale, zero = outputs
        scale, zero = (number.reshape(case.array[0], 1, -1).astype(jnp.float64) for number in (scale, zero))
        y, epsilon = (codes.reshape(case.array).astype(jnp.float64) + zero) / scale, jnp.finfo(jnp.float32).eps
    else:
        y, epsilon = outputs.reshape(case.array).astype(jnp.float64), jnp.finfo(outputs.dtype).eps
    want, step = formula(v)
    difference = jnp.abs(y - want) - 4 * float(epsilon) * jnp.abs(want)
    # Codes of a channel of infinite range stand for no number, NaN or infinity.
    known, wanted = jnp.isfinite(y), jnp.isfinite(want)
    difference = jnp.where(known & wanted, difference, 0.0) / step
    return jnp.sum(difference > 0.01), jnp.max(difference), jnp.sum(known != wanted)


def formula(v):
    """The quantizer as its definition has it, with ranges over the middle axis; also what a code is worth."""
    half = 2 ** (BITS - 1)
    low, high = v.min(1, keepdims=True), v.max(1, keepdims=True)
    scale = (2**BITS - 1) / jnp.maximum(high - low, 1e-8)
    zero = jnp.round(scale * low) + half
    codes = jnp.clip(jnp.round(scale * v - zero), -half, half - 1)
    return (codes + zero) / scale, jnp.where(jnp.isfinite(scale) & (scale > 0), 1 / scale, 1.0)


def _gradients(context, table):
    """Of ``norm_act_fake_quant`` as networks call it, beside those of what comes before the quantizer, in float64."""
    compiler = Compiler()
    chosen = [c for c in gpu_cases.in_order() if c.norm and c.dtype == "float32"]
    chosen += [c for c in gpu_cases.ragged() if c.norm]
    if context.rehearsal:
        chosen = [*gpu_cases.of_each_kind(chosen)[:2], chosen[-1]]
    impl = "pallas_interpret" if context.rehearsal else "auto"
    waiting = []
    for case in chosen if context.left > 5 else []:
        x, norm, *residual = case.function()[1]
        arguments = (x, norm, x, *residual)
        ours = compiler(jax.jit(partial(_gradient, case, impl)), *arguments)
        with jax.enable_x64(True):
            wide = [jax.ShapeDtypeStruct(a.shape, jnp.float64) for a in arguments]
            exact = compiler(jax.jit(partial(_gradient, case, None)), *wide)
        waiting.append((case, arguments, ours, exact))
    for case, arguments, ours, exact in waiting:
        row = {"what": f"gradient of {case.name}", "shape": "x".join(map(str, case.shape)), "dtype": case.dtype}
        try:
            if context.left < 3:
                break
            values = [random_arrays(a.shape, a.dtype, 1, seed)[0] for seed, a in enumerate(arguments)]
            found = jax.device_get(ours.result()(*values))
            with jax.enable_x64(True):
                wanted = jax.device_get(exact.result()(*(np.asarray(value, np.float64) for value in values)))
            worst = max(
                float(np.linalg.norm(np.asarray(f, np.float64) - w) / np.linalg.norm(w))
                for f, w in zip(found, wanted, strict=True)
            )
            passed = worst <= GRADIENT_TOLERANCE[case.dtype]
            table.add(**row, elements=values[0].size, worst_in_steps=worst, passed=passed)
        except Exception as error:
            table.add(**row, passed=False, error=reason(error))
    compiler.close()


def _gradient(case, impl, x, norm, cotangent, *residual):
    """Gradients to x, the norm's factor and shift, and the residual; the quantizer's own is the identity."""

    def function(x, norm, *residual):
        pair = FrozenNorm(jnp.zeros_like(norm[0]), norm[0], norm[1])
        rest = {"residual": residual[0] if residual else None, "activation": case.activation}
        if impl is not None:
            return norm_act_fake_quant(x, bits=BITS, norm=pair, impl=impl, **rest)
        spread = tuple(range(x.ndim - 1))
        v = x * jnp.expand_dims(pair.factor, spread) + jnp.expand_dims(pair.bias, spread)
        v = v + residual[0] if residual else v
        return jnp.clip(v, 0, 6 if case.activation == "relu6" else None)

    to_x, to_norm, *to_residual = jax.vjp(function, x, norm, *residual)[1](cotangent)
    return (to_x, *to_norm, *to_residual)


def _agreement(context, table):
    """Activations and logits of students: kernels, XLA's form, and XLA's in float64, code by code."""
    compiler, waiting = Compiler(), []
    for name in NETWORKS[:1] if context.rehearsal else NETWORKS:
        info, model = network(name), create_model(name)
        count = 2 if context.rehearsal else 64 if info.image_size == 32 else 4
        images = random_arrays((count, info.image_size, info.image_size, info.channels), np.float32, 1)[0]
        variables = _teacher(name, model, images)
        sides = {}
        for side in ("kernels", "XLA", "float64"):
            impl = {"kernels": "pallas_interpret" if context.rehearsal else "auto"}.get(side, "xla")
            apply = jax.jit(partial(quantize(model, QuantSpec(), impl=impl).apply_with_activations, train=False))
            dtype = np.float64 if side == "float64" else np.float32
            values = jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf, dtype), (dict(variables), images))
            with jax.enable_x64(side == "float64"), jax.default_matmul_precision("highest"):
                sides[side] = compiler(apply, *values), values
        waiting.append((name, sides))
    for name, sides in waiting:
        if context.left < 5:
            break
        try:
            outputs = {}
            for side, (future, values) in sides.items():
                with jax.enable_x64(side == "float64"):
                    outputs[side] = jax.device_get(future.result()(*values))
            for one, other in itertools.combinations(outputs, 2):
                _compare(table, name, one, other, outputs[one], outputs[other])
        except Exception as error:
            table.add(what=f"{name} W3A3", passed=False, error=reason(error))
    compiler.close()


def _teacher(name, model, images):
    """The teacher that comes with the package, or else random weights."""
    config = load_config("paper/cifar10_w3a3")
    if name == config.network:
        with tempfile.TemporaryDirectory() as workdir:
            return load_teacher(config, Path(workdir))
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), images[:1]))


def _compare(table, name, one, other, outputs, references):
    """Activations count as different by more than half a step; what differs early makes more differ later."""
    (logits, maps), (reference_logits, reference_maps) = outputs, references
    different = elements = 0
    first = 0.0
    for index, (a, b) in enumerate(zip(maps, reference_maps, strict=True)):
        axes = tuple(range(1, b.ndim - 1))
        step = (b.max(axes, keepdims=True) - b.min(axes, keepdims=True)) / (2**BITS - 1)
        count = int((np.abs(a - b) > 0.5 * step + 1e-12).sum())
        first = count / a.size if index == 0 else first
        different, elements = different + count, elements + a.size
    same_class = float((logits.argmax(-1) == reference_logits.argmax(-1)).mean())
    what = f"{name} W3A3, {one} and {other}: codes that differ ({first:.2g} of the first activation)"
    table.add(
        what=f"{what}, same class {same_class:.0%}",
        elements=elements,
        other_codes=different,
        passed=first <= MOST_OTHER_CODES,
    )


def _golden(context, table):
    """The figures of the authors' PyTorch code, in float64, which XLA computes without kernels."""
    try:
        sys.path.insert(0, str(ROOT))
        from tests import golden_figures as golden
    except (ImportError, FileNotFoundError) as error:
        print(f"golden figures: not there ({reason(error)})")
        return
    compiler, waiting = Compiler(), []
    for name in NETWORKS[:1] if context.rehearsal else NETWORKS:
        figures = next(f for f in (golden.CIFAR, golden.IMAGENET) if f"net/{name}/fp" in f)
        for kind in ("fp", "w3a3"):
            with jax.enable_x64(True):
                variables, model = load_torch(name, golden.state_dict(figures[f"net/{name}/keys"])), create_model(name)
                apply = model.apply
                if kind != "fp":
                    apply = quantize(model, QuantSpec(weight_bits=3, act_bits=3, weight_granularity="kernel")).apply
                values = jax.device_get((variables, golden.network_images(name)))
                future = compiler(jax.jit(partial(apply, train=False)), *values)
            waiting.append((name, kind, figures[f"net/{name}/{kind}"], values, future))
    for name, kind, want, values, future in waiting:
        row = {"what": f"golden {name} {kind}", "dtype": "float64"}
        if context.left < 5:
            break
        try:
            with jax.enable_x64(True):
                logits = np.asarray(future.result()(*values))
            worst = float(np.abs(logits - want).max() / np.abs(want).max())
            table.add(**row, elements=want.size, worst_in_steps=worst, passed=worst <= GOLDEN_TOLERANCE)
        except Exception as error:
            table.add(**row, passed=False, error=reason(error))
    compiler.close()
