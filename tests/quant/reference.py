"""Fake quantization in plain numpy, element by element and group by group: slow and obvious."""

import itertools

import numpy as np


def groups(shape, granularity):
    """Index tuples (slices) of the groups of elements that share a range."""
    ndim = len(shape)
    kept = {
        "sample_channel": {0} if max(shape[1:-1], default=1) == 1 else {0, ndim - 1},  # one pixel is no channel map
        "sample": {0},
        "channel": {ndim - 1},
        "tensor": set(),
        "out_channel": {ndim - 1},
        "kernel": {1} if ndim == 2 else {ndim - 2, ndim - 1},
    }[granularity]
    choices = [range(size) if axis in kept else [slice(None)] for axis, size in enumerate(shape)]
    return itertools.product(*choices)


def fake_quant(x, bits, granularity):
    """(codes, values) in the dtype of ``x``."""
    codes, values = np.empty_like(x), np.empty_like(x)
    one = x.dtype.type
    levels, half = one(2**bits - 1), one(2 ** (bits - 1))
    for group in groups(x.shape, granularity):
        low, high = x[group].min(), x[group].max()
        scale = levels / np.maximum(high - low, one(1e-8))
        zero = np.round(scale * low) + half
        codes[group] = np.clip(np.round(scale * x[group] - zero), -half, half - 1)
        values[group] = (codes[group] + zero) / scale
    return codes, values


def fake_quant_within(x, low, high, bits):
    """Values of ``x`` where the range is given, low and high of a shape that broadcasts."""
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    scale = levels / np.maximum(high - low, 1e-8)
    zero = np.round(scale * low) + half
    return (np.clip(np.round(scale * x - zero), -half, half - 1) + zero) / scale
