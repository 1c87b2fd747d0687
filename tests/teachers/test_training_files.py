"""Checkpoints as training scripts leave them: wrapped, renamed, and beside what is no tensor."""

import argparse
import collections
import functools
import gzip
import io
import logging
import os
import pickle
import re
import tarfile
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from granq_jax import Generator, QuantSpec, Trainer, create_model, load_torch
from granq_jax.models.mobilenet_v2 import MobileNetV2
from granq_jax.models.registry import variants
from granq_jax.runs.checkpoint import Checkpoints, save_variables
from granq_jax.runs.student import state_of_run
from granq_jax.teachers.torch_import import torch_name
from granq_jax.teachers.torch_names import namings
from tests.conftest import one_line_error
from tests.pth_files import Raw, legacy, tensors_of, zipped

NAME = "resnet8_digits"
KEY = "output.weight"
SHORT = 700  # characters of a message, a path included


@functools.cache
def plain(name=NAME, zoo="pytorchcv", seed=0):
    naming = next(naming for naming in namings(name) if naming.zoo == zoo)
    random = np.random.default_rng(seed)
    tensors = {}
    for path, key in naming.names.items():
        shape = naming.shapes[path]
        shape = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        tensors[key] = random.uniform(0.5, 1.5, shape).astype(np.float32)
    return tensors


def loads(source, name=NAME, zoo="pytorchcv"):
    """Asserts that ``source`` gives the variables of :func:`plain`."""
    expected = load_torch(name, plain(name, zoo))
    jax.tree.map(np.testing.assert_array_equal, load_torch(name, source), expected)


