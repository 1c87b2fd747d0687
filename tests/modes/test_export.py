"""What a run's export leaves."""

import json

import chex
import jax
import numpy as np
import pytest

from granq_jax import create_model, load_config, quantize
from granq_jax.config import make_trainer
from granq_jax.data.datasets import load_split
from granq_jax.export import load_packed
from granq_jax.main import main
from granq_jax.modes.evaluate import evaluate_run
from granq_jax.modes.export import export_run
from granq_jax.quant.weights import quantize_params
from granq_jax.runs.checkpoint import Checkpoints
from granq_jax.runs.student import state_of_run
from tests.conftest import one_line_error
from tests.digits import digits


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of no steps, exported by the command."""
    workdir = tmp_path_factory.mktemp("export") / "run"
    config = digits()
    trainer = make_trainer(config)
    images = np.zeros((1, 8, 8, 1), np.float32)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, trainer.init(jax.jit(trainer.model.init)(jax.random.key(3), images)), {})
    (workdir / "config.json").write_text(config.to_json())
    assert main(["--mode=export", f"--workdir={workdir}", "--compilation-cache=off"]) == 0
    return workdir, json.loads((workdir / "export" / "export.json").read_text())


def test_the_files_and_their_sizes(exported):
    workdir, said = exported
    files = {path.name: path.stat().st_size for path in (workdir / "export").iterdir()}
    assert files.keys() == {"student.safetensors", "student.jax", "student_cuda.jax", "export.json"}
    assert said["bytes"] == {name: size for name, size in files.items() if name != "export.json"}
    assert said["theoretical_bytes"] < files["student.safetensors"]
    assert (said["step"], said["image"]) == (0, {"shape": [8, 8, 1], "dtype": "uint8", "max_value": 16})


def test_the_program_takes_pixels_and_is_as_accurate_as_the_student(exported):
    workdir, _ = exported
    split = load_split("digits", "test")
    program = jax.export.deserialize(bytearray((workdir / "export" / "student.jax").read_bytes()))
    top1 = 100 * np.mean(np.argmax(program.call(split.images), axis=1) == split.labels)
    assert abs(top1 - evaluate_run(load_config(workdir / "config.json"), workdir)["student_top1"]) < 1


def test_the_packed_variables_are_those_of_the_student(exported):
    workdir, _ = exported
    packed = load_packed(workdir / "export" / "student.safetensors")
    trainer = make_trainer(load_config(workdir / "config.json"))
    student = state_of_run(trainer, workdir)[1].student
    student = {**student, "params": quantize_params(student["params"], trainer.spec, "xla")}
    chex.assert_trees_all_equal(packed.variables, student)
    pixels = load_split("digits", "test").images[:200]
    program = jax.export.deserialize(bytearray((workdir / "export" / "student.jax").read_bytes()))

    @jax.jit  # as the program is: rounded differently, a value between two codes may get the other one
    def ours(pixels):
        images = load_split("digits", "test").dataset.normalise(pixels)
        return quantize(create_model(packed.network), packed.spec).apply(packed.variables, images)

    # Sums may be rounded differently all the same, and then every logit of that image differs.
    gap = np.abs(program.call(pixels) - ours(pixels)).max(axis=1)
    assert np.mean(gap < 1e-5) > 0.5


def test_a_workdir_without_a_run_is_refused(tmp_path):
    with one_line_error(ValueError, "workdir", "no checkpoint"):
        export_run(load_config("digits_w2a2"), tmp_path / "none")
    assert not list(tmp_path.iterdir())
