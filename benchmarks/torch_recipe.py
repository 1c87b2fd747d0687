"""GranQ's recipe in eager PyTorch for many epochs: what long runs do in arithmetic that shares no code with ours.

    python benchmarks/torch_recipe.py --data-dir DIR [--epochs 60] [--seed 0] [--memory-format channels_first]

The settings of ``configs/paper/cifar10_w3a3.py``, with the teacher that comes with the package and the arithmetic of
``torch_baseline.py``: 200 steps an epoch at batch 16, four epochs of warm-up, no decay of the rates before epoch 100.
Prints the student's top-1 on all test images, before and after every tenth epoch. Needs PyTorch: ``pip install -e
".[parity]"``.
"""

import argparse
import tempfile
import time
from pathlib import Path

import flax.traverse_util
import numpy as np
import torch
from torch_baseline import MEMORY_FORMATS, Evaluation, JointStep

from granq_jax.config import load_config
from granq_jax.data.datasets import load_split
from granq_jax.teachers.load import load_teacher
from granq_jax.teachers.torch_import import torch_name


def torch_weights(network, variables):
    """The variables of a network as the state dict of pytorchcv's."""

    def laid_out(leaf):
        return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T

    return {
        torch_name(network, path): torch.from_numpy(laid_out(np.asarray(leaf)).copy())
        for path, leaf in flax.traverse_util.flatten_dict(variables).items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="where TFDS finds CIFAR-10")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-format", choices=MEMORY_FORMATS, default="channels_first")
    options = parser.parse_args()

    config = load_config("paper/cifar10_w3a3")
    if options.epochs > (first_decay := config.decay_epochs[0]):
        parser.error(f"--epochs: got {options.epochs}, allowed are {first_decay} at most: rates would fall after that")
    with tempfile.TemporaryDirectory() as workdir:
        weights = torch_weights(config.network, load_teacher(config, Path(workdir)))
    take = JointStep(config.batch_size, config.network, options.memory_format, weights=weights, seed=options.seed)
    test = load_split("cifar10", "test", options.data_dir)
    evaluate = Evaluation(
        *(test.images, test.labels, config.eval_batch_size, options.memory_format),
        *(test.dataset.mean, test.dataset.std, take.student),
    )
    print(f"before: top-1 {evaluate():.2f}", flush=True)
    start = time.perf_counter()
    for epoch in range(options.epochs):
        for _ in range(config.steps_per_epoch):
            loss_g, loss_s = take(warmup=epoch < config.warmup_epochs)
        if (epoch + 1) % 10 == 0 or epoch + 1 == options.epochs:
            top1, minutes = evaluate(), (time.perf_counter() - start) / 60
            losses = f"loss_g {loss_g:.3f}" if loss_s is None else f"loss_g {loss_g:.3f}, loss_s {loss_s:.1f}"
            print(f"epoch {epoch + 1}: top-1 {top1:.2f}, {losses}, {minutes:.1f} min", flush=True)


if __name__ == "__main__":
    main()
