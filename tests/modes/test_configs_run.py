"""Every config of the paper's table is traced; those of W3A3 take three joint steps, and are evaluated on a few images.

What XLA compiles for the others differs in constants alone, and takes it up to a minute each.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import granq_jax.modes.opening
import granq_jax.modes.train
from granq_jax import create_model, load_config, train_and_evaluate
from granq_jax.config import make_trainer
from granq_jax.data.datasets import DATASETS
from granq_jax.data.splits import EncodedSplit, MemorySplit
from granq_jax.distill.joint_step import mapped_step
from granq_jax.models.registry import network
from granq_jax.runs.checkpoint import save_variables

ROWS = ("cifar10", "cifar100", "imagenet_resnet18", "imagenet_resnet50", "imagenet_mobilenetv2")


def prepared_split(dataset):
    """Four images: arrays if they are small, photographs of several shapes otherwise."""
    rng = np.random.default_rng(0)
    labels = np.arange(4, dtype=np.int32)
    if dataset.image_size < 100:
        return MemorySplit(dataset, rng.integers(0, 256, (4, 32, 32, 3), np.uint8), labels)

    def photograph(label):
        file = io.BytesIO()
        image = PIL.Image.fromarray(rng.integers(0, 256, (9 + label, 12, 3), np.uint8))
        image.resize((300, 240 + 20 * label)).save(file, "JPEG")
        return file.getvalue(), label

    files = [photograph(label) for label in labels]
    return EncodedSplit(dataset, 4, lambda indices: [files[index] for index in indices], str)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Random weights for each network, in a file."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}

    def teacher(name):
        if name not in made:
            size = network(name).image_size
            images = np.ones((1, size, size, 3), np.float32)
            made[name] = folder / f"{name}.safetensors"
            save_variables(made[name], jax.jit(create_model(name).init)(jax.random.key(0), images))
        return str(made[name])

    return teacher


# Of each network; other numbers of bits are the same program with other constants.
CONFIGS = [f"{folder}{row}_w3a3" for folder in ("", "paper/") for row in ROWS]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_is_traced(name):
    config = load_config(name)
    trainer = make_trainer(config)
    size = network(config.network).image_size
    teacher = jax.eval_shape(trainer.model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    state = trainer.state_shapes(teacher)
    index = jax.ShapeDtypeStruct((1, config.batch_size), jnp.int32)
    after, metrics = jax.eval_shape(mapped_step(trainer, False, jax.devices()[:1]), state, teacher, index)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss_s"].shape == ()
    assert trainer.spec.weight_bits == trainer.spec.act_bits == int(name[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("paper/")])
def test_three_steps_and_an_evaluation(name, teachers, tmp_path, monkeypatch):
    monkeypatch.setattr(granq_jax.modes.opening, "load_split", lambda name, *_: prepared_split(DATASETS[name]))
    config = load_config(name)
    config.teacher = teachers(config.network)
    config.batch_size, config.eval_batch_size = 2, 4
    config.epochs, config.steps_per_epoch, config.warmup_epochs = 3, 1, 1
    result = train_and_evaluate(config, tmp_path)
    assert (result["steps"], result["eval_examples"]) == (3, 4)
    assert result["weight_bits"] == result["act_bits"] == int(name[-1])
    for key in ("teacher", "student"):
        assert 0 <= result[f"{key}_top1"] <= result[f"{key}_top5"] <= 100
    losses = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in losses
    assert "Infinity" not in losses
