"""The fused kernel in interpret mode against its reference; its lowering for GPUs."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from granq_jax.kernels import gpus, sample_channel, tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from granq_jax import create_model
from granq_jax.models.layers import NormAct
from tests.kernels.levels import DTYPES, assert_same_levels, normal

# Tiles that divide and that do not, channels that do not, and images that take two sweeps.
SHAPES = [(2, 7, 7, 3), (3, 1, 1, 24), (2, 32, 32, 16), (1, 5, 9, 144), (1, 7, 7, 960), (1, 130, 129, 5)]
NETWORKS = [("resnet20_cifar10", 32), ("resnet18", 224), ("resnet50", 224), ("mobilenetv2_w1", 224)]


def epilogue_parts(shape, dtype, norm, residual, seed=1):
    parts = {}
    if norm:
        # Powers of two and few digits: products and sums are exact, whether or not they are contracted.
        random = np.random.default_rng(seed)
        factor, shift = 2.0 ** random.integers(-2, 3, shape[-1]), random.integers(-8, 9, shape[-1]) / 8
        parts["norm"] = jnp.asarray([factor, shift], jnp.float32)
    if residual:
        parts["residual"] = normal(shape, dtype, seed)
    return parts


def assert_kernel_is_reference(x, bits, norm=False, residual=False, activation=None):
    parts = epilogue_parts(x.shape, x.dtype, norm, residual)
    y = sample_channel.fake_quant(x, bits, **parts, activation=activation, interpret=True)
    v = x.astype(jnp.float32)
    if norm:
        v = v * parts["norm"][0][None, None, None] + parts["norm"][1][None, None, None]
    if residual:
        v = v + parts["residual"].astype(jnp.float32)
    v = np.maximum(v, 0) if activation else v
    v = np.minimum(v, 6) if activation == "relu6" else v
    return assert_same_levels(y, sample_channel.reference(x, bits, **parts, activation=activation), v, bits)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 7, 7, 3), "float32"), ((1, 7, 7, 24), "bfloat16")])
def test_values(shape, dtype):
    assert_kernel_is_reference(normal(shape, dtype), 3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_more_shapes(shape, dtype):
    assert_kernel_is_reference(normal(shape, dtype), 3)


@pytest.mark.parametrize(
    ("bits", "norm", "residual", "activation"), [(2, True, True, "relu"), (8, True, False, "relu6")]
)
def test_what_comes_before_is_fused(bits, norm, residual, activation):
    assert_kernel_is_reference(normal((2, 7, 5, 20)), bits, norm, residual, activation)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("residual", "activation"), [(True, "relu"), (False, "relu6"), (True, None)])
@pytest.mark.parametrize("shape", [(2, 7, 5, 20), (1, 130, 129, 5)])
def test_what_comes_before_is_fused_in_any_combination(shape, bits, norm, residual, activation):
    assert_kernel_is_reference(normal(shape), bits, norm, residual, activation)


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)),
    bits=st.integers(2, 8),
    dtype=st.sampled_from(DTYPES),
    norm=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from([None, "relu", "relu6"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_drawn_cases(shape, bits, dtype, norm, residual, activation, seed):
    assert_kernel_is_reference(normal(shape, dtype, seed), bits, norm, residual, activation)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "size"), NETWORKS)
def test_every_activation_of_the_networks(network, size):
    """Batches of one: float32 exactly, how often at a tie is printed; bfloat16 to a level."""
    found = {}

    def note(next_call, args, kwargs, context):
        module = context.module
        if isinstance(module, NormAct) and context.method_name == "__call__" and module.activation:
            found[args[0].shape, len(args) > 1 and args[1] is not None, module.activation] = None
        return next_call(*args, **kwargs)

    model, images = create_model(network), jnp.zeros((1, size, size, 3))
    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), images)
    assert found
    flipped = elements = 0
    for shape, residual, activation in found:
        flipped += assert_kernel_is_reference(normal(shape), 3, True, residual, activation)
        elements += np.prod(shape)
        assert_kernel_is_reference(normal(shape, "bfloat16"), 3, True, residual, activation)
    print(f"{network}: {flipped} of {elements} values at a tie have the neighbouring level")


@pytest.fixture
def small_parts(monkeypatch):
    """Maps of a few pixels take two launches, which loop over two tiles at a time."""
    for name, value in {
        "HELD_PIXELS": 64,
        "SPLIT_WARPS": 1,
        "SPLIT_PROGRAMS": 1,
        "SPLIT_PIXELS": 6.0,
        "UNROLLED": 8,
    }.items():
        monkeypatch.setattr(tiles, name, value)


@pytest.mark.parametrize(
    ("shape", "dtype", "norm", "residual", "activation"),
    [
        ((2, 16, 16, 8), "float32", False, False, None),
        ((1, 17, 13, 20), "float32", True, True, "relu6"),
        ((1, 15, 11, 24), "bfloat16", True, False, "relu"),
    ],
)
def test_maps_in_parts(small_parts, shape, dtype, norm, residual, activation):
    found = tiles.tiling(shape[0], shape[1] * shape[2], shape[3], jnp.dtype(dtype).itemsize)
    assert found.parts > 1
    assert found.loops > 0
    assert_kernel_is_reference(normal(shape, dtype), 3, norm, residual, activation)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_bad_value_spoils_all_parts_of_its_own_channel_only(small_parts, bad):
    kernel = jax.jit(partial(sample_channel.fake_quant, bits=3, interpret=True))
    x = np.array(normal((2, 17, 13, 4)))
    clean = np.array(kernel(jnp.asarray(x)))
    x[1, -1, -1, 2] = bad
    y = np.array(kernel(jnp.asarray(x)))
    assert not np.isfinite(y[1, :, :, 2]).any()
    y[1, :, :, 2] = clean[1, :, :, 2]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 192, 192, 4)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_spoils_its_own_channel_only(shape, bad):
    kernel = jax.jit(partial(sample_channel.fake_quant, bits=3, interpret=True))
    x = np.array(normal(shape))
    x[..., 1] = 0.7
    clean = np.array(kernel(jnp.asarray(x)))
    np.testing.assert_allclose(clean[..., 1], 0.7, rtol=1e-6)
    x[0, -1, 0, 3] = bad
    y = np.array(kernel(jnp.asarray(x)))
    assert not np.isfinite(y[0, :, :, 3]).any()
    y[0, :, :, 3] = clean[0, :, :, 3]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_an_activation_keeps_nan(activation):
    x = jnp.array([[[[np.nan, -1.0]], [[2.0, 9.0]]]])
    y = sample_channel.fake_quant(x, 2, activation=activation, interpret=True)
    assert np.isnan(y[..., 0]).all()
    np.testing.assert_allclose(y[0, :, 0, 1], [0, 6 if activation == "relu6" else 9], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7, 7, 3), (1, 130, 129, 5)])
def test_it_lowers_for_gpus(platform, dtype, shape):
    x, norm = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((2, shape[-1]), jnp.float32)

    def fused(x, norm, residual):
        return sample_channel.fake_quant(x, 3, norm=norm, residual=residual, activation="relu6")

    with gpus.lowering():
        text = jax.jit(fused).trace(x, norm, x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count(sample_channel.NAME) > 0
    assert "triton" in text
