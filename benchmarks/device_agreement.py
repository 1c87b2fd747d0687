"""How far joint steps on 2, 4 and 8 devices are from the same steps on one.

    python benchmarks/device_agreement.py

Trains ten steps, warm-up and joint, on virtual CPU devices and prints for each number of devices the
greatest relative difference of each loss term from one device's: float64 shows whether the
arithmetic is the same, float32 what rounding makes of it, since a value near a rounding boundary may
fall on the other level.
"""

import argparse
import json
import os
import sys

DEVICES = (1, 2, 4, 8)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(DEVICES)}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from granq_jax import Generator, OptimizerSettings, QuantSpec, Trainer
from granq_jax.joint_run import JointRun
from granq_jax.metrics import LOSSES
from granq_jax.models.registry import network


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
    images = jnp.zeros((1, info.image_size, info.image_size, info.channels), dtype)
    teacher = jax.jit(info.model.init)(jax.random.key(1), images)
    # Fresh batch norms are identities. Under per-tensor ranges, activations are then integer
    # multiples of one number and often lie exactly between two levels, where rounding decides.
    rng = np.random.default_rng(1)
    shift = {1: 0.1, 2: 0.0, 4: 0.0}  # by rank: of vectors only
    teacher = jax.tree.map(lambda leaf: (leaf + shift[leaf.ndim] * rng.random(leaf.shape)).astype(dtype), teacher)
    # A fresh head gives logits near zero, which all but agree: the hinge then divides by almost nothing.
    teacher["params"]["head"]["kernel"] *= 10
    run = JointRun(trainer, teacher, devices)
    rows = [jax.device_get(run.advance(warmup=step < steps // 2)) for step in range(steps)]
    return np.array([[row[term] for term in LOSSES] for row in rows], np.float64)


def measure(name="resnet20_cifar10", granularity="sample_channel", steps=10, dtypes=("float64", "float32")):
    """{dtype: {devices: [greatest relative difference of each term of LOSSES]}}."""
    table = {}
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            runs = {
                count: losses_of_run(name, granularity, jnp.dtype(dtype), steps, jax.devices()[:count])
                for count in DEVICES
            }
        difference = {n: np.abs(run - runs[1]) / np.maximum(np.abs(runs[1]), 1e-30) for n, run in runs.items()}
        table[dtype] = {n: d.max(axis=0).tolist() for n, d in difference.items() if n > 1}
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet20_cifar10")
    parser.add_argument("--granularity", default="sample_channel")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
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
