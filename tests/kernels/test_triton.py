"""The part of JAX that the kernels are written on: whether it is there still, and for which GPUs."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from granq_jax.kernels import gpus, sample_channel

from granq_jax import fake_quant


def lowered(platform):
    x = jax.ShapeDtypeStruct((2, 7, 7, 24), jnp.float32)
    with gpus.lowering():
        return jax.jit(lambda x: sample_channel.fake_quant(x, 3)).trace(x).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_jax_still_has_the_backend(platform):
    """When this fails, JAX has removed what it has deprecated: docs/gpu.md says what may take its place."""
    assert "__gpu$xla.gpu.triton" in lowered(platform).as_text()


def test_warnings_are_as_before_after():
    before = list(warnings.filters)
    lowered("cuda")
    assert warnings.filters == before


def test_other_deprecations_are_not_hidden():
    with pytest.raises(DeprecationWarning, match="something else"), gpus.lowering():
        warnings.warn("something else is deprecated", DeprecationWarning, stacklevel=1)


def on_a_gpu(monkeypatch, capability):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [gpu])


@pytest.mark.parametrize(("platform", "capability"), [("cuda", "8.0"), ("cuda", "10.3"), ("rocm", "gfx942")])
def test_gpus_that_it_serves(monkeypatch, platform, capability):
    on_a_gpu(monkeypatch, capability)
    assert "triton" in lowered(platform).as_text()


def test_gpus_before_ampere_get_xlas_form(monkeypatch, caplog):
    on_a_gpu(monkeypatch, "7.5")
    with pytest.raises(NotImplementedError, match=r"7\.5, allowed are 8\.0"):
        lowered("cuda")
    x = jax.ShapeDtypeStruct((2, 7, 7, 24), jnp.float32)
    text = jax.jit(lambda x: fake_quant(x, bits=3)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" not in text
    assert "compute capability 7.5" in caplog.text