def is_refused(source, *words, name=NAME):
    with pytest.raises(ValueError, match=r"^teacher: ") as caught:
        load_torch(name, source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < SHORT + len(str(source)) * (not isinstance(source, dict))
    for word in words:
        assert word in message, (word, message)
    return message


def below(prefix, tensors=None):
    return {prefix + key: value for key, value in (plain() if tensors is None else tensors).items()}


def pickled_object(value):
    """``value`` within a pickle of others."""
    return Raw(pickle.dumps(value, 2)[2:-1])


class Settings:
    """What a training script keeps: a class that whoever reads the file may not have."""

    def __init__(self):
        self.lr = 0.1


class Net:
    """A stand-in for a module of PyTorch's: its state has the same keys."""

    def __init__(self):
        self.__dict__.update(training=False, _parameters={}, _buffers={}, _modules={"conv": Settings()})


def whole(content, **options):
    """A file of PyTorch's that holds ``content``, whose arrays are tensors."""
    storages = {}

    def described(value):
        if isinstance(value, np.ndarray):
            tensor, content = tensors_of({"": value})
            key = str(len(storages))
            storages[key] = content["0"]
            return type(tensor[""])(value, key)
        return {key: described(item) for key, item in value.items()} if isinstance(value, dict) else value

    return zipped(described(content), storages, **options)


OPTIMIZER = {
    "state": {0: {"step": 3, "momentum_buffer": np.ones((3, 2), np.float32)}},
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
}
COUNTER = np.array(7)
SAVED = {
    "alone": lambda: plain(),
    "counters": lambda: plain() | {"features.init_block.bn.num_batches_tracked": COUNTER},
    "profiled": lambda: plain() | {"total_ops": np.zeros(1), "features.total_params": np.zeros(1)},
    "in parallel": lambda: below("module."),
    "compiled": lambda: below("_orig_mod."),
    "compiled in parallel": lambda: below("module._orig_mod."),
    "a part in parallel": lambda: {
        key.replace("features.", "features.module."): value for key, value in plain().items()
    },
    "of a module": lambda: below("model."),
    "of a module's module": lambda: below("net.backbone.model."),
    "averaged": lambda: below("module.") | {"n_averaged": COUNTER},
    "beside numbers": lambda: (
        plain() | {"epoch": 3, "acc": 0.9, "arch": "resnet", "scaler": None, "losses": [0.1, 0.2]}
    ),
    "with an optimizer": lambda: {"epoch": 3, "state_dict": below("module."), "optimizer": OPTIMIZER},
    "net": lambda: {"net": below("module."), "acc": 93.5, "epoch": 199},
    "weights": lambda: {"weights": plain()},
    "deep": lambda: {"model": {"state_dict": plain(), "meta": {"lr": 0.1}}, "epoch": 1},
    "twice the same": lambda: {"model": plain(), "model_ema": dict(plain())},
    "beside another network": lambda: {"student": plain(), "teacher": plain("resnet20_cifar10")},
    "Lightning's": lambda: {
        "state_dict": below("model."),
        "pytorch-lightning_version": "2.4",
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": np.array(0.5, np.float32)}},
    },
    "arguments": lambda: {"args": pickled_object(argparse.Namespace(lr=0.1)), "model": plain()},
    "an object": lambda: {"config": pickled_object(Settings()), "model": plain()},
    "NumPy's numbers": lambda: (
        {"best": pickled_object(np.float64(92.5)), "steps": pickled_object(np.int64(3))} | plain()
    ),
    "an array": lambda: {"history": pickled_object(np.arange(6.0).reshape(2, 3)), "model": plain()},
    "counts": lambda: {"schedule": pickled_object(collections.Counter({30: 1})), "model": plain()},
    "a set": lambda: {"seen": Raw(b"c__builtin__\nset\n](K\x01K\x02e\x85R"), "model": plain()},
    "a default": lambda: {"log": pickled_object(collections.defaultdict(list, a=[1])), "model": plain()},
    "other keys": lambda: {"by size": {(1, 2): 3, 0.5: 4, -1: 5, 10**12: 6}, "model": plain()},
}


@pytest.mark.parametrize("kind", SAVED)
def test_what_a_training_script_saves_is_read(tmp_path, kind):
    content = SAVED[kind]()
    if kind == "other keys":
        content["by size"] = pickled_object(content["by size"])
    (tmp_path / "checkpoint.pth.tar").write_bytes(whole(content))
    loads(tmp_path / "checkpoint.pth.tar")


@pytest.mark.parametrize("kind", ["in parallel", "with an optimizer", "deep", "averaged", "beside numbers"])
def test_the_same_of_what_pytorch_has_loaded(kind):
    loads(SAVED[kind]())


def write_npz(path):
    with path.open("wb") as file:
        np.savez(file, **plain())


WRITERS = {
    "zip": lambda path: path.write_bytes(whole(plain())),
    "legacy": lambda path: path.write_bytes(legacy(*tensors_of(plain(), legacy=True))),
    "npz": write_npz,
    "safetensors": lambda path: safetensors.numpy.save_file(plain(), path),
    "pickle": lambda path: path.write_bytes(pickle.dumps(plain())),
    "pickle, protocol 2": lambda path: path.write_bytes(pickle.dumps({"model": plain()}, 2)),
}


@pytest.mark.parametrize("suffix", [".pth", ".th", ".ckpt", ".bin", ".npz", ".safetensors", ""])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_content_of_a_file_says_what_it_is(tmp_path, kind, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    WRITERS[kind](path)
    loads(path)


def test_a_safetensors_header_may_begin_like_a_pickle(tmp_path):
    tensors = plain()
    for length in range(200):  # until the header's length is 0x..80 and a few bytes
        content = safetensors.numpy.save(tensors, {"about": "x" * length})
        if content[0] == 0x80:
            break
    (tmp_path / "t.safetensors").write_bytes(content)
    loads(tmp_path / "t.safetensors")


def other_files():
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"))
    around = io.BytesIO()
    with zipfile.ZipFile(around, "w") as archive:
        archive.writestr("net.pth", whole(plain()))
    program = whole(plain(), more=[("archive/constants.pkl", b""), ("archive/code/net.py", b"")])
    return {
        "model.h5": (b"\x89HDF\r\n\x1a\n", ["HDF5"]),
        "model.pth.gz": (gzip.compress(b"a"), ["gzip", "unpack"]),
        "model.pth.tar": (tar.getvalue(), ["tar", "unpack"]),
        "model.pth.zip": (around.getvalue(), ["zip", "net.pth", "unpack"]),
        "scripted.pt": (program, ["TorchScript", "state_dict()"]),
        "empty.pth": (b"", ["empty"]),
        "page.pth": (b"<!DOCTYPE html><html>", [".safetensors"]),
    }


@pytest.mark.parametrize("file", other_files())
def test_files_of_other_kinds_are_named(tmp_path, file):
    content, words = other_files()[file]
    (tmp_path / file).write_bytes(content)
    is_refused(tmp_path / file, file, *words)


@pytest.mark.parametrize("content", [lambda net: net, lambda net: {"net": net, "epoch": 3}], ids=["alone", "beside"])
def test_a_whole_module_is_refused_with_what_to_save_instead(tmp_path, content):
    (tmp_path / "t.pth").write_bytes(zipped(content(pickled_object(Net())), {}))
    is_refused(tmp_path / "t.pth", "t.pth", "whole", "Net", "torch.save(model.state_dict(), FILE)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickled_object(Settings()), ["Settings"]),
        ([1.0, 2.0], ["list"]),
        ({"epoch": 3}, ["surplus epoch"]),
        ({}, ["dict", "tensors by name"]),
        ({"args": pickled_object(Settings())}, ["no tensor", NAME]),
    ],
    ids=["an object", "a list", "numbers", "nothing", "arguments"],
)
def test_files_without_tensors_say_what_they_hold(tmp_path, content, words):
    (tmp_path / "t.pth").write_bytes(zipped(content, {}))
    is_refused(tmp_path / "t.pth", "t.pth", *words)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("place", ["beside", "within", "instead"])
def test_no_code_is_run_wherever_it_is(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    code = pickled_object(Runs())
    content = {
        "beside": {"model": plain(), "more": code},
        "within": {"model": plain() | {"more": code}},
        "instead": {"model": plain() | {KEY: code}},
    }[place]
    (tmp_path / "t.pth").write_bytes(whole(content))
    if place == "instead":
        is_refused(tmp_path / "t.pth", KEY)
    else:
        loads(tmp_path / "t.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (lambda a, b: {"model": a, "model_ema": b}, ["['model']", "['model_ema']"]),
        (lambda a, b: below("model.", a) | below("ema_model.", b), ["'model.'", "'ema_model.'"]),
        (lambda a, b: {"state_dict": below("module.", a)} | b, ["['state_dict']", "on their own"]),
    ],
    ids=["dictionaries", "prefixes", "both"],
)
def test_two_that_fit_and_differ_are_refused_by_name(tmp_path, content, places):
    (tmp_path / "t.pth").write_bytes(whole(content(plain(), plain(seed=1))))
    is_refused(tmp_path / "t.pth", "t.pth", "two", "differ", *places)


def test_a_damaged_file_of_two_is_to_blame(tmp_path):
    content = whole({"model": plain(), "model_ema": plain(seed=1)})
    place = content.index(plain(seed=1)[KEY].tobytes())
    (tmp_path / "t.pth").write_bytes(content[:place] + b"!" + content[place + 1 :])
    is_refused(tmp_path / "t.pth", "t.pth", "cannot be read")


def test_what_is_there_instead_of_a_tensor_is_named(tmp_path):
    quantized = Raw(b"ctorch._utils\n_rebuild_qtensor\n)R")
    (tmp_path / "t.pth").write_bytes(whole(plain() | {KEY: quantized}))
    is_refused(tmp_path / "t.pth", f"{KEY} is a torch._utils._rebuild_qtensor, allowed are tensors")


@pytest.mark.parametrize("more", ["model.fc.weight", "0.mean", "criterion.weight"])
def test_a_tensor_outside_the_prefix_is_not_left_out(more):
    message = is_refused(below("model.") | {more: np.ones((10, 3), np.float32)}, f"surplus {more}", "'model.'")
    assert "missing" not in message


def without(*keys):
    return {key: value for key, value in plain().items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "first"),
    [
        (lambda: plain() | {KEY: np.ones((100, 64), np.float32)}, f"{KEY} has shape [100, 64] instead of [10, 64]"),
        (lambda: without(KEY) | {"fc.weight": plain()[KEY]}, "surplus fc.weight; missing output.weight"),
        (lambda: plain("resnet20_cifar10"), "features.init_block.conv.weight has shape [16, 3, 3, 3]"),
        (lambda: {"state_dict": below("module.", without(KEY))}, "missing output.weight"),
        (lambda: plain() | {KEY: plain()[KEY].astype(np.int8)}, f"{KEY} has dtype int8"),
        (lambda: {f"encoder.{i}.weight": plain()[KEY] for i in range(300)}, "holds no tensor by a name of"),
        (lambda: {f"{'x' * 5000}{i}": plain()[KEY] for i in range(300)}, "holds no tensor by a name of"),
    ],
    ids=["classes", "another name", "another network", "one is missing", "dtype", "other names", "long names"],
)
def test_messages_are_short_and_begin_with_what_is_wrong(content, first):
    message = load_fails(content())
    assert first in message[:200]
    assert len(message) < (SHORT if "xxx" not in message else 5 * SHORT)


