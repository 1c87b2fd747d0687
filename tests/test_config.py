import json
from pathlib import Path

import pytest

from granq_jax import load_config
from granq_jax.config import CHECKS, check_config, default_config, make_trainer
from tests.conftest import one_line_error

CONFIGS = Path(__file__).parents[1] / "configs"
RECOMMENDED = sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))
RELEASED = sorted(f"paper/{path.stem}" for path in (CONFIGS / "paper").glob("[a-z]*.py"))
NAMES = RECOMMENDED + RELEASED


# batch, epochs, warm-up, student's rate, its decays, temperature; then (lambda_l, alpha_ds) at 3, 4 and 5 bits.
PAPER = {
    "cifar10": (16, 200, 4, 1e-4, (100, 200, 300), 20.0, (0.1, 0.2), (0.1, 0.2), (0.1, 0.2)),
    "cifar100": (200, 200, 4, 1e-4, (100, 200, 300), 20.0, (0.1, 0.2), (0.1, 0.2), (0.1, 0.2)),
    "imagenet_resnet18": (16, 400, 50, 1e-5, (350, 400), 5.0, (0.1, 0.2), (0.3, 0.2), (0.3, 0.3)),
    "imagenet_resnet50": (16, 400, 50, 1e-4, (150, 300, 400), 5.0, (0.4, 0.2), (0.3, 0.1), (0.3, 0.2)),
    "imagenet_mobilenetv2": (16, 400, 4, 1e-5, (350, 400), 5.0, (0.1, 0.2), (0.1, 0.3), (0.1, 0.2)),
}
RESNET50_DECAYS = {3: (150, 300, 400), 4: (200, 300, 400), 5: (350, 400)}


@pytest.mark.parametrize("row", PAPER)
@pytest.mark.parametrize("bits", [3, 4, 5])
def test_settings_are_the_papers(row, bits):
    config = load_config(f"paper/{row}_w{bits}a{bits}")
    batch, epochs, warmup, lr, decays, temperature, *by_bits = PAPER[row]
    if row == "imagenet_resnet50":
        decays = RESNET50_DECAYS[bits]
    assert (config.batch_size, config.epochs, config.warmup_epochs, config.steps_per_epoch) == (
        batch,
        epochs,
        warmup,
        200,
    )
    assert (config.student.lr, config.generator.lr, config.decay_epochs) == (lr, 1e-3, decays)
    assert (config.loss.temperature, config.loss.lambda_upper, config.loss.alpha_as) == (temperature, 0.8, 0.1)
    assert (config.loss.lambda_lower, config.loss.alpha_ds) == by_bits[bits - 3]
    assert config.generator.conditional == row.startswith("imagenet")
    text = (CONFIGS / "paper" / f"{row}_w{bits}a{bits}.py").read_text()
    assert f"--config configs/paper/{row}_w{bits}a{bits}.py" in text
    assert "Measured here" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_by_name_and_path_and_is_allowed(name):
    by_name, by_path = load_config(name), load_config(CONFIGS / f"{name}.py")
    assert by_name.to_dict() == by_path.to_dict()
    check_config(by_name)
    bits = int(name[-1])
    trainer = make_trainer(by_name)
    assert trainer.spec.weight_bits == trainer.spec.act_bits == bits


def test_each_network_has_its_recommended_and_its_released_settings():
    assert {f"paper/{name}" for name in RECOMMENDED} - {"paper/digits_w2a2"} == set(RELEASED)
    assert len(RELEASED) == 15


@pytest.mark.parametrize("name", [name for name in RECOMMENDED if not name.startswith("digits")])
def test_a_recommended_config_says_how_it_is_run_and_what_was_measured(name):
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"--config configs/{name}.py" in text
    assert "Measured here" in text
    config = load_config(name)
    assert not make_trainer(config).losses.watches_student
    assert config.student.schedule == "cosine"


@pytest.mark.parametrize("name", ["digits_w2a2", "cifar10_w3a3"])
def test_a_saved_config_is_read_back(tmp_path, name):
    config = load_config(name)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_config(tmp_path / "config.json").to_dict() == config.to_dict()


def test_every_setting_is_checked():
    config = default_config()
    leaves = {key for key, _ in _flat(config.to_dict())}
    assert leaves == set(CHECKS)


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", -1, "from 0"),
        ("seed", 1.5, "whole numbers"),
        ("mean", (0.5,), "3 numbers"),
        ("mean", (0.5, 0.5, 127.0), "from 0 to 1"),
        ("mean", 0.5, "tuples"),
        ("std", (0.5, 0.5, 0.0), "above 0"),
        ("std", (0.2, 0.2, 0.2, 0.2), "3 numbers"),
        ("network", "resnet21", "resnet20_cifar10"),
        ("dataset", "mnist", "digits"),
        ("dataset", "cifar100", "classes 10"),
        ("dataset", "digits", "image_size 32"),
        ("batch_size", 0, "from 2"),
        ("batch_size", True, "from 2"),
        ("epochs", 0, "from 1"),
        ("steps_per_epoch", "200", "from 1"),
        ("warmup_epochs", 201, "up to config.epochs, 200"),
        ("eval", "train", "'none'"),
        ("keep_checkpoints", 0, "from 1"),
        ("keep_best", 1, "True and False"),
        ("resume", "yes", "True and False"),
        ("on_nonfinite", "go", "'skip'"),
        ("precision", "bfloat16", "'tf32'"),
        ("quant.weight_bits", 1, "2 to 8"),
        ("quant.weight_bits", 9, "2 to 8"),
        ("quant.act_bits", 3.0, "2 to 8"),
        ("quant.weight_granularity", "channel", "out_channel"),
        ("quant.weight_ranges", "best", "mse"),
        ("quant.act_granularity", "kernel", "sample_channel"),
        ("quant.placement", "output", "operand"),
        ("quant.impl", "cuda", "pallas"),
        ("student.lr", -1e-4, "from 0"),
        ("student.lr", float("nan"), "finite"),
        ("student.momentum", 1.5, "below 1"),
        ("student.ema_decay", 1, "below 1"),
        ("generator.betas", (0.5,), "pairs"),
        ("decay_epochs", (200, 100), "increasing"),
        ("loss.temperature", 0.0, "above 0"),
        ("loss.lambda_lower", 0.9, "up to config.loss.lambda_upper"),
        ("profile.steps", -1, "from 0"),
        ("generator.conditional", 1, "True and False"),
        ("teacher_training.flip", 1, "True and False"),
        ("teacher_training.label_smoothing", 1.5, "to 1"),
        ("teacher_training.small_epochs", 51, "up to config.teacher_training.epochs, 50"),
        ("teacher_training.small_size", 33, "32 pixels of cifar10"),
    ],
)
def test_bad_values_are_refused(key, value, allowed):
    config = default_config()
    *parents, leaf = key.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    with config.ignore_type():
        section[leaf] = value
    with one_line_error(ValueError, f"config.{key}", str(value), allowed):
        check_config(config)


def test_an_unknown_setting_is_refused():
    config = default_config()
    config.quant.bits = 3
    with one_line_error(ValueError, "config.quant.bits", "no such setting"):
        check_config(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ("get_config",)),
        ("import nothing_like_it", ("nothing_like_it",)),
        ("def get_config():\n    return {}", ("dict", "ConfigDict")),
    ],
)
def test_bad_config_files_are_refused(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with one_line_error(ValueError, "mine.py", *words):
        load_config(path)


def test_an_unknown_config_lists_those_there_are():
    with one_line_error(ValueError, "'cifar10_w9a9'", *NAMES):
        load_config("cifar10_w9a9")
