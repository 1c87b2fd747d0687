"""What the benchmarks compare with computes the same, and what they count is there."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax import Generator, QuantSpec, Trainer, create_model, fake_quant
from granq_jax.data.datasets import DATASETS
from granq_jax.data.splits import MemorySplit
from granq_jax.distill import joint_step as joint
from granq_jax.runs.accuracy import student_accuracy
from granq_jax.teachers.torch_import import load_torch
from tests.golden_figures import CIFAR, generator_variables, state_dict

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("pytorchcv", exc_type=ImportError)

NAME = "resnet20_cifar10"
GENERATOR_NAMES = {
    "label_emb": "embed",
    "l1.0": "dense",
    "conv_blocks0.0": "norm0",
    "conv_blocks1.0": "body.1",
    "conv_blocks1.1": "body.2",
    "conv_blocks2.0": "body.5",
    "conv_blocks2.1": "body.6",
    "conv_blocks2.3": "body.8",
    "conv_blocks2.5": "body.10",
}


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield
    sys.path.pop(0)


def load(module, tensors, rename=str):
    state = {rename(name): torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    missing, unexpected = module.double().load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


def generator_name(name):
    module, _, leaf = name.rpartition(".")
    return f"{GENERATOR_NAMES[module]}.{leaf}"


def student_name(student):
    """Renames the weights that are quantized."""
    quantized = {f"{path}.weight" for path, module in student.named_modules() if hasattr(module, "parametrizations")}
    return lambda name: name.replace(".weight", ".parametrizations.weight.original") if name in quantized else name


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_three_joint_steps_of_the_baseline_have_our_losses(memory_format, x64, monkeypatch):
    from torch_baseline import JointStep

    theirs = JointStep(batch=16, memory_format=memory_format)
    network, generator = state_dict(CIFAR[f"net/{NAME}/keys"]), state_dict(CIFAR["gen/keys"])
    load(theirs.teacher, network)
    load(theirs.student, network, student_name(theirs.student))
    load(theirs.generator, generator, generator_name)

    teacher = load_torch(NAME, network)
    trainer = Trainer(
        model=create_model(NAME),
        generator=Generator(classes=10),
        spec=QuantSpec(weight_bits=3, act_bits=3),
        batch_size=16,
        dtype=jnp.float64,
    )
    state = trainer.init(teacher).replace(generator=generator_variables(generator))
    ours = jax.jit(joint.update, static_argnums=(0, 1))
    for z, labels in zip(CIFAR["gen/z"][:3], CIFAR["gen/labels"][:3], strict=True):
        monkeypatch.setattr(torch, "randn", lambda *_, z=z, **__: torch.from_numpy(z))
        monkeypatch.setattr(torch, "randint", lambda *_, labels=labels, **__: torch.from_numpy(labels))
        state, metrics = ours(trainer, False, state, teacher, jnp.asarray(z), jnp.asarray(labels))
        np.testing.assert_allclose(theirs(), [metrics["loss_g"], metrics["loss_s"]], rtol=1e-6)


def test_the_bundled_teacher_can_be_given_to_the_baseline():
    from torch_baseline import JointStep
    from torch_recipe import torch_weights

    network = state_dict(CIFAR[f"net/{NAME}/keys"])
    weights = torch_weights(NAME, load_torch(NAME, network))
    assert weights.keys() == {name for name in network if not name.endswith("num_batches_tracked")}
    for name, value in weights.items():
        np.testing.assert_allclose(value, network[name], rtol=1e-6, err_msg=name)
    step = JointStep(batch=2, weights=weights)
    images = torch.ones(1, 3, 32, 32)
    assert not torch.equal(step.teacher(images), step.student(images))  # which is quantized, and trains, alone
    before = [parameter.clone() for parameter in step.student.parameters()]
    assert step(warmup=True)[1] is None
    assert all(map(torch.equal, before, step.student.parameters()))
    assert step()[1] is not None
    assert not any(map(torch.equal, before, step.student.parameters()))


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_the_baseline_quantizes_as_we_do(memory_format, x64):
    from torch_baseline import MEMORY_FORMATS, FakeQuant

    x = np.random.default_rng(0).normal(size=(3, 5, 7, 4))
    theirs = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=MEMORY_FORMATS[memory_format])
    theirs.requires_grad_()
    y = FakeQuant.apply(theirs, 3, 2)
    np.testing.assert_allclose(y.detach().permute(0, 2, 3, 1), fake_quant(jnp.asarray(x), bits=3), rtol=1e-12)
    y.square().sum().backward()
    np.testing.assert_allclose(theirs.grad, 2 * y.detach())


@pytest.mark.parametrize("classes", [10, 100])
def test_flops_are_those_counted_by_hand(classes):
    from joint_step import count_flops

    def conv(size, taps, inputs, outputs):
        return 2 * size**2 * taps * inputs * outputs

    stem, network = conv(32, 9, 3, 16), 6 * conv(32, 9, 16, 16)
    for size, width in ((16, 32), (8, 64)):
        network += conv(size, 9, width // 2, width) + conv(size, 1, width // 2, width) + 5 * conv(size, 9, width, width)
    network += 2 * 64 * classes
    generator = 2 * 100 * 8 * 8 * 128 + 4 * conv(8, 4, 128, 128) + 4 * conv(16, 4, 128, 64) + conv(32, 9, 64, 3)
    counted = count_flops(f"resnet20_cifar{classes}", 16)
    assert counted["generator, to parameters"] == 16 * generator
    assert counted["student, forward"] == counted["teacher, to images"] == 16 * (network + stem)
    assert counted["student, to activations"] == 16 * network


@pytest.mark.parametrize(("network", "gflop"), [("resnet18", 3.63), ("resnet50", 7.71), ("mobilenetv2_w1", 0.627)])
def test_flops_of_the_large_networks_are_the_published_ones(network, gflop):
    from joint_step import count_flops

    assert count_flops(network, 1)["teacher, forward"] == pytest.approx(1e9 * gflop, rel=0.01)


def test_the_baseline_evaluates_as_we_do():
    from torch_baseline import Evaluation

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 32, 32, 3), np.uint8), rng.integers(0, 10, 200, np.int32)
    dataset, network = DATASETS["cifar10"], state_dict(CIFAR[f"net/{NAME}/keys"])
    theirs = Evaluation(images, labels, 100, "channels_last", dataset.mean, dataset.std)
    load(theirs.student, network, student_name(theirs.student))
    theirs.student.float()
    trainer = Trainer(model=create_model(NAME), generator=Generator(classes=10), spec=QuantSpec(), batch_size=16)
    split = MemorySplit(dataset, images, labels)
    teacher = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), load_torch(NAME, network))
    ours = student_accuracy(trainer, split, 100, jax.local_devices()[:1])(teacher).top1
    assert abs(theirs() - ours) <= 2  # in float32 values near a rounding boundary differ


def test_the_benchmarks_run():
    import evaluate
    import joint_step
    import prescaling

    assert joint_step.compare(NAME, 2, 1, 1)["ratio"] > 0
    assert evaluate.compare(NAME, 8, 4, 1)["ratio"] > 0
    assert (32, 32, 16) in prescaling.activation_shapes(NAME)
    assert all(milliseconds > 0 for milliseconds in prescaling.measure((2, 4, 4, 3), rounds=2))