def load_fails(content):
    with pytest.raises(ValueError, match=r"^teacher: ") as caught:
        load_torch(NAME, content)
    return str(caught.value)


CIFAR = "resnet20_cifar10"


def renamed(tensors, *changes):
    for pattern, replacement in changes:
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    return tensors


def test_names_of_cifar_resnets_are_torchvisions():
    path = "params", "stage2", "unit1"
    assert torch_name(CIFAR, (*path, "shortcut", "conv", "kernel"), "torchvision") == "layer2.0.downsample.0.weight"
    assert torch_name(CIFAR, (*path, "conv2", "norm", "bn", "bias"), "torchvision") == "layer2.0.bn2.bias"
    assert torch_name(CIFAR, ("params", "head", "kernel"), "torchvision") == "fc.weight"
    # The same tensors by both names.
    by_path = {
        naming.zoo: {path: plain(CIFAR)[dict(namings(CIFAR)[0].names)[path]] for path in naming.names}
        for naming in namings(CIFAR)
    }
    naming = next(naming for naming in namings(CIFAR) if naming.zoo == "torchvision")
    loads({key: by_path["torchvision"][path] for path, key in naming.names.items()}, CIFAR)


@pytest.mark.parametrize(
    "changes",
    [
        [(r"^fc\.", "linear.")],
        [(r"\.downsample\.", ".shortcut.")],
        [(r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut."), (r"^", "module.")],
    ],
    ids=["linear", "shortcut", "both, in parallel"],
)
def test_other_words_of_training_scripts_are_understood(changes):
    loads(renamed(plain(CIFAR, "torchvision"), *changes), CIFAR, "torchvision")


def test_shortcuts_without_weights_are_another_network():
    tensors = {key: value for key, value in plain(CIFAR, "torchvision").items() if "downsample" not in key}
    message = is_refused(renamed(tensors, (r"^fc\.", "linear.")), "option A", "option B", "shortcuts", name=CIFAR)
    assert "missing" not in message
    del tensors["fc.bias"]
    assert "option A" not in is_refused(tensors, "missing", name=CIFAR)


MOBILENET = "mobilenetv2_w1"
# Some names as torchvision 0.20, timm 1.0 and mobilenetv2.pytorch have them, in the order of the layers.
EXCERPTS = {
    "torchvision": [
        *("features.0.0.weight", "features.0.1.weight", "features.1.conv.0.0.weight", "features.1.conv.0.1.bias"),
        *("features.1.conv.1.weight", "features.1.conv.2.running_var", "features.2.conv.0.0.weight"),
        *("features.2.conv.1.0.weight", "features.2.conv.1.1.weight", "features.2.conv.2.weight"),
        *("features.2.conv.3.bias", "features.17.conv.2.weight", "features.17.conv.3.running_mean"),
        *("features.18.0.weight", "features.18.1.weight", "classifier.1.weight", "classifier.1.bias"),
    ],
    "timm": [
        *("conv_stem.weight", "bn1.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.bn1.bias"),
        *("blocks.0.0.conv_pw.weight", "blocks.0.0.bn2.running_var", "blocks.1.0.conv_pw.weight"),
        *("blocks.1.0.conv_dw.weight", "blocks.1.0.bn2.weight", "blocks.1.0.conv_pwl.weight"),
        *("blocks.1.0.bn3.bias", "blocks.6.0.conv_pwl.weight", "blocks.6.0.bn3.running_mean"),
        *("conv_head.weight", "bn2.weight", "classifier.weight", "classifier.bias"),
    ],
    "mobilenetv2.pytorch": [
        *("features.0.0.weight", "features.0.1.weight", "features.1.conv.0.weight", "features.1.conv.1.bias"),
        *("features.1.conv.3.weight", "features.1.conv.4.running_var", "features.2.conv.0.weight"),
        *("features.2.conv.3.weight", "features.2.conv.4.weight", "features.2.conv.6.weight"),
        *("features.2.conv.7.bias", "features.17.conv.6.weight", "features.17.conv.7.running_mean"),
        *("conv.0.weight", "conv.1.weight", "classifier.weight", "classifier.bias"),
    ],
}


def naming_of(zoo):
    return next(naming for naming in namings(MOBILENET) if naming.zoo == zoo)


@pytest.mark.parametrize("zoo", EXCERPTS)
def test_names_of_mobilenets(zoo):
    names = naming_of(zoo).names
    assert len(set(names.values())) == len(names) == 262
    paths = {key: path for path, key in names.items()}
    expected = {key: path for path, key in naming_of("torchvision").names.items()}
    for theirs, torchvisions in zip(EXCERPTS[zoo], EXCERPTS["torchvision"], strict=True):
        assert paths[theirs] == expected[torchvisions]


@pytest.mark.parametrize("zoo", EXCERPTS)
def test_mobilenets_of_every_zoo_give_the_same_variables(zoo, caplog):
    caplog.set_level(logging.INFO, "granq_jax")
    naming, torchvisions = naming_of(zoo), plain(MOBILENET, "torchvision")
    tensors = {key: torchvisions[naming_of("torchvision").names[path]] for path, key in naming.names.items()}
    assert tensors[naming.names["params", "head", "kernel"]].shape == (1000, 1280, 1, 1)
    for key, value in tensors.items():
        if key.startswith("classifier") and value.ndim == 4:
            tensors[key] = value[:, :, 0, 0]  # a linear layer there
    variables = load_torch(MOBILENET, tensors)
    assert f"{MOBILENET} in {zoo}'s names" in caplog.text
    assert "conv1" not in variables["params"]["stage1"]["unit1"]
    assert variables["params"]["head"]["kernel"].shape == (1, 1, 1280, 1000)
    np.testing.assert_array_equal(
        variables["params"]["head"]["kernel"][0, 0], torchvisions["classifier.1.weight"][:, :, 0, 0].T
    )
    jax.tree.map(np.testing.assert_array_equal, variables, load_torch(MOBILENET, torchvisions))


def test_a_mobilenet_in_own_names_is_read_as_it_was_built(tmp_path):
    for zoo in "pytorchcv", "timm":
        variables = load_torch(MOBILENET, plain(MOBILENET, zoo))
        save_variables(tmp_path / "own.safetensors", variables)
        jax.tree.map(np.testing.assert_array_equal, load_torch(MOBILENET, tmp_path / "own.safetensors"), variables)


@pytest.mark.slow
def test_a_model_computes_what_its_variables_are_of():
    """The first 1x1 convolution and the head's bias count where they are, and only there."""
    model, images = create_model(MOBILENET), np.ones((1, 32, 32, 3), np.float32)
    built = load_torch(MOBILENET, plain(MOBILENET, "torchvision"))
    logits = model.apply(built, images)
    head = built["params"]["head"]
    moved = built | {"params": built["params"] | {"head": head | {"bias": head["bias"] + 1}}}
    np.testing.assert_allclose(model.apply(moved, images) - logits, 1, rtol=1e-3)
    other = load_torch(MOBILENET, plain(MOBILENET))
    assert "conv1" in other["params"]["stage1"]["unit1"]
    assert "bias" not in other["params"]["head"]
    assert jax.tree.structure(model.init(jax.random.key(0), images)) == jax.tree.structure(other)


def test_a_run_of_any_build_is_found_again(tmp_path):
    """From its checkpoint alone, which says how its network was built."""
    trainer = Trainer(model=MobileNetV2(10), generator=Generator(classes=10, image_size=32), spec=QuantSpec())
    images = np.ones((1, 32, 32, 3), np.float32)
    for number, build in enumerate(variants(trainer.model)):
        shapes = trainer.state_shapes(jax.eval_shape(build.init, jax.random.key(0), images))
        state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(3, state)
        step, found = state_of_run(trainer, tmp_path / str(number))
        assert step == 3
        assert jax.tree.structure(found) == jax.tree.structure(state)


def test_files_that_lack_what_only_some_builds_have_say_what_is_missing():
    tensors = dict(plain(MOBILENET, "torchvision"))
    del tensors["classifier.1.bias"]
    is_refused(tensors, "missing classifier.1.bias", name=MOBILENET)


def test_bottlenecks_in_torchvisions_names_are_resnet50b():
    with one_line_error(ValueError, "teacher", "torchvision", "'resnet50'", "resnet50b"):
        load_torch("resnet50", below("module.", plain("resnet50b", "torchvision")))


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.pth").write_bytes(whole(plain()))
    loads("~/t.pth")
    with one_line_error(ValueError, "teacher", "'~nobody-of-that-name/t.pth'"):
        load_torch(NAME, "~nobody-of-that-name/t.pth")
