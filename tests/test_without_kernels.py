"""A JAX that has Pallas' Triton backend no longer: all is computed by XLA's form, and what asks for kernels is told."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from granq_jax import create_model
from granq_jax.runs.checkpoint import save_variables

# Neither under its public name nor under the one that Pallas itself imports it by.
GONE = """
import sys
for name in ("jax.experimental.pallas.triton", "jax._src.pallas.triton"):
    sys.modules[name] = None
"""

AS_A_LIBRARY = """
import jax, jax.numpy as jnp, numpy as np
from granq_jax import QuantSpec, create_model, dequantize, fake_quant, quantize, quantize_codes
x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 6)), jnp.float32)
auto, xla = (fake_quant(x, bits=3, impl=impl) for impl in ("auto", "xla"))
np.testing.assert_array_equal(auto, xla)
np.testing.assert_allclose(dequantize(quantize_codes(x, bits=3)), xla, rtol=1e-6)
model, images = create_model("resnet8_digits"), jnp.ones((2, 8, 8, 1))
variables = jax.jit(model.init)(jax.random.key(0), images)
assert quantize(model, QuantSpec()).apply(variables, images).shape == (2, 10)

text = jax.jit(lambda x: fake_quant(x, bits=3)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
assert "round_nearest_even" in text and "triton" not in text
for impl in ("pallas", "pallas_interpret"):
    try:
        fake_quant(x, bits=3, impl=impl)
    except (ValueError, ImportError) as error:
        print(impl, type(error).__name__, error)
"""

RUN = """
from granq_jax.main import main
arguments = ["--compilation-cache=off", f"--workdir={sys.argv[1]}"]
steps = ["--config.epochs=1", "--config.steps_per_epoch=2", "--config.warmup_epochs=0"]
assert main(["--config=digits_w2a2", *arguments, *steps, f"--config.teacher={sys.argv[2]}"]) == 0
assert main(["--mode=export", *arguments]) == 0
"""


def run(script, *arguments):
    command = [sys.executable, "-c", GONE + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)


@pytest.mark.slow
def test_as_a_library():
    finished = run(AS_A_LIBRARY)
    pallas, interpreted = finished.stdout.splitlines()
    assert pallas.startswith("pallas NoKernelError impl: got 'pallas'")
    assert "allowed are 'auto' and 'xla'" in pallas
    assert interpreted.startswith("pallas_interpret")
    assert "jax.experimental.pallas.triton" in interpreted
    (said,) = [line for line in finished.stderr.splitlines() if "XLA's form" in line]
    assert "jax.experimental.pallas.triton" in said


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    init, images = jax.jit(create_model("resnet8_digits").init), np.ones((1, 8, 8, 1), np.float32)
    save_variables(folder / "teacher.safetensors", init(jax.random.key(0), images))
    return folder / "run", run(RUN, str(folder / "run"), str(folder / "teacher.safetensors"))


@pytest.mark.slow
def test_a_run_and_its_export(exported):
    workdir, finished = exported
    assert json.loads((workdir / "result.json").read_text())["steps"] == 2
    files = {path.name for path in (workdir / "export").iterdir()}
    assert files == {"student.safetensors", "student.jax", "export.json"}
    assert json.loads((workdir / "export" / "export.json").read_text())["bytes"].keys() == files - {"export.json"}
    assert "student_cuda.jax is left out: impl: got 'pallas'" in finished.stderr
