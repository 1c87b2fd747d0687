"""What the first joint step of every config costs at its own batch size: time and memory.

    python benchmarks/first_step.py [CONFIG ...] [--steps 2]

Each config runs in two processes, one after the other: cold, and warm, with the programs that the first one
left in the compilation cache. Random weights, drawn by NumPy as if read from a file: what a step costs does not
depend on them. "To first step" is from the start of the process to the end of the first step, imports included; it is
a step in which the student learns, though a run begins with the cheaper ones of the warm-up. "Temporaries" is what
XLA sets aside for the step beside its arguments (state, teacher), and "peak" the most memory the process ever held,
compiling included.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time

COLUMNS = ("compile s", "to first step s", "later steps s", "arguments GB", "temporaries GB", "peak GB")
IN_BOTH = ("to first step s", "peak GB")  # of the warm process only these are printed


def measure(name, steps, cache, started):
    import jax

    from granq_jax import load_config
    from granq_jax.config import make_trainer
    from granq_jax.distill.joint_run import JointRun
    from granq_jax.models.registry import network
    from granq_jax.runs.record import peak_rss_mb
    from granq_jax.runtime.compilation_cache import use_compilation_cache
    from granq_jax.runtime.devices import halve_cpu

    use_compilation_cache(cache)
    config = load_config(name)
    halve_cpu([config.batch_size])
    trainer = make_trainer(config)
    run = JointRun(trainer, random_variables(network(config.network)), jax.local_devices())
    jax.block_until_ready(run.advance(warmup=False))
    to_first_step = time.time() - started
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(run.advance(warmup=False))
        seconds.append(time.perf_counter() - start)
    memory = run.compiled(warmup=False).memory_analysis()
    values = (
        run.compile_seconds,
        to_first_step,
        statistics.median(seconds),
        memory.argument_size_in_bytes / 1e9,
        memory.temp_size_in_bytes / 1e9,
        peak_rss_mb() / 1e3,
    )
    print(json.dumps(dict(zip(COLUMNS, values, strict=True))))


def random_variables(info):
    import jax
    import jax.numpy as jnp
    import numpy as np

    images = jax.ShapeDtypeStruct((1, info.image_size, info.image_size, info.channels), jnp.float32)
    rng = np.random.default_rng(0)

    def draw(leaf):
        if len(leaf.shape) == 1:  # of batch norms, or a bias
            return np.ones(leaf.shape, leaf.dtype)
        return rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(lambda x: info.model.init(jax.random.key(0), x), images))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--steps", type=int, default=2, help="steps after the first")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # what a child process measures
    options = parser.parse_args()
    if options.one:
        name, cache, started = options.one
        return measure(name, options.steps, cache, float(started))

    from granq_jax.config import config_names

    print(" | ".join(["config", *COLUMNS, *(f"warm: {column}" for column in IN_BOTH)]))
    for name in options.configs or config_names():
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (_in_a_process(name, options.steps, cache) for _ in range(2))
        values = [*cold.values(), *(warm[column] for column in IN_BOTH)]
        print(" | ".join([name, *(f"{value:.2f}" for value in values)]), flush=True)


def _in_a_process(name, steps, cache):
    command = [sys.executable, __file__, "--steps", str(steps), "--one", name, cache, str(time.time())]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
