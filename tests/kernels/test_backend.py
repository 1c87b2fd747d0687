"""The part of JAX that the kernels are written on: whether it is there still, and for which GPUs."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest
from granq_jax.kernels import backend, sample_channel


def lowered(platform):
    x = jax.ShapeDtypeStruct((2, 7, 7, 24), jnp.float32)
    with backend.lowering(platform):
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
    with pytest.raises(DeprecationWarning, match="something else"), backend.lowering():
        warnings.warn("something else is deprecated", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize(("capability", "taken"), [("7.5", False), ("8.0", True), ("10.3", True)])
def test_gpus_before_ampere_are_refused(monkeypatch, capability, taken):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [gpu])
    if taken:
        assert "triton" in lowered("cuda").as_text()
    else:
        with pytest.raises(NotImplementedError, match=r"7\.5, allowed are 8\.0"):
            lowered("cuda")


def test_gpus_of_another_maker_have_other_numbers(monkeypatch):
    gpu = types.SimpleNamespace(platform="gpu", compute_capability="gfx942")
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: [gpu])
    assert "triton" in lowered("rocm").as_text()
