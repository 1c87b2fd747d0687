"""Exported programs: run by JAX alone, they compute what the student does."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax import QuantSpec, create_model, quantize
from granq_jax.data.datasets import DATASETS
from granq_jax.export import export_program
from tests.conftest import one_line_error

DIGITS = DATASETS["digits"]
PIXELS = np.random.default_rng(0).integers(0, 17, (5, 8, 8, 1), np.uint8)

# Python would find the package where it was installed from.
ALONE = """
import sys
sys.modules["granq_jax"] = None
import jax, jax.export, numpy as np
jax.config.update("jax_enable_x64", True)
program, images, logits = sys.argv[1:]
exported = jax.export.deserialize(bytearray(open(program, "rb").read()))
np.save(logits, exported.call(np.load(images)))
assert not any(name.partition(".")[0] in ("granq_jax", "flax") for name in sys.modules if sys.modules[name])
"""


def run_alone(program, images, folder):
    (folder / "program").write_bytes(program.serialize())
    np.save(folder / "images.npy", images)
    names = [str(folder / name) for name in ("program", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-c", ALONE, *names], check=True, timeout=300, cwd=folder)
    return np.load(folder / "logits.npy")


@pytest.mark.slow
def test_a_program_computes_the_students_logits_in_a_process_without_the_package(tmp_path, x64):
    model, spec = create_model("resnet8_digits"), QuantSpec(weight_bits=3, act_bits=3)
    variables = jax.jit(model.init)(jax.random.key(0), DIGITS.normalise(PIXELS).astype(np.float64))
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)

    images = DIGITS.normalise(PIXELS).astype(np.float64)
    program = export_program(model, spec, variables, (8, 8, 1), dtype=np.float64)
    assert program.platforms == ("cpu", "cuda")
    expected = quantize(model, spec, impl="xla").apply(variables, images)
    assert expected.dtype == jnp.float64
    np.testing.assert_allclose(run_alone(program, images, tmp_path), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(program.call(images[:2]), expected[:2], rtol=1e-9, atol=1e-9)


def test_kernels_need_a_batch_size():
    model = create_model("resnet8_digits")
    with one_line_error(ValueError, "batch_size", "None", "whole number"):
        export_program(model, QuantSpec(), {}, (8, 8, 1), platforms=("cuda",), impl="pallas")


@pytest.mark.parametrize("act_granularity", ["sample_channel", "tensor"])
def test_a_program_for_cuda_has_the_kernels_in_it(act_granularity):
    model, spec = create_model("resnet8_digits"), QuantSpec(act_granularity=act_granularity)
    variables = jax.jit(model.init)(jax.random.key(0), DIGITS.normalise(PIXELS))
    program = export_program(model, spec, variables, (8, 8, 1), batch_size=4, platforms=("cuda",), impl="pallas")
    assert program.platforms == ("cuda",)
    assert program.in_avals[0].shape == (4, 8, 8, 1)
    assert ("triton" in program.mlir_module()) == (act_granularity == "sample_channel")
    assert len(program.serialize()) > 0
