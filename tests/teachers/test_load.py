"""Where teachers come from, and training one."""

import itertools
import json
import logging

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import granq_jax.modes.train_teacher
import granq_jax.teachers.load
from granq_jax import load_config, load_torch
from granq_jax.models import create_model
from granq_jax.modes.evaluate import evaluate_run
from granq_jax.modes.train_teacher import train_teacher
from granq_jax.runs.checkpoint import save_variables
from granq_jax.teachers.load import check_loads, check_teacher, load_teacher, zoo
from granq_jax.teachers.torch_names import namings
from tests.conftest import one_line_error
from tests.digits import digits


def tiny_config(**changes):
    config = digits()
    config.teacher_training.epochs = 4
    config.teacher_training.small_epochs, config.teacher_training.small_size = 2, 6
    config.update_from_flattened_dict(changes)
    return config


def losses_of(workdir):
    lines = [json.loads(line) for line in (workdir / "teacher_training" / "metrics.jsonl").read_text().splitlines()]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))
    return [(line["epoch"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    return workdir, train_teacher(tiny_config(), workdir)


def test_a_trained_teacher_and_its_record(trained):
    workdir, result = trained
    assert json.loads((workdir / "teacher.json").read_text()) == result
    assert result["teacher_top1"] > 95
    assert result["teacher_top1"] <= result["teacher_top5"] <= 100
    assert (result["eval_examples"], result["seed"], result["teacher_training"]["epochs"]) == (360, 0, 4)
    assert [epoch for epoch, _ in losses_of(workdir)] == [1, 2, 3, 4]


def test_training_goes_on_where_it_was_broken_off(trained, tmp_path, monkeypatch):
    save = granq_jax.teachers.load.Checkpoints.save

    def save_twice(self, step, state):
        if step == 3:
            raise KeyboardInterrupt
        save(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(granq_jax.teachers.load.Checkpoints, "save", save_twice)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(tiny_config(), tmp_path)
    assert not (tmp_path / "teacher.safetensors").exists()
    with one_line_error(ValueError, "workdir", str(tmp_path), "lr 0.1", "0.3"):
        train_teacher(tiny_config(**{"teacher_training.lr": 0.3}), tmp_path)
    train_teacher(tiny_config(), tmp_path)
    assert losses_of(tmp_path) == losses_of(trained[0])
    ours, theirs = (load_torch("resnet8_digits", path / "teacher.safetensors") for path in (tmp_path, trained[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with one_line_error(ValueError, "workdir", "already holds a teacher"):
        train_teacher(tiny_config(), tmp_path)


def test_training_that_ended_within_its_evaluation_is_completed(trained, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(granq_jax.modes.train_teacher, "float_accuracy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(tiny_config(), tmp_path)
    assert (tmp_path / "teacher.safetensors").exists()
    result = train_teacher(tiny_config(), tmp_path)
    assert result["teacher_top1"] == trained[1]["teacher_top1"]
    assert losses_of(tmp_path) == losses_of(trained[0])


def test_a_teacher_is_evaluated_alone(trained, tmp_path):
    config = tiny_config(teacher=str(trained[0] / "teacher.safetensors"))
    evaluation = evaluate_run(config, tmp_path / "new")
    assert evaluation["teacher_top1"] == trained[1]["teacher_top1"]
    assert not [key for key in evaluation if key.startswith("student")]
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text()) == evaluation
    with one_line_error(ValueError, "workdir", "no checkpoint"):
        evaluate_run(config, tmp_path, "both")
    with one_line_error(ValueError, "config.teacher", "'train'", "no trained teacher"):
        evaluate_run(tiny_config(), tmp_path)


def test_the_bundled_teacher(tmp_path):
    config = load_config("paper/cifar10_w3a3")
    assert config.teacher == "bundled"
    teacher = flatten_dict(load_teacher(config, tmp_path))
    shapes = flatten_dict(jax.eval_shape(create_model(config.network).init, jax.random.key(0), np.ones((1, 32, 32, 3))))
    assert {path: leaf.shape for path, leaf in teacher.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    assert {leaf.dtype for leaf in teacher.values()} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("config", "teacher", "error", "words"),
    [
        (
            "paper/cifar10_w3a3",
            "",
            ValueError,
            ("not set", "'bundled'", "'resnet20_cifar10'", "'train'", ".safetensors"),
        ),
        ("paper/cifar10_w3a3", "none.npz", FileNotFoundError, ("none.npz", "no such file", "'bundled'")),
        ("paper/cifar10_w3a3", "resnet18", ValueError, ("'resnet18' for 'resnet20_cifar10'", "'bundled'")),
        ("paper/imagenet_resnet18_w3a3", "bundled", ValueError, ("'bundled' for 'resnet18'", "'resnet18', a public")),
    ],
)
def test_teachers_that_cannot_be_had(config, teacher, error, words):
    config = load_config(config)
    config.teacher = teacher
    with one_line_error(error, "config.teacher", *words):
        check_teacher(config)


def test_a_file_of_others_is_read_with_a_word_on_its_normalisation(tmp_path, caplog):
    caplog.set_level(logging.INFO, "granq_jax")
    config = tiny_config(mean=(0.25,))
    shapes = namings(config.network)[0]
    tensors = {}
    for path, key in shapes.names.items():
        shape = shapes.shapes[path]
        tensors[key] = np.ones((shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1], np.float32)
    np.savez(tmp_path / "theirs.npz", **tensors)
    config.teacher = str(tmp_path / "theirs.npz")
    variables = load_teacher(config, tmp_path)
    assert "mean (0.25,) and std (0.38,)" in caplog.text
    assert "config.mean and config.std" in caplog.text
    caplog.clear()
    save_variables(tmp_path / "own.safetensors", variables)
    config.teacher = str(tmp_path / "own.safetensors")
    load_teacher(config, tmp_path)
    assert "config.mean" not in caplog.text


def test_a_teacher_trained_here_is_used_with_images_normalised_alike(trained, tmp_path):
    workdir, result = trained
    assert (result["mean"], result["std"]) == ([0.30], [0.38])
    path = str(workdir / "teacher.safetensors")
    load_teacher(tiny_config(teacher=path, std=(0.38,)), tmp_path)
    with one_line_error(ValueError, "config.std", "[0.5]", "[0.38]", "teacher.json"):
        load_teacher(tiny_config(teacher=path, std=(0.5,)), tmp_path)


def test_training_does_not_go_on_with_images_normalised_otherwise(trained):
    workdir, _ = trained
    with one_line_error(ValueError, "workdir", "mean", "[0.5]"):
        check_loads(tiny_config(teacher="train", mean=(0.5,)), workdir, anew=False)


def test_a_public_checkpoint_is_fetched_by_name(tmp_path, monkeypatch):
    config = load_config("paper/cifar10_w3a3")
    config.teacher = config.network
    images = np.ones((1, 32, 32, 3), np.float32)
    variables = jax.jit(create_model(config.network).init)(jax.random.key(0), images)
    save_variables(tmp_path / "fetched.safetensors", variables)
    monkeypatch.setattr(zoo, "fetch", {config.network: tmp_path / "fetched.safetensors"}.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, load_teacher(config, workdir=tmp_path), variables)
