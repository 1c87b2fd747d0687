import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from granq_jax import create_model, load_torch
from granq_jax.teachers.torch_import import torch_name
from tests.conftest import one_line_error
from tests.golden_figures import CIFAR, IMAGENET, state_dict

NAME = "resnet20_cifar10"


@pytest.fixture
def tensors():
    return {name: value.astype(np.float32) for name, value in state_dict(CIFAR[f"net/{NAME}/keys"]).items()}


def test_layouts(tensors):
    variables = load_torch(NAME, tensors)
    kernel = variables["params"]["stage2"]["unit1"]["conv1"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["features.stage2.unit1.body.conv1.conv.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], tensors["output.weight"].T)
    shapes = jax.eval_shape(create_model(NAME).init, jax.random.key(0), np.ones((1, 32, 32, 3), np.float32))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)


def test_float64_is_kept(x64, tensors):
    variables = load_torch(NAME, {name: value.astype(np.float64) for name, value in tensors.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float64")}


def test_files_of_each_kind_give_the_same_variables(tmp_path, tensors):
    with_counter = {**tensors, "features.init_block.bn.num_batches_tracked": np.array(7)}
    np.savez(tmp_path / "t.npz", **with_counter)
    safetensors.numpy.save_file(with_counter, tmp_path / "t.safetensors")
    expected = load_torch(NAME, tensors)
    for file in ("t.npz", "t.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, load_torch(NAME, tmp_path / file), expected)


def test_every_problem_is_listed_by_name(tensors):
    del tensors["output.bias"]
    tensors["fc.weight"] = np.ones((2, 2), np.float32)
    tensors["output.weight"] = np.ones((100, 64), np.float32)
    tensors["features.init_block.bn.bias"] = np.zeros(16, np.int32)
    with one_line_error(
        ValueError,
        NAME,
        "missing output.bias",
        "surplus fc.weight",
        "output.weight has shape [100, 64] instead of [10, 64]",
        "features.init_block.bn.bias has dtype int32",
    ):
        load_torch(NAME, tensors)


@pytest.mark.parametrize(
    ("error", "file", "words"),
    [
        (FileNotFoundError, "missing.npz", ("missing.npz", "no such file")),
        (ValueError, "broken.npz", ("broken.npz", "cannot be read")),
        (ValueError, "broken.safetensors", ("broken.safetensors", "cannot be read")),
    ],
)
def test_bad_files_are_refused(tmp_path, error, file, words):
    if file.startswith("broken"):
        (tmp_path / file).write_bytes(b"not what it says")
    with one_line_error(error, "teacher", *words):
        load_torch(NAME, tmp_path / file)


def test_an_unknown_network_is_refused():
    with one_line_error(ValueError, "network", "'resnet21'", NAME):
        load_torch("resnet21", {})


@pytest.mark.parametrize("name", [NAME, "resnet20_cifar100", "resnet18", "resnet50", "mobilenetv2_w1"])
def test_torch_names_cover_the_public_checkpoint(name):
    golden = CIFAR if "cifar" in name else IMAGENET
    paths = flatten_dict(jax.eval_shape(create_model(name).init, jax.random.key(0), np.ones((1, 32, 32, 3))))
    assert {torch_name(name, path) for path in paths} == set(state_dict(golden[f"net/{name}/keys"]))
