"""Part a: what the machine is, and what it reaches: copies, matrix products and convolutions."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess

import jax
import jax.numpy as jnp
from gpu_common import Compiler, Context, Program, named, reason, rotation, timed

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "triton", "jax-cuda13-plugin", "jax-cuda12-plugin")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
SIZES = (2**20, 2**22, 2**24, 2**26, 2**28)  # float32 elements
PRECISIONS = (
    *(("float32", "highest"), ("float32", "tensorfloat32"), ("float32", "default"), ("float32", "bfloat16")),
    ("bfloat16", "default"),
)


def run(context: Context) -> None:
    """Writes ``machine.csv``."""
    table = context.table("machine", "what", "value", "unit", "clock")
    table.add(what="Python", value=platform.python_version())
    for package in PACKAGES:
        try:
            table.add(what=package, value=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    table.add(what="device", value=jax.devices()[0].device_kind)
    table.add(what="cores", value=os.cpu_count())
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        ).stdout
        for what, value in zip(QUERY.split(","), answer.splitlines()[0].split(", "), strict=True):
            table.add(what=what, value=value)
    except Exception as error:
        table.add(what="nvidia-smi", error=reason(error))

    compiler = Compiler()
    for size in SIZES[:1] if context.rehearsal else SIZES:
        shape = jax.ShapeDtypeStruct((size,), jnp.float32)
        try:
            moved = 8 * size
            kinds = {"copy": jnp.copy, "elementwise": lambda x: -x}
            programs = [
                Program(f"{kind}_{size}", compiler(named(f"{kind}_{size}", f), shape).result(), arguments)
                for arguments in [rotation([shape], moved, context.rehearsal)]
                for kind, f in kinds.items()
            ]
            for name, timing in timed(programs, 3 if context.rehearsal else 20).items():
                what = f"{name.split('_')[0]} of {moved / 2e6:.0f} MB"
                table.add(what=what, value=moved / timing.seconds / 1e9, unit="GB/s", clock=timing.clock)
        except Exception as error:
            table.add(what=f"copy of {4 * size / 1e6:.0f} MB", error=reason(error))

    n = 256 if context.rehearsal else 8192
    small = 4 if context.rehearsal else 64
    shapes = {
        "matrix product": ((n, n), (n, n)),
        "convolution": ((small, 28, 28, 4 * small), (3, 3, 4 * small, 4 * small)),
    }
    for kind, (left, right) in shapes.items():
        for dtype, precision in PRECISIONS:
            what = f"{kind}, {dtype} at {precision}"
            try:
                arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in (left, right)]
                name = f"{kind}_{dtype}_{precision}".replace(" ", "_")
                with jax.default_matmul_precision(precision):
                    program = compiler(
                        named(name, jnp.dot if kind == "matrix product" else _convolve), *arguments
                    ).result()
                values = rotation(arguments, 2**27, context.rehearsal)
                timing = timed([Program(name, program, values)], 3 if context.rehearsal else 10)[name]
                # Every number of the result takes as many products as the right side has rows.
                flops = 2 * math.prod(left[:-1]) * math.prod(right)
                table.add(what=what, value=flops / timing.seconds / 1e12, unit="TFLOP/s", clock=timing.clock)
            except Exception as error:
                table.add(what=what, error=reason(error))
    compiler.close()


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
