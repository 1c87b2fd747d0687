"""How far joint steps on 2, 4 and 8 devices, and on those of two processes, are from the same steps on one.

    python benchmarks/device_agreement.py

Trains twenty steps, warm-up and joint, on virtual CPU devices and prints for each number of devices
the greatest relative difference of each loss term from one device's: float64 shows whether the
arithmetic is the same, float32 what rounding makes of it, since a value near a rounding boundary may
fall on the other level. The last row of each is two processes of two devices each.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys

DEVICES = (1, 2, 4, 8)
PROCESSES, DEVICES_EACH = 2, 2
os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(max(DEVICES)))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from granq_jax import Generator, OptimizerSettings, QuantSpec, Trainer
from granq_jax.config import default_config
from granq_jax.distill.joint_run import JointRun
from granq_jax.models.registry import network
from granq_jax.runs.metrics import LOSSES
from granq_jax.runtime.processes import join
from granq_jax.teachers.load import load_teacher


def teacher_of(name):
    """The trained teacher that comes with the package, or else fresh variables that behave like one."""
    config = default_config()
    config.network = name
    try:
        return load_teacher(config, pathlib.Path())
    except ValueError:
        info = network(name)
    images = jnp.zeros((1, info.image_size, info.image_size, info.channels))
    teacher = jax.jit(info.model.init)(jax.random.key(1), images)
    # Fresh batch norms are identities. Under per-tensor ranges, activations are then integer
    # multiples of one number and often lie exactly between two levels, where rounding decides.
    rng = np.random.default_rng(1)
    shift = {1: 0.1, 2: 0.0, 4: 0.0}  # by rank: of vectors only
    teacher = jax.tree.map(lambda leaf: leaf + shift[leaf.ndim] * rng.random(leaf.shape), teacher)
    # A fresh head gives logits near zero, which all but agree: the hinge then divides by almost nothing.
    teacher["params"]["head"]["kernel"] *= 10
    return teacher


def losses_of_run(name, granularity, dtype, steps, devices):
    """Losses (steps, terms) of a run whose first half is warm-up."""
    info = network(name)
    trainer = Trainer(
        model=info.model,
        generator=Generator(info.classes, info.image_size, info.channels),
        spec=QuantSpec(act_granularity=granularity),
        optimizers=OptimizerSettings(student_lr=1e-3),
        batch_size=16,
        dtype=dtype,
    )
    teacher = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), teacher_of(name))
    run = JointRun(trainer, teacher, devices)
    rows = [jax.device_get(run.advance(warmup=step < steps // 2)) for step in range(steps)]
    return np.array([[row[term] for term in LOSSES] for row in rows], np.float64)


def losses_of_processes(name, granularity, dtype, steps):
    """The same from ``PROCESSES`` processes of ``DEVICES_EACH`` devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--network", name, "--granularity", granularity, "--dtypes", str(dtype)]
    command += ["--steps", str(steps), "--coordinator-address", address, "--process-id"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(DEVICES_EACH)}
    running = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"exit statuses {[process.returncode for process in running]}")
    # Gloo, which carries the collectives, prints to stdout as well.
    first, *others = [output.splitlines()[-1] for output in outputs]
    assert all(other == first for other in others), "each process sees the losses of the whole batch"
    return np.array(json.loads(first))


def measure(name, granularity, steps, dtypes):
    """{dtype: {devices: [greatest relative difference of each term of LOSSES]}}."""
    table = {}
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            runs = {
                str(count): losses_of_run(name, granularity, jnp.dtype(dtype), steps, jax.devices()[:count])
                for count in DEVICES
            }
        one = runs.pop("1")
        runs[f"{PROCESSES} x {DEVICES_EACH}"] = losses_of_processes(name, granularity, dtype, steps)
        table[dtype] = {
            devices: (np.abs(run - one) / np.maximum(np.abs(one), 1e-30)).max(axis=0).tolist()
            for devices, run in runs.items()
        }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet20_cifar10")
    parser.add_argument("--granularity", default="sample_channel")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--coordinator-address", help=argparse.SUPPRESS)  # of one of the processes
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.coordinator_address:
        join(options.coordinator_address, PROCESSES, options.process_id)
        (dtype,) = options.dtypes
        with jax.enable_x64(dtype == "float64"):
            run = losses_of_run(options.network, options.granularity, jnp.dtype(dtype), options.steps, jax.devices())
        print(json.dumps(run.tolist()))
        return
    table = measure(options.network, options.granularity, options.steps, options.dtypes)
    if options.json:
        json.dump(table, sys.stdout)
        return
    print(f"{options.network}, {options.granularity}, batch 16, {options.steps} steps: difference from one device")
    print(f"| dtype | devices | {' | '.join(LOSSES)} |")
    print("| --- " * (len(LOSSES) + 2) + "|")
    for dtype, rows in table.items():
        for count, terms in rows.items():
            print(f"| {dtype} | {count} | " + " | ".join(f"{term:.1e}" for term in terms) + " |")


if __name__ == "__main__":
    main()
