"""The joint step of CIFAR's ResNet-20 beside the same arithmetic in PyTorch.

    python benchmarks/joint_step.py [--batch 16] [--classes 10] [--steps N] [--rounds 5] [--json]

The step is the one that the train loop takes, the baseline that of ``torch_baseline.py`` in the
faster of two memory formats; float32, all cores. Each side runs in a process of its own, in turns.
FLOPs are counted by hand, a multiplication and an addition as two, after the reduction of
up-sampling and convolution to four phases, of whose sixteen products granq_jax takes nine; the peak
is that of a float32 matrix product of 2048 by 2048, the best of both sides, in the same run. Needs
PyTorch: ``pip install -e ".[parity]"``.
"""

import argparse
import json
import statistics
import time

from turns import FORMATS, OURS, beside_pytorch, measure_in_turns


def ours(batch, classes, steps):
    import jax
    import jax.numpy as jnp

    from granq_jax import load_config
    from granq_jax.build import make_trainer
    from granq_jax.devices import halve_cpu
    from granq_jax.joint_run import JointRun

    halve_cpu([batch])
    config = load_config(f"paper/cifar{classes}_w3a3")
    config.batch_size = batch
    trainer = make_trainer(config)
    teacher = jax.jit(trainer.model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    run = JointRun(trainer, teacher, jax.local_devices())
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)

    def step():
        for _ in range(steps):
            run.advance(warmup=False)
        jax.block_until_ready(run.state)

    return _measure(step, steps, lambda: product(square, square).block_until_ready())


def baseline(batch, classes, steps, memory_format):
    import torch
    from torch_baseline import JointStep

    take = JointStep(batch, f"resnet20_cifar{classes}", memory_format)
    square = torch.ones(2048, 2048)

    def step():
        for _ in range(steps):
            take()

    return _measure(step, steps, lambda: square @ square)


def _measure(step, steps, product):
    def measure():
        start = time.perf_counter()
        step()
        seconds = (time.perf_counter() - start) / steps
        return {"seconds": seconds, "peak": max(2 * 2048**3 / _seconds(product) for _ in range(10))}

    return measure


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def count_flops(batch, classes):
    """FLOPs of a joint step by part; element-wise work is left out."""

    def conv(size, taps, inputs, outputs):
        return 2 * size**2 * taps * inputs * outputs

    generator = 2 * 100 * 8 * 8 * 128  # the dense layer
    generator += 4 * conv(8, 4, 128, 128) + 4 * conv(16, 4, 128, 64)  # phases on the small images
    generator += conv(32, 9, 64, 3)
    stem = conv(32, 9, 3, 16)
    network = 6 * conv(32, 9, 16, 16)
    for size, width in ((16, 32), (8, 64)):
        network += conv(size, 9, width // 2, width) + conv(size, 1, width // 2, width) + 5 * conv(size, 9, width, width)
    network += 2 * 64 * classes
    parts = {
        "generator, forward": generator,
        "generator, to parameters": generator,
        "generator, to activations": generator,
        "teacher, forward": network + stem,
        "teacher, to images": network + stem,
        "student, forward": network + stem,
        "student, to images": network + stem,
        "student, to parameters": network + stem,
        "student, to activations": network,
    }
    return {name: batch * flops for name, flops in parts.items()}


def compare(batch, classes, steps, rounds):
    """Measures both sides and returns all figures."""
    results = measure_in_turns(beside_pytorch(ours, baseline, (batch, classes, steps)), rounds)
    seconds = {name: statistics.median(r["seconds"] for r in side["rounds"]) for name, side in results.items()}
    fastest = min(FORMATS, key=seconds.get)
    flops = count_flops(batch, classes)
    peak = max(r["peak"] for side in results.values() for r in side["rounds"])
    return {
        "batch": batch,
        "classes": classes,
        "seconds": seconds[OURS],
        "torch_seconds": seconds[fastest],
        "torch_memory_format": fastest,
        "ratio": seconds[fastest] / seconds[OURS],
        "peak_gflops": peak / 1e9,
        "share_of_peak": sum(flops.values()) / seconds[OURS] / peak,
        "torch_share_of_peak": sum(flops.values()) / seconds[fastest] / peak,
        "peak_rss_gb": results[OURS]["peak_rss_gb"],
        "torch_peak_rss_gb": results[fastest]["peak_rss_gb"],
        "gflop": {name: value / 1e9 for name, value in flops.items()},
        "rounds": {name: [r["seconds"] for r in side["rounds"]] for name, side in results.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, choices=(10, 100), default=10)
    parser.add_argument("--steps", type=int, help="in a round; by default some seconds' worth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = compare(options.batch, options.classes, options.steps or max(3, 320 // options.batch), options.rounds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"batch {figures['batch']}, {figures['classes']} classes, medians of {options.rounds} rounds")
    print(f"granq_jax {figures['seconds']:.4f} s, {figures['share_of_peak']:.0%} of the peak")
    print(
        f"PyTorch   {figures['torch_seconds']:.4f} s, {figures['torch_share_of_peak']:.0%} of the peak"
        f" ({figures['torch_memory_format']})"
    )
    print(f"ratio {figures['ratio']:.2f}")
    print(f"matrix product {figures['peak_gflops']:.0f} GFLOP/s")
    print(f"most memory held: {figures['peak_rss_gb']:.1f} GB, PyTorch {figures['torch_peak_rss_gb']:.1f} GB")
    for name, gflop in figures["gflop"].items():
        print(f"{name:28} {gflop:8.2f} GFLOP")


if __name__ == "__main__":
    main()
