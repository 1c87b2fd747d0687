"""The kernels on a GPU, beside a device copy and XLA's form of the same.

    python benchmarks/gpu_fake_quant.py [--rounds 20] [--csv FILE] [--plot FILE.png] [--tune]

For every activation shape of the networks, in float32 and bfloat16: gigabytes a second that the
kernel achieves if every input is read and every output written once, the same of XLA's form, and of
a copy. The three take turns; each time is of one program that runs a kernel on several arrays, more
than the cache holds. ``--tune`` also tries neighbouring blocks and warps at each shape and keeps the
fastest for this kind of GPU, where ``granq_jax.kernels.tiles`` finds it from then on. ``--plot``
needs matplotlib.
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from granq_jax.kernels import codes, sample_channel, tiles

from granq_jax.gpu_check.kernels import BITS, cases

COLUMNS = ("kernel", "shape", "dtype", "kernel GB/s", "XLA GB/s", "copy GB/s", "kernel / copy", "kernel / XLA")
DTYPES = ("float32", "bfloat16")
BEYOND_THE_CACHE = 512e6
MOST_ARRAYS = 64


def xla_form(case):
    """XLA's form of what the kernel of a case computes, with the same arguments."""
    if case.what == "quantize":
        return lambda x: codes.reference(x, BITS)

    def fused(x, *rest):
        rest = list(rest)
        norm = rest.pop(0) if case.norm else None
        residual = rest.pop(0) if case.residual else None
        return sample_channel.reference(x, BITS, norm=norm, residual=residual, activation=case.activation)

    return fused


def on_arrays(function, arguments):
    """A program of ``function`` on as many arrays as the cache does not hold, and how many these are."""
    x, *rest = arguments
    count = min(MOST_ARRAYS, max(2, int(BEYOND_THE_CACHE / (x.size * x.dtype.itemsize))))
    xs = [jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i in range(count)]
    fixed = [jax.random.normal(jax.random.key(count + i), a.shape, a.dtype) for i, a in enumerate(rest)]
    return jax.jit(lambda xs, fixed: [function(x, *fixed) for x in xs]).lower(xs, fixed).compile(), (xs, fixed), count


def seconds_each(programs, rounds):
    """Median seconds that each program takes for one array; they take turns."""
    times = [[] for _ in programs]
    for round_, (i, (program, arguments, count)) in itertools.product(range(rounds + 2), enumerate(programs)):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        if round_ >= 2:
            times[i].append((time.perf_counter() - start) / count)
    return [statistics.median(t) for t in times]


def measure(case, rounds):
    """A row of the table."""
    kernel, arguments = case.function()
    programs = [
        on_arrays(f, a) for f, a in ((kernel, arguments), (xla_form(case), arguments), (jnp.copy, arguments[:1]))
    ]
    ours, xla, copy = seconds_each(programs, rounds)
    copied = 2 * arguments[0].size * arguments[0].dtype.itemsize
    rates = case.least_bytes / ours / 1e9, case.least_bytes / xla / 1e9, copied / copy / 1e9
    return (case.name, "x".join(map(str, case.shape)), case.dtype, *rates, rates[0] / rates[2], xla / ours)


def tune(case, rounds):
    """The fastest (columns, warps, rows) for the shape of a case, from the table's and its neighbours."""
    samples, pixels, channels = case.array
    written = 1 if case.what == "quantize" else case.itemsize
    key = f"{samples}x{pixels}x{channels}x{case.itemsize}x{written}"
    tiles.tuned().pop(key, None)
    start = case.tiling
    choices = [
        (start.columns * c // 2, start.warps * w // 2, start.rows * 2 // c)
        for c, w in itertools.product((1, 2, 4), (1, 2, 4))
        if start.columns * c >= 2 and 2 <= start.warps * w <= 64 and start.columns * c // 2 <= channels
    ]
    timed = []
    for choice in choices:
        tiles.tuned()[key] = list(choice)
        try:
            program = on_arrays(*case.function())
        except Exception as error:  # a choice that takes more registers or shared memory than there are
            print(f"  {key} {choice}: {type(error).__name__}")
            continue
        timed.append((seconds_each([program], rounds)[0], choice))
    tiles.tuned()[key] = list(min(timed)[1])
    print(f"  {key}: {tiles.tuned()[key]} of {len(timed)} choices")


def keep_tuned():
    """Writes the tuned choices where later programs look for them."""
    path = tiles.tuned_path()
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, jax.devices()[0].device_kind: tiles.tuned()}, indent=1))
    print(f"kept in {path}")


def plot(rows, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 0.16 * len(rows) + 1), layout="constrained")
    for label, column in (("kernel", 3), ("XLA", 4), ("copy", 5)):
        axes.plot([row[column] for row in rows], range(len(rows)), "o", label=label)
    axes.set_yticks(range(len(rows)), [" ".join(row[:3]) for row in rows], fontsize=5)
    axes.set(xlabel="GB/s, of the least that has to be moved", xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"no GPU: JAX sees a {device.platform} only, on which these kernels do not run", file=sys.stderr)
        return 2
    chosen = [case for case in cases() if case.what != "weight" and case.dtype in DTYPES]
    if options.tune:
        for case in chosen:
            if case.what == "quantize" or not (case.norm or case.activation):
                tune(case, options.rounds)
        keep_tuned()
    rows = []
    print(device.device_kind)
    print(" | ".join(COLUMNS))
    for case in chosen:
        rows.append(measure(case, options.rounds))
        print(" | ".join(v if isinstance(v, str) else f"{v:.2f}" for v in rows[-1]), flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
