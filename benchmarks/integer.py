"""Milliseconds of a quantized forward pass in integer arithmetic and in floating point, in turns in one process.

    python benchmarks/integer.py [--network resnet20_cifar10] [--batch 16 200] [--bits 3 8] [--rounds 10]

Random weights and images; activations with a range for each sample, weights with one for each output channel.
"""

import argparse
import statistics
import time

import jax

from granq_jax import QuantSpec, create_model, quantize
from granq_jax.models.registry import NETWORKS
from granq_jax.quant.quantized_model import ARITHMETICS


def measure(network, batch, bits, rounds):
    """Median milliseconds of each arithmetic."""
    info, model = NETWORKS[network], create_model(network)
    images = jax.random.normal(jax.random.key(0), (batch, info.image_size, info.image_size, info.channels))
    variables = jax.jit(model.init)(jax.random.key(1), images[:1])
    spec = QuantSpec(weight_bits=bits, act_bits=bits, act_granularity="sample")
    programs = {kind: jax.jit(quantize(model, spec, arithmetic=kind).apply) for kind in ARITHMETICS}
    seconds = {kind: [] for kind in programs}
    for round_ in range(rounds + 2):
        for kind, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(variables, images))
            if round_ >= 2:  # the first ones compile and warm up
                seconds[kind].append(time.perf_counter() - start)
    return {kind: 1e3 * statistics.median(times) for kind, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20_cifar10")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 200])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print("batch | bits | float, ms | integer, ms | integer / float")
    for batch in options.batch:
        for bits in options.bits:
            ms = measure(options.network, batch, bits, options.rounds)
            print(f"{batch} | {bits} | {ms['float']:.1f} | {ms['integer']:.1f} | {ms['integer'] / ms['float']:.2f}")


if __name__ == "__main__":
    main()
