"""Part c: what bandwidth each kernel reaches at each shape, beside a copy of the same array and XLA's form.

Bytes are what has to be moved at least, every input read and every output written once; times are the device's own.
"""

from __future__ import annotations

import itertools
import json
import math

import gpu_cases
import jax
import jax.numpy as jnp
from gpu_common import Compiler, Context, Program, named, reason, rotation, timed
from granq_jax.kernels import tiles

COLUMNS = (
    *("kernel", "shape", "dtype", "megabytes", "block", "us", "xla_us", "copy_us", "gb_s", "xla_gb_s", "copy_gb_s"),
    *("of_copy", "xla_over_kernel", "xla_launches", "clock", "copy_clock"),
)
RUNS = 24
BATCH = 8  # cases that are compiled and timed together


def run(context: Context) -> None:
    """Writes ``bandwidth.csv``, and with ``--tune`` the choices of blocks, ``tiles.json`` too."""
    chosen = gpu_cases.in_order()
    if context.rehearsal:
        chosen = gpu_cases.of_each_kind(chosen)
    else:
        chosen = [case for case in chosen if case.dtype != "float16"]
    if context.options.tune:
        tune(chosen, context)
    table = context.table("bandwidth", *COLUMNS)
    compiler, ahead = Compiler(), []
    for batch in _batched(chosen, BATCH):
        if context.left > 10:
            ahead.append([(case, _compiled(case, context, compiler)) for case in batch])
        else:
            print(f"left out: {len(batch)} cases from {batch[0].name} {batch[0].shape} {batch[0].dtype} on", flush=True)
        if len(ahead) > 2:
            _measure(ahead.pop(0), context, table)
    for batch in ahead:
        _measure(batch, context, table)
    compiler.close()


def _batched(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def _compiled(case, context, compiler):
    arguments = case.function()[1]
    name = f"{case.what}_{abs(hash(case))}"
    forms = {
        f"kernel_{name}": (gpu_cases.kernel(case, context.rehearsal), arguments),
        f"xla_{name}": (gpu_cases.xla_form(case), arguments),
        f"copy_{name}": (jnp.copy, arguments[:1]),
        f"negative_{name}": (jnp.negative, arguments[:1]),  # as much moved, by a kernel
    }
    return {key: compiler(named(key, function), *of) for key, (function, of) in forms.items()}


def _measure(batch, context, table):
    """Times the cases of a batch in one trace; if that fails, each by itself, so that the fault is one row's."""
    if context.left < 3:
        print(f"left out: {len(batch)} cases from {batch[0][0].name} {batch[0][0].shape} on", flush=True)
        return
    try:
        rows = _rows(batch, context)
    except Exception:
        rows = []
        for case in batch:
            try:
                rows += _rows([case], context)
            except Exception as error:
                rows.append({**_named(case[0]), "error": reason(error)})
    for row in rows:
        table.add(**row)


def _named(case):
    tiling = case.tiling
    block = f"{tiling.columns} x {tiling.threads}" + (f" x {tiling.rows}" if tiling.rows else "")
    shape = "x".join(map(str, case.shape))
    return {
        "kernel": case.name,
        "shape": shape,
        "dtype": case.dtype,
        "megabytes": math.prod(case.shape) * case.itemsize / 1e6,
        "block": block,
    }


def _rows(batch, context):
    programs = []
    for case, futures in batch:
        arguments = rotation(case.function()[1], case.least_bytes, context.rehearsal)
        for key, future in futures.items():
            whole = key.startswith(("kernel", "xla"))
            programs.append(Program(key, future.result(), arguments if whole else [a[:1] for a in arguments]))
    timings = list(timed(programs, 2 if context.rehearsal else RUNS).values())
    rows = []
    for (case, _), (ours, xla, *copies) in zip(batch, _batched(timings, 4), strict=True):
        copy = min(copies, key=lambda timing: (timing.clock, timing.seconds))  # "device" comes before "host"
        copied = 2 * math.prod(case.shape) * case.itemsize
        rates = [case.least_bytes / ours.seconds, case.least_bytes / xla.seconds, copied / copy.seconds]
        rows.append(
            {
                **_named(case),
                **{f"{of}us": 1e6 * t.seconds for of, t in (("", ours), ("xla_", xla), ("copy_", copy))},
                **{f"{of}gb_s": rate / 1e9 for of, rate in zip(("", "xla_", "copy_"), rates, strict=True)},
                "of_copy": rates[0] / rates[2],
                "xla_over_kernel": xla.seconds / ours.seconds,
                "xla_launches": xla.launches,
                "clock": ours.clock,
                "copy_clock": copy.clock,
            }
        )
    return rows


def tune(chosen, context):
    """Tries neighbouring blocks at each shape, keeps the fastest for this kind of GPU, and writes them down."""
    table = context.table("tuning", "shape", "columns", "warps", "rows", "us", "kept")
    compiler, spare = Compiler(), context.left / 2
    for case in chosen:
        # One kernel of each array: those with a norm or an activation have the same blocks.
        if case.what == "weight" or case.norm or case.activation or context.left < spare:
            continue
        samples, pixels, channels = case.array
        written = 1 if case.what == "quantize" else case.itemsize
        key = f"{samples}x{pixels}x{channels}x{case.itemsize}x{written}"
        tiles.tuned().pop(key, None)
        start, programs = case.tiling, {}
        arguments = rotation(case.function()[1], case.least_bytes, context.rehearsal)
        for choice in _neighbours(start, channels):
            tiles.tuned()[key] = list(choice)
            name = f"{case.what}_{key}_{'_'.join(map(str, choice))}"
            programs[choice] = name, compiler(named(name, gpu_cases.kernel(case, context.rehearsal)), *arguments[0])
        compiled = []
        for choice, (name, future) in programs.items():
            try:
                compiled.append((choice, Program(name, future.result(), arguments)))
            except Exception as error:  # it takes more registers or shared memory than there are
                table.add(shape=key, columns=choice[0], warps=choice[1], rows=choice[2], error=reason(error))
        tiles.tuned().pop(key)
        timings = timed([program for _, program in compiled], 2 if context.rehearsal else RUNS)
        best = min(compiled, key=lambda pair: timings[pair[1].name].seconds)[0]
        for (columns, warps, rows), program in compiled:
            us, kept = 1e6 * timings[program.name].seconds, (columns, warps, rows) == best
            table.add(shape=key, columns=columns, warps=warps, rows=rows, us=us, kept=kept)
        tiles.tuned()[key] = list(best)
    compiler.close()
    path = tiles.tuned_path()
    known = json.loads(path.read_text()) if path.is_file() else {}
    text = json.dumps({**known, jax.devices()[0].device_kind: tiles.tuned()}, indent=1)
    (context.out / tiles.TUNED_FILE).write_text(text)
    if not context.rehearsal:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _neighbours(start, channels):
    """Half and twice the columns and the warps of the table's choice, itself among them."""
    return [
        (start.columns * c // 2, start.warps * w // 2, start.rows * 2 // c)
        for c, w in itertools.product((1, 2, 4), (1, 2, 4))
        if start.columns * c >= 2 and 2 <= start.warps * w <= 64 and start.columns * c // 2 <= channels
    ]
