"""Images a second of quantized evaluation, beside the same arithmetic in PyTorch.

    python benchmarks/evaluate.py [--network resnet20_cifar10] [--images N] [--batch N] [--rounds 5] [--json]

A network at W3A3 on random images, random weights, float32, all cores. Our side is the product's own
evaluation, from uint8 images in memory to an accuracy; the baseline does the same in the faster of two
memory formats. Each side runs in a process of its own, in turns. Needs PyTorch: ``pip install -e
".[parity]"``.
"""

import argparse
import json
import statistics
import time

import numpy as np
from joint_step import CONFIGS
from turns import FORMATS, OURS, beside_pytorch, measure_in_turns

from granq_jax.data.datasets import DATASETS
from granq_jax.models.registry import network as registered


def examples(network, count):
    info, rng = registered(network), np.random.default_rng(0)
    images = rng.integers(0, 256, (count, info.image_size, info.image_size, info.channels), np.uint8)
    return images, rng.integers(0, info.classes, count, np.int32)


def ours(network, count, batch):
    import jax
    import jax.numpy as jnp

    from granq_jax import load_config
    from granq_jax.config import make_trainer
    from granq_jax.data.splits import MemorySplit
    from granq_jax.runs.accuracy import student_accuracy
    from granq_jax.runtime.devices import halve_cpu

    halve_cpu([batch])
    config = load_config(CONFIGS[network])
    trainer, images = make_trainer(config), examples(network, count)
    split = MemorySplit(DATASETS[config.dataset], *images)
    evaluate = student_accuracy(trainer, split, batch, jax.local_devices())
    variables = jax.jit(trainer.model.init)(jax.random.key(0), jnp.zeros((1, *images[0].shape[1:])))
    return _rate(lambda: evaluate(variables), count)


def baseline(network, count, batch, memory_format):
    from torch_baseline import Evaluation

    from granq_jax import load_config

    dataset = DATASETS[load_config(CONFIGS[network]).dataset]
    take = Evaluation(*examples(network, count), batch, memory_format, dataset.mean, dataset.std, network=network)
    return _rate(take, count)


def _rate(evaluate, count):
    def measure():
        start = time.perf_counter()
        evaluate()
        return {"images_per_second": count / (time.perf_counter() - start)}

    return measure


def compare(network, count, batch, rounds):
    """Measures both sides and returns all figures."""
    results = measure_in_turns(beside_pytorch(ours, baseline, (network, count, batch)), rounds)
    rates = {name: [r["images_per_second"] for r in side["rounds"]] for name, side in results.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    fastest = max(FORMATS, key=medians.get)
    return {
        "network": network,
        "images": count,
        "batch": batch,
        "images_per_second": medians[OURS],
        "torch_images_per_second": medians[fastest],
        "torch_memory_format": fastest,
        "ratio": medians[OURS] / medians[fastest],
        "rounds": rates,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=CONFIGS, default="resnet20_cifar10")
    parser.add_argument("--images", type=int, help="by default 2000 small ones or 96 large ones")
    parser.add_argument("--batch", type=int, help="by default that of the config: 64 or 48")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    small = registered(options.network).image_size == 32
    images, batch = options.images or (2000 if small else 96), options.batch or (64 if small else 48)
    figures = compare(options.network, images, batch, options.rounds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(
        f"{figures['network']}, {figures['images']} images in batches of {figures['batch']}, medians of "
        f"{options.rounds} rounds"
    )
    print(f"granq_jax {figures['images_per_second']:.0f} images/s")
    print(f"PyTorch   {figures['torch_images_per_second']:.0f} images/s ({figures['torch_memory_format']})")
    print(f"ratio {figures['ratio']:.2f}")


if __name__ == "__main__":
    main()
