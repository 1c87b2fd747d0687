"""Reads ``golden/*.npz``: figures of the authors' released PyTorch code, run in float64.

The files store outputs, and inputs where these do not follow from a seed, but no weights: those
follow from the tensors' names.
"""

import re
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

CIFAR = np.load(Path(__file__).parent / "golden" / "cifar.npz")
IMAGENET = np.load(Path(__file__).parent / "golden" / "imagenet.npz")

GENERATOR_NAMES = {
    ("params", "embed", "embedding"): "label_emb.weight",
    ("params", "dense", "kernel"): "l1.0.weight",
    ("params", "dense", "bias"): "l1.0.bias",
    ("params", "conv1", "kernel"): "conv_blocks1.0.weight",
    ("params", "conv1", "bias"): "conv_blocks1.0.bias",
    ("params", "conv2", "kernel"): "conv_blocks2.0.weight",
    ("params", "conv2", "bias"): "conv_blocks2.0.bias",
    ("params", "conv3", "kernel"): "conv_blocks2.3.weight",
    ("params", "conv3", "bias"): "conv_blocks2.3.bias",
}
for ours, theirs in {"norm0": "conv_blocks0.0", "norm1": "conv_blocks1.1", "norm2": "conv_blocks2.1"}.items():
    GENERATOR_NAMES["params", ours, "scale"] = f"{theirs}.weight"
    GENERATOR_NAMES["params", ours, "bias"] = f"{theirs}.bias"
for ours, theirs in {
    "norm0": "conv_blocks0.0",
    "norm1": "conv_blocks1.1",
    "norm2": "conv_blocks2.1",
    "norm3": "conv_blocks2.5",
}.items():
    GENERATOR_NAMES["batch_stats", ours, "mean"] = f"{theirs}.running_mean"
    GENERATOR_NAMES["batch_stats", ours, "var"] = f"{theirs}.running_var"

CONDITIONAL_GENERATOR_NAMES = {
    path: re.sub(r"^(conv_blocks\d)\.", r"\1_", name) for path, name in GENERATOR_NAMES.items() if path[1] != "embed"
}
for norm, theirs in {"norm0": "conv_blocks0_0", "norm1": "conv_blocks1_1", "norm2": "conv_blocks2_1"}.items():
    CONDITIONAL_GENERATOR_NAMES["params", norm, "scale"] = f"{theirs}.weights.weight"
    CONDITIONAL_GENERATOR_NAMES["params", norm, "bias"] = f"{theirs}.biases.weight"


def network_images(name):
    """The golden input of a network, NHWC."""
    for golden in (CIFAR, IMAGENET):
        if f"net/{name}/x" in golden:
            return nhwc(golden[f"net/{name}/x"])
    return nhwc(np.random.default_rng(zlib.crc32(f"x{name}".encode())).standard_normal((2, 3, 224, 224)))


def seeded_tensor(name, shape):
    """The weights that belong to a tensor name, by the rule the figures were made with."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape)
    if name.endswith(("running_mean", "bias")) or "biases" in name:
        return 0.1 * rng.standard_normal(shape)
    if len(shape) == 1:
        return rng.uniform(0.4, 0.8, shape)
    return np.sqrt(1 / np.prod(shape[1:])) * rng.standard_normal(shape)


def state_dict(keys):
    """Seeded tensors for lines like ``features.init_block.conv.weight [16, 3, 3, 3]``."""
    tensors = {}
    for line in keys:
        name, shape = str(line).split(" ", 1)
        if not name.endswith("num_batches_tracked"):
            tensors[name] = seeded_tensor(name, tuple(int(size) for size in re.findall(r"\d+", shape)))
    return tensors


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def hwio(kernel):
    return jnp.asarray(kernel.transpose(2, 3, 1, 0))


def generator_variables(tensors, small=8, names=GENERATOR_NAMES):
    """The generator's Flax variables from tensors in the released code's names and layout."""
    variables = {}
    for (collection, module, leaf), name in names.items():
        value = tensors[name]
        if name.startswith("l1."):  # features are (C, H, W) there and (H, W, C) here
            value = value.reshape(128, small, small, -1).transpose(1, 2, 0, 3).reshape(128 * small * small, -1)
            value = value.T if leaf == "kernel" else value.ravel()
        elif value.ndim == 4:
            value = hwio(value)
        variables.setdefault(collection, {}).setdefault(module, {})[leaf] = jnp.asarray(value)
    return variables
