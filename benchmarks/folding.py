"""What it costs in accuracy to fold the steps of activations into the weights, so that codes can be summed.

    python benchmarks/folding.py --data-dir DIR [--bits 3 4 8] [--epochs 4]

A sum over input channels whose steps differ is no sum of codes, unless each step is multiplied into the weights
of its channel before these are quantized, which gives them a wider range to cover. Here with CIFAR-10's
ResNet-20 and the teacher that comes with the package, whose weights are not trained; inputs of layers are quantized,
the image included. Top-1 on all test images

- with a range for each (sample, channel), dequantized before each layer;
- with a range for each channel, kept from the generator's images of so many epochs, dequantized before each layer;
- with these, their steps folded into the weights;
- with a range for each input, kept from the same images: nothing needs to be folded.
"""

import argparse
import dataclasses
from pathlib import Path

import flax.traverse_util
import jax

from granq_jax import QuantSpec, fake_quant, load_config
from granq_jax.config import make_trainer
from granq_jax.data.datasets import load_split
from granq_jax.distill.joint_run import JointRun
from granq_jax.quant import quantize_params, weight_paths
from granq_jax.quant.affine import affine_within
from granq_jax.quant.ranges import RANGES
from granq_jax.quant.spec import without_weights
from granq_jax.runs.accuracy import student_accuracy
from granq_jax.teachers.load import load_teacher


def folded(params, ranges, spec):
    """The weights as they are quantized with the step of each input channel multiplied into them."""
    flat = flax.traverse_util.flatten_dict(params)
    for path, kernel in weight_paths(params).items():
        module = tuple(path.split("/"))
        low, high = flax.traverse_util.flatten_dict(ranges)[*module, "range0"]
        step = affine_within(low, high, spec.act_bits).step.reshape(*(1,) * (kernel.ndim - 2), -1, 1)
        times_step = fake_quant(kernel * step, bits=spec.weight_bits, granularity=spec.weight_granularity)
        flat[*module, "kernel"] = times_step / step
    return flax.traverse_util.unflatten_dict(flat)


def accuracies(bits, epochs, split, seed):
    """Top-1 by way."""
    config = load_config("paper/cifar10_w3a3")
    config.seed, config.warmup_epochs, config.epochs = seed, epochs, epochs
    base, devices = make_trainer(config), jax.devices()
    teacher = load_teacher(config, Path())

    def top1(spec, variables):
        return student_accuracy(dataclasses.replace(base, spec=spec), split, 64, devices)(variables).top1

    def kept(granularity):
        spec = dataclasses.replace(dynamic, act_granularity=granularity, act_ranges="moving_average")
        run = JointRun(dataclasses.replace(base, spec=spec), teacher, devices)
        for _ in range(epochs * config.steps_per_epoch):
            run.advance(warmup=True)
        return spec, jax.device_get(run.state.result)

    dynamic = QuantSpec(weight_bits=bits, act_bits=bits, placement="operand")
    found = {"sample_channel, dequantized": top1(dynamic, teacher)}
    spec, student = kept("channel")
    alone = without_weights(spec)
    found["channel, dequantized"] = top1(alone, {**student, "params": quantize_params(student["params"], spec)})
    found["channel, folded"] = top1(alone, {**student, "params": folded(student["params"], student[RANGES], spec)})
    found["tensor"] = top1(*kept("tensor"))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split = load_split("cifar10", "test", options.data_dir)
    for i, bits in enumerate(options.bits):
        found = accuracies(bits, options.epochs, split, options.seed)
        if i == 0:
            print(" | ".join(["bits", *found]))
        print(" | ".join([str(bits), *(f"{top1:.2f}" for top1 in found.values())]), flush=True)


if __name__ == "__main__":
    main()
