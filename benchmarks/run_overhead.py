"""What metrics, looks at the state, checkpoints and the report add to the time of a run.

    python benchmarks/run_overhead.py [--steps 500] [--rounds 2]

CIFAR-10 at batch 16 without real images: the bare loop, which takes the same steps and writes nothing, and whole runs
with one look at the end and with looks and checkpoints at two fifths, four fifths and the end. Each is a process of
its own, one after the other, nothing compiled before; seconds of the whole process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPOCHS = 5
WAYS = {"bare loop": None, "whole run, one look": EPOCHS, "three looks and checkpoints": 2}


def take(steps, every):
    """Takes the steps; ``every`` is that of looks and checkpoints in epochs, ``None`` for the bare loop."""
    import jax

    from granq_jax import load_config, train_and_evaluate
    from granq_jax.build import make_trainer
    from granq_jax.devices import halve_cpu
    from granq_jax.joint_run import JointRun
    from granq_jax.teachers import load_teacher

    config = load_config("cifar10_w3a3")
    config.eval, config.epochs, config.warmup_epochs, config.steps_per_epoch = "none", EPOCHS, 1, steps // EPOCHS
    halve_cpu([config.batch_size])
    with tempfile.TemporaryDirectory() as workdir:
        if every is not None:
            config.eval_every_epochs = config.checkpoint_every_epochs = every
            train_and_evaluate(config, workdir)
            return
        run = JointRun(make_trainer(config), load_teacher(config, Path(workdir)), jax.devices())
        for step in range(steps):
            run.advance(warmup=step < config.steps_per_epoch)
            if run.step % config.log_every_steps == 0:
                run.check()
        jax.block_until_ready(run.state)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help=f"a multiple of {EPOCHS}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--take", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take is not None:
        return take(options.steps, WAYS[options.take])
    print(" | ".join(WAYS))
    for _ in range(options.rounds):
        seconds = []
        for way in WAYS:
            command = [sys.executable, __file__, f"--steps={options.steps}", f"--take={way}"]
            start = time.perf_counter()
            subprocess.run(
                command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
            )
            seconds.append(time.perf_counter() - start)
        print(" | ".join(f"{s:.1f}" for s in seconds), flush=True)


if __name__ == "__main__":
    main()
