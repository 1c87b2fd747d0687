"""Images a second of quantized evaluation, beside the same arithmetic in PyTorch.

    python benchmarks/evaluate.py [--images 2000] [--batch 64] [--rounds 5] [--json]

CIFAR's ResNet-20 at W3A3 on random images, float32, all cores. Our side is the product's own
evaluation, from uint8 images in memory to an accuracy; the baseline does the same in the faster of two
memory formats. Each side runs in a process of its own, in turns. Needs PyTorch: ``pip install -e
".[parity]"``.
"""

import argparse
import json
import statistics
import time

import numpy as np
from turns import FORMATS, OURS, beside_pytorch, measure_in_turns

from granq_jax.data import DATASETS

CIFAR10 = DATASETS["cifar10"]


def examples(count):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count, np.int32)


def ours(count, batch):
    import jax
    import jax.numpy as jnp

    from granq_jax import load_config
    from granq_jax.build import make_trainer
    from granq_jax.devices import halve_cpu
    from granq_jax.evaluate import student_accuracy
    from granq_jax.splits import MemorySplit

    halve_cpu([batch])
    trainer = make_trainer(load_config("paper/cifar10_w3a3"))
    evaluate = student_accuracy(trainer, MemorySplit(CIFAR10, *examples(count)), batch, jax.local_devices())
    variables = jax.jit(trainer.model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return _rate(lambda: evaluate(variables), count)


def baseline(count, batch, memory_format):
    from torch_baseline import Evaluation

    return _rate(Evaluation(*examples(count), batch, memory_format, CIFAR10.mean, CIFAR10.std), count)


def _rate(evaluate, count):
    def measure():
        start = time.perf_counter()
        evaluate()
        return {"images_per_second": count / (time.perf_counter() - start)}

    return measure


def compare(count, batch, rounds):
    """Measures both sides and returns all figures."""
    results = measure_in_turns(beside_pytorch(ours, baseline, (count, batch)), rounds)
    rates = {name: [r["images_per_second"] for r in side["rounds"]] for name, side in results.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    fastest = max(FORMATS, key=medians.get)
    return {
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
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = compare(options.images, options.batch, options.rounds)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"{figures['images']} images in batches of {figures['batch']}, medians of {options.rounds} rounds")
    print(f"granq_jax {figures['images_per_second']:.0f} images/s")
    print(f"PyTorch   {figures['torch_images_per_second']:.0f} images/s ({figures['torch_memory_format']})")
    print(f"ratio {figures['ratio']:.2f}")


if __name__ == "__main__":
    main()
