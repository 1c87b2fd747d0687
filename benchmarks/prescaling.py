"""What a range for each (sample, channel) costs beside one range for all, and beside a loop.

    python benchmarks/prescaling.py [--network NAME] [--batch 16 64 200] [--rounds 15] [--plot FILE.png]

For every activation shape of a network, median milliseconds of ``fake_quant`` at 3 bits, float32:
with granularity ``tensor``, with ``sample_channel`` in one vectorized pass, and with the
conventional loop over channels: a call of a compiled function for each, as many launches as
channels. The three take turns.
``--plot`` needs matplotlib.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from granq_jax import QuantSpec, fake_quant, quantize
from granq_jax.models.registry import NETWORKS

COLUMNS = ("batch", "shape", "tensor ms", "sample_channel ms", "/ tensor", "loop ms", "/ tensor")


def activation_shapes(name):
    """(height, width, channels) of the activations of a network that are quantized, each once."""
    info = NETWORKS[name]
    image = jnp.zeros((1, info.image_size, info.image_size, info.channels))
    variables = jax.eval_shape(info.model.init, jax.random.key(0), image)
    sites = quantize(info.model, QuantSpec()).sites(variables, image)
    return list(dict.fromkeys(site.shape[1:] for site in sites if site.kind == "activation"))


def channel_loop(x, one_channel, join):
    return join([one_channel(x, channel) for channel in range(x.shape[-1])])


def measure(shape, rounds):
    x = jax.random.normal(jax.random.key(0), shape)
    quantizer = partial(fake_quant, bits=3)
    one_channel = jax.jit(lambda x, c: quantizer(jax.lax.dynamic_slice_in_dim(x, c, 1, axis=-1)))
    join = jax.jit(lambda channels: jnp.concatenate(channels, axis=-1))
    ways = (
        jax.jit(partial(quantizer, granularity="tensor")),
        jax.jit(quantizer),
        partial(channel_loop, one_channel=one_channel, join=join),
    )
    _, vectorized, looped = (way(x) for way in ways)
    assert jnp.allclose(vectorized, looped), "the loop is to compute the same"
    seconds = [[] for _ in ways]
    for round_ in range(rounds + 2):
        for way, times in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(way(x))
            if round_ >= 2:  # the first ones compile and warm up
                times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(times) for times in seconds]


def plot(rows, network, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    names = [f"{shape}\nbatch {batch}" for batch, shape, *_ in rows]
    for offset, (label, column) in enumerate((("tensor", 2), ("sample_channel", 3), ("loop over channels", 5))):
        axes.bar([i + 0.27 * (offset - 1) for i in range(len(rows))], [r[column] for r in rows], 0.27, label=label)
    axes.set(yscale="log", ylabel="milliseconds", title=f"Fake quantization of {network}'s activations")
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20_cifar10")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 200])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    rows = []
    print(" | ".join(COLUMNS))
    for batch in options.batch:
        for shape in activation_shapes(options.network):
            tensor, ours, loop = measure((batch, *shape), options.rounds)
            rows.append((batch, "x".join(map(str, shape)), tensor, ours, ours / tensor, loop, loop / tensor))
            print(" | ".join(str(v) if isinstance(v, int | str) else f"{v:.2f}" for v in rows[-1]), flush=True)
    if options.plot:
        plot(rows, options.network, options.plot)


if __name__ == "__main__":
    main()
