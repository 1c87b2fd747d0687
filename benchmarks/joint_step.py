"""The joint step of a network beside the same arithmetic in PyTorch.

    python benchmarks/joint_step.py [--network resnet20_cifar10] [--batch 16] [--steps N] [--rounds 5] [--json]

The step is the one that the train loop takes, with the settings of the network's W3A3 config, the baseline that of
``torch_baseline.py`` in the faster of two memory formats; float32, all cores, random weights. Each side runs in a
process of its own, in turns. FLOPs are counted from shapes, a multiplication and an addition as two, after the
reduction of up-sampling and convolution to four phases, of whose sixteen products granq_jax takes nine; the peak is
that of a float32 matrix product of 2048 by 2048, the best of both sides, in the same run. Needs PyTorch: ``pip
install -e ".[parity]"``.
"""

import argparse
import json
import math
import statistics
import time

from turns import FORMATS, OURS, beside_pytorch, measure_in_turns

CONFIGS = {
    "resnet20_cifar10": "paper/cifar10_w3a3",
    "resnet20_cifar100": "paper/cifar100_w3a3",
    "resnet18": "paper/imagenet_resnet18_w3a3",
    "resnet50": "paper/imagenet_resnet50_w3a3",
    "mobilenetv2_w1": "paper/imagenet_mobilenetv2_w3a3",
}


def joint_run(network, batch, impl="auto", precision="default"):
    """Joint steps of a network with random weights, on all devices."""
    import jax
    import jax.numpy as jnp

    from granq_jax import load_config
    from granq_jax.config import make_trainer
    from granq_jax.distill.joint_run import JointRun

    config = load_config(CONFIGS[network])
    config.batch_size, config.quant.impl, config.precision = batch, impl, precision
    trainer = make_trainer(config)
    images = jnp.zeros((1, trainer.generator.image_size, trainer.generator.image_size, trainer.generator.channels))
    teacher = jax.jit(trainer.model.init)(jax.random.key(0), images)
    return JointRun(trainer, teacher, jax.local_devices())


def ours(network, batch, steps):
    import jax
    import jax.numpy as jnp

    from granq_jax.runtime.devices import halve_cpu

    halve_cpu([batch])
    run = joint_run(network, batch)
    square = jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)

    def step():
        for _ in range(steps):
            run.advance(warmup=False)
        jax.block_until_ready(run.state)

    return _measure(step, steps, lambda: product(square, square).block_until_ready())


def baseline(network, batch, steps, memory_format):
    import torch
    from torch_baseline import JointStep

    take = JointStep(batch, network, memory_format)
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


def count_flops(network, batch):
    """FLOPs of a joint step by part; element-wise work is left out."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from granq_jax.models.registry import network as registered

    info, found = registered(network), []

    def note(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        if isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__":
            kernel = context.module.variables["params"]["kernel"]
            found.append(2 * math.prod(y.shape[1:-1]) * kernel.size)
        return y

    images = jnp.zeros((1, info.image_size, info.image_size, info.channels))
    with nn.intercept_methods(note):
        jax.eval_shape(info.model.init, jax.random.key(0), images)
    whole, first = sum(found), found[0]

    def conv(size, taps, inputs, outputs):
        return 2 * size**2 * taps * inputs * outputs

    small = info.image_size // 4
    generator = 2 * 100 * small**2 * 128  # the dense layer
    generator += 4 * conv(small, 4, 128, 128) + 4 * conv(2 * small, 4, 128, 64)  # phases on the small images
    generator += conv(4 * small, 9, 64, info.channels)
    parts = {
        "generator, forward": generator,
        "generator, to parameters": generator,
        "generator, to activations": generator,
        "teacher, forward": whole,
        "teacher, to images": whole,
        "student, forward": whole,
        "student, to images": whole,
        "student, to parameters": whole,
        "student, to activations": whole - first,
    }
    return {name: batch * flops for name, flops in parts.items()}


def compare(network, batch, steps, rounds):
    """Measures both sides and returns all figures."""
    results = measure_in_turns(beside_pytorch(ours, baseline, (network, batch, steps)), rounds)
    seconds = {name: statistics.median(r["seconds"] for r in side["rounds"]) for name, side in results.items()}
    fastest = min(FORMATS, key=seconds.get)
    flops = count_flops(network, batch)
    peak = max(r["peak"] for side in results.values() for r in side["rounds"])
    return {
        "network": network,
        "batch": batch,
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
    parser.add_argument("--network", choices=CONFIGS, default="resnet20_cifar10")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="in a round; by default some seconds' worth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    small = options.network.startswith("resnet20")
    steps = options.steps or (max(3, 320 // options.batch) if small else 1)
    figures = compare(options.network, options.batch, steps, options.rounds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{figures['network']}, batch {figures['batch']}, medians of {options.rounds} rounds")
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
