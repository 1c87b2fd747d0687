"""What the first joint step of every config costs at its own batch size: time and memory.

    python benchmarks/first_step.py [CONFIG ...] [--steps 2]

Each config runs in a process of its own, with random weights: what a step costs does not depend on
them. "Temporaries" is what XLA sets aside for the step beside its arguments (state, teacher), and
"peak" the most memory the process ever held, compiling included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from granq_jax.config import config_names

COLUMNS = ("config", "compile s", "first step s", "later steps s", "arguments GB", "temporaries GB", "peak GB")


def measure(name, steps):
    import jax
    import jax.numpy as jnp

    from granq_jax import load_config
    from granq_jax.build import make_trainer
    from granq_jax.joint_run import JointRun
    from granq_jax.models.registry import network
    from granq_jax.record import peak_rss_mb

    config = load_config(name)
    trainer = make_trainer(config)
    info = network(config.network)
    images = jnp.zeros((1, info.image_size, info.image_size, info.channels))
    run = JointRun(trainer, jax.jit(info.model.init)(jax.random.key(0), images), jax.local_devices())
    compiled = run.compiled(warmup=False)
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        jax.block_until_ready(run.advance(warmup=False))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    values = (
        run.compile_seconds,
        seconds[0],
        statistics.median(seconds[1:]),
        memory.argument_size_in_bytes / 1e9,
        memory.temp_size_in_bytes / 1e9,
        peak_rss_mb() / 1e3,
    )
    print(json.dumps([name, *values]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--steps", type=int, default=2, help="steps after the first")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.steps)
        return
    print(" | ".join(COLUMNS))
    for name in options.configs or config_names():
        command = [sys.executable, __file__, "--one", name, "--steps", str(options.steps)]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        name, *values = json.loads(line)
        print(" | ".join([name, *(f"{value:.2f}" for value in values)]), flush=True)


if __name__ == "__main__":
    main()
