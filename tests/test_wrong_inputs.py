"""What is wrong is refused by the command at once, in a line that names it and what is allowed; nothing is written."""

import contextlib
import ctypes
import io
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from granq_jax import main as command
from tests.files.test_tensor_files import state_dict
from tests.pth_files import tensors_of, zipped

DIGITS = "--config=digits_w2a2"
RUN = f"--workdir={Path('new') / 'run'}"
MAX_SECONDS = 5


def setting(key, value, *words, config=DIGITS):
    """A row: one setting, and what is said beside its name and the value."""
    return [config, RUN, f"--config.{key}={value}"], (f"config.{key}", str(value), *words)


def config_file(text, *words, suffix=".py", name="mine"):
    """A row: a config file with a content."""
    content = text if isinstance(text, bytes) else text.encode()
    return [f"--config={name}{suffix}", RUN], ("config", *words), {f"{name}{suffix}": content}


def teacher(name, content, *words):
    """A row: a teacher file with a content."""
    return [DIGITS, RUN, f"--config.teacher={name}", "--config.eval=none"], ("teacher", *words), {name: content}


def body(*lines):
    """A config file that does this to the default settings."""
    text = "".join(f"    {line}\n" for line in ["config = default_config()", *lines, "return config"])
    return f"from granq_jax.config import default_config\ndef get_config():\n{text}"


def npz_of(tensors):
    file = io.BytesIO()
    np.savez(file, **tensors)
    return file.getvalue()


def changed(**tensors):
    return {**state_dict(), **{name.replace("__", "."): value for name, value in tensors.items()}}


def without(name):
    return {key: value for key, value in state_dict().items() if key != name}


# By name: arguments, words of the message, files there are beforehand (bytes; None is a directory).
COMMAND = {
    # Config fields.
    "seed below 0": setting("seed", -1, "from 0"),
    "seed beyond 31 bits": setting("seed", 2**31, "to 2147483647"),
    "seed no number": setting("seed", "one"),
    "seed fractional": setting("seed", "0.5"),
    "seed empty": setting("seed", ""),
    "seed of 5000 digits": ([DIGITS, RUN, "--config.seed=" + "9" * 5000], ("config.seed",)),
    "unknown network": setting("network", "resnet21", "resnet20_cifar10"),
    "unknown data set": setting("dataset", "mnist", "digits"),
    "classes that disagree": setting("dataset", "cifar100", "classes 10", config="--config=cifar10_w3a3"),
    "size that disagrees": setting("dataset", "cifar10", "image_size 8"),
    "batch of 1": setting("batch_size", 1, "from 2"),
    "batch fractional": setting("batch_size", "16.5"),
    "batch true": setting("batch_size", "True"),
    "batch beyond memory": setting("batch_size", 10**12, "to 65536"),
    "images beyond memory": setting("eval_batch_size", 10**12, "to 65536"),
    "more steps than are counted": setting("epochs", 10**12, "2147483647 steps"),
    "no epochs": setting("epochs", 0, "from 1"),
    "epochs negative": setting("epochs", -3, "from 1"),
    "no steps": setting("steps_per_epoch", 0, "from 1"),
    "warm-up longer than the run": setting("warmup_epochs", 11, "config.epochs, 10"),
    "no latent": setting("latent", 0, "from 1"),
    "evaluation of another split": setting("eval", "train", "'none'"),
    "bits 0": setting("quant.weight_bits", 0, "2 to 8"),
    "bits 1": setting("quant.act_bits", 1, "2 to 8"),
    "bits 9": setting("quant.act_bits", 9, "2 to 8"),
    "bits negative": setting("quant.weight_bits", -3, "2 to 8"),
    "bits fractional": setting("quant.weight_bits", "2.5"),
    "bits true": setting("quant.weight_bits", "True"),
    "bits none": setting("quant.act_bits", "None"),
    "granularity of activations for weights": setting("quant.weight_granularity", "sample", "out_channel"),
    "granularity of weights for activations": setting("quant.act_granularity", "kernel", "sample_channel"),
    "unknown placement": setting("quant.placement", "output", "operand"),
    "unknown implementation": setting("quant.impl", "cuda", "pallas"),
    "kernel without a GPU": setting("quant.impl", "pallas", "'xla'"),
    "rate NaN": setting("student.lr", "nan", "finite"),
    "rate infinite": setting("student.lr", "inf", "finite"),
    "rate negative": setting("generator.lr", -0.1, "from 0"),
    "momentum above 1": setting("student.momentum", 1.5, "below 1"),
    "beta 1": setting("generator.betas", "(0.5, 1.0)", "below 1"),
    "one beta": setting("generator.betas", "(0.5,)", "pairs"),
    "betas cut off": setting("generator.betas", "(0.5,"),
    "conditional maybe": setting("generator.conditional", "maybe"),
    "decays that fall": setting("decay_epochs", "(9, 3)", "increasing"),
    "decays fractional": ([DIGITS, RUN, "--config.decay_epochs=(1.5,)"], ("config.decay_epochs",)),
    "bounds crossed": setting("loss.lambda_lower", 0.9, "config.loss.lambda_upper, 0.8"),
    "temperature 0": setting("loss.temperature", 0.0, "above 0"),
    "trace beyond the run": (
        [DIGITS, RUN, "--config.profile.start=999", "--config.profile.steps=9"],
        ("profile.start",),
    ),
    "unknown setting": ([DIGITS, RUN, "--config.quant.bits=3"], ("config.quant.bits", "quant.weight_bits")),
    "section as a setting": ([DIGITS, RUN, "--config.quant=3"], ("config.quant", "quant.weight_bits")),
    "setting without a value": ([DIGITS, RUN, "--config.seed"], ("--config.seed", "--config.KEY=VALUE")),
    "control characters": ([DIGITS, RUN, "--config.network=\x1b[2J"], ("config.network", "x1b[2J", "resnet8_digits")),
    "larger batch than images": setting("teacher_training.batch_size", 2000, "1437"),
    "window larger than the images": (
        [DIGITS, RUN, "--config.teacher_training.small_epochs=1", "--config.teacher_training.small_size=9"],
        ("config.teacher_training.small_size", "8 pixels"),
    ),
    # Flags.
    "no config": ([RUN], ("--config", "not given")),
    "config without a value": (["--config"], ("--config",)),
    "unknown mode": ([DIGITS, RUN, "--mode=invent"], ("--mode", "invent", "train_teacher")),
    "unknown subject": ([DIGITS, RUN, "--mode=evaluate", "--subject=me"], ("--subject", "me", "student")),
    "subject of training": ([DIGITS, RUN, "--subject=both"], ("--subject", "--mode=evaluate")),
    "unknown flag": ([DIGITS, RUN, "--steps=3"], ("--steps=3", "--help")),
    "stray argument": ([DIGITS, RUN, "3"], ("'3'", "--help")),
    "cache in a file": ([DIGITS, RUN, "--compilation-cache=f/c"], ("--compilation-cache", "f/c"), {"f": b""}),
    # Config files.
    "config that is missing": (["--config=none.py", RUN], ("config", "none.py", "digits_w2a2")),
    "config of another kind": config_file("seed: 0", "mine.yaml", ".json", suffix=".yaml"),
    "config that is a directory": (["--config=d.py", RUN], ("config", "d.py"), {"d.py": None}),
    "config with a name too long": ([f"--config={'a' * 300}.py", RUN], ("config", "allowed")),
    "config with a syntax error": config_file("def get_config(:", "mine.py", "SyntaxError"),
    "config that is not Python": config_file(bytes(range(256)), "mine.py"),
    "config that raises": config_file("1 / 0", "mine.py", "ZeroDivisionError"),
    "config that exits": config_file("raise SystemExit(0)", "mine.py", "SystemExit"),
    "config without get_config": config_file("x = 1", "mine.py", "get_config"),
    "config that gives a dict": config_file("def get_config():\n    return {}", "dict", "ConfigDict"),
    "config with an unknown key": config_file(body("config.quant.bits = 3"), "config.quant.bits", "quant.act_bits"),
    "config with a missing key": config_file(body("del config.quant.act_bits"), "config.quant.act_bits", "2 to 8"),
    "config with a missing section": config_file(body("del config.loss"), "config.loss.", "not set"),
    "config with a placeholder": config_file(
        body("from ml_collections import config_dict", "config.seed = config_dict.required_placeholder(int)"),
        "required",
    ),
    "config with an array": config_file(
        body("import numpy", "with config.ignore_type():", "    config.network = numpy.zeros(3)"), "config.network"
    ),
    "JSON that is cut off": config_file('{"seed": ', "mine.json", suffix=".json"),
    "JSON that is a list": config_file("[1]", "mine.json", suffix=".json"),
    "JSON that is nested too deep": config_file("[" * 9000, "mine.json", suffix=".json"),
    "JSON that is no text": config_file(b"\xff\xfe\xff", "mine.json", suffix=".json"),
    "JSON with an unknown key": config_file('{"sed": 1}', "config.sed", suffix=".json"),
    "JSON with NaN": config_file('{"student": {"lr": NaN}}', "config.student.lr", "finite", suffix=".json"),
    # Data directories.
    "no image folder": (
        ["--config=imagenet_resnet18_w3a3", RUN, "--config.dataset=image_folder", "--config.teacher=t.npz"],
        ("config.data_dir", "''", "image folder"),
        {"t.npz": b""},
    ),
    "image folder that is a file": (
        [
            *("--config=imagenet_resnet18_w3a3", RUN, "--config.dataset=image_folder"),
            *("--config.teacher=t.npz", "--config.data_dir=f"),
        ],
        ("config.data_dir", "'f'", "directory"),
        {"f": b"", "t.npz": b""},
    ),
    "image folder that is empty": (
        [
            *("--config=imagenet_resnet18_w3a3", RUN, "--config.dataset=image_folder"),
            *("--config.teacher=t.npz", "--config.data_dir=d"),
        ],
        ("config.data_dir", "'d'", "0 class folders", "1000"),
        {"d": None, "t.npz": b""},
    ),
    "data that are missing": (
        ["--config=cifar10_w3a3", RUN, "--config.data_dir=none"],
        ("config.data_dir", "none", "--config.eval=none"),
    ),
    "data in a file": (
        ["--config=cifar10_w3a3", RUN, "--config.data_dir=f"],
        ("config.data_dir", "'f'", ".npz"),
        {"f": b""},
    ),
    "data that are damaged": (
        ["--config=cifar10_w3a3", RUN, "--config.data_dir=d"],
        ("config.data_dir", "from d", "--config.eval=none"),
        {"d/cifar10/3.0.2/dataset_info.json": b"{", "d/cifar10/3.0.2/features.json": b"{"},
    ),
    # Teacher files.
    "no teacher": setting("teacher", "", "'train'"),
    "teacher that is missing": setting("teacher", "none.pth", "no such file"),
    "teacher that is a directory": ([DIGITS, RUN, "--config.teacher=d"], ("config.teacher", "'d'"), {"d": None}),
    "teacher of another kind": teacher("t.h5", b"\x89HDF\r\n\x1a\n", "t.h5", "HDF5", ".safetensors"),
    "teacher for another network": setting("teacher", "resnet18", "'resnet8_digits'"),
    "teacher not bundled": setting("teacher", "bundled", "'train'"),
    "teacher with a name too long": setting("teacher", "t" * 300 + ".npz", "no such file"),
    "teacher empty .pth": teacher("t.pth", b"", "t.pth", "cannot be read"),
    "teacher empty .npz": teacher("t.npz", b"", "t.npz", "cannot be read"),
    "teacher empty .safetensors": teacher("t.safetensors", b"", "t.safetensors", "cannot be read"),
    "teacher truncated .npz": teacher("t.npz", npz_of(state_dict())[:-99], "t.npz", "cannot be read"),
    "teacher truncated .pth": teacher("t.pth", zipped(*tensors_of(state_dict()))[:-99], "t.pth", "cannot be read"),
    "teacher truncated .safetensors": teacher(
        "t.safetensors", safetensors.numpy.save(state_dict())[:-99], "t.safetensors", "cannot be read"
    ),
    "teacher of no network": teacher(
        "t.npz", npz_of({"weights": np.zeros((2, 2))}), "resnet8_digits", "surplus weights"
    ),
    "teacher that lacks a tensor": teacher("t.npz", npz_of(without("output.bias")), "missing output.bias"),
    "teacher with more classes": teacher(
        "t.npz", npz_of(changed(output__bias=np.zeros(100, np.float32))), "output.bias", "[100]", "[10]"
    ),
    "teacher of integers": teacher(
        "t.npz", npz_of(changed(output__bias=np.zeros(10, np.int32))), "output.bias", "int32", "float32"
    ),
    "teacher with NaN": teacher(
        "t.npz", npz_of(changed(output__bias=np.full(10, np.nan, np.float32))), "output.bias", "NaN", "finite"
    ),
    "teacher with a negative variance": teacher(
        "t.npz",
        npz_of(changed(features__init_block__bn__running_var=np.full(16, -1, np.float32))),
        *("features.init_block.bn.running_var", "-1", "from 0"),
    ),
    # Work directories.
    "workdir that is a file": ([DIGITS, "--workdir=f"], ("workdir", "'f'", "directory"), {"f": b""}),
    "workdir in a file": ([DIGITS, "--workdir=f/run"], ("workdir", "f/run", "directory"), {"f": b""}),
    "workdir with a name too long": ([DIGITS, f"--workdir={'w' * 300}"], ("workdir", "directory")),
    "workdir with a run": ([DIGITS, "--workdir=r"], ("workdir", "'r'", "result.json"), {"r/result.json": b"{}"}),
    "workdir with a teacher": (
        [DIGITS, "--workdir=r", "--mode=train_teacher"],
        ("workdir", "'r'", "already"),
        {"r/teacher.safetensors": b""},
    ),
    "workdir with a damaged training": (
        [DIGITS, "--workdir=r", "--mode=train_teacher"],
        ("workdir", "settings.json", "train anew"),
        {"r/teacher_training/settings.json": b"[1]"},
    ),
    "workdir of a teacher in a file": (
        [DIGITS, "--workdir=f/run", "--mode=train_teacher"],
        ("workdir", "f/run"),
        {"f": b""},
    ),
    "workdir of an evaluation in a file": (
        ["--config=cifar10_w3a3", "--workdir=f/run", "--mode=evaluate"],
        ("workdir", "f/run"),
        {"f": b""},
    ),
    "workdir of a profile in a file": ([DIGITS, "--workdir=f/run", "--mode=profile"], ("workdir", "f/run"), {"f": b""}),
    "evaluation of no run": (["--mode=evaluate", "--workdir=none"], ("--workdir", "'none'")),
    "evaluation of a damaged config": (
        ["--mode=evaluate", "--workdir=r"],
        ("config", "config.json"),
        {"r/config.json": b"{"},
    ),
    "evaluation of no student": (
        [DIGITS, "--mode=evaluate", "--subject=student", "--workdir=r"],
        ("workdir", "'r'", "no checkpoint"),
        {"r": None},
    ),
}
if sys.platform == "linux":  # where nobody may write, root included
    COMMAND["workdir that is read-only"] = ([DIGITS, "--workdir=/proc/run"], ("workdir", "/proc/run", "directory"))
    COMMAND["workdir of a teacher that is read-only"] = (
        [DIGITS, "--workdir=/proc/run", "--mode=train_teacher"],
        ("workdir", "/proc/run", "directory"),
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current directory, and a function that puts files there and one that lists all there is."""
    monkeypatch.chdir(tmp_path)

    def put(files):
        for name, content in files.items():
            path = tmp_path / name
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)

    def there():
        kept = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
        return {str(path.relative_to(tmp_path)): path.read_bytes() if path.is_file() else None for path in kept}

    return put, there


def is_one_line(said, words):
    assert said.startswith("error: ")
    assert said.endswith("\n")
    assert said.count("\n") == 1
    assert said.removesuffix("\n").isprintable()
    for word in words:
        assert word in said, (word, said)


@pytest.mark.parametrize("name", COMMAND)
def test_the_command_refuses(name, place, capsys):
    arguments, words, *files = COMMAND[name]
    put, there = place
    put(files[0] if files else {})
    before, start = there(), time.monotonic()
    assert command.main(arguments) == 2
    assert time.monotonic() - start < MAX_SECONDS
    captured = capsys.readouterr()
    is_one_line(captured.err, words)
    assert captured.out == ""
    assert there() == before


@pytest.fixture(scope="module")
def seconds_to_import():
    """What a process takes before it sees its arguments, which depends on the machine and what else it does."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import granq_jax.main"], check=True, timeout=120)
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("bits 9", "unknown mode", "config that exits", "teacher truncated .pth", "workdir in a file"),
        *("data that are missing", "control characters"),
    ],
)
def test_so_does_a_process(name, place, tmp_path, seconds_to_import):
    arguments, words, *files = COMMAND[name]
    put, there = place
    put(files[0] if files else {})
    before = there()
    start = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-m", "granq_jax.main", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    seconds = time.monotonic() - start
    assert finished.returncode == 2
    is_one_line(finished.stderr, words)
    assert finished.stdout == ""
    assert there() == before
    assert seconds < seconds_to_import + MAX_SECONDS


@contextlib.contextmanager
def modes_hold():
    """Files' modes hold for this thread, root's too, which otherwise may read and write everything (Linux)."""
    libc, version_3 = ctypes.CDLL(None, use_errno=True), 0x20080522
    header = (ctypes.c_uint32 * 2)(version_3, 0)
    before, within = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, before) == 0
    within[:] = before[:]
    within[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, within) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.parametrize("name", ["config", "teacher", "data", "workdir"])
def test_what_may_not_be_touched_is_refused(name, place, tmp_path, capsys):
    arguments, words, files, mode = {
        "config": (["--config=mine.py", RUN], ("config", "mine.py"), {"mine.py": b""}, 0o000),
        "teacher": (["--config.teacher=t.npz", DIGITS, RUN], ("teacher", "t.npz"), {"t.npz": b""}, 0o000),
        "data": (["--config=cifar10_w3a3", RUN, "--config.data_dir=d"], ("config.data_dir",), {"d": None}, 0o000),
        "workdir": ([DIGITS, "--workdir=d/run"], ("workdir", "d/run"), {"d": None}, 0o555),
    }[name]
    put, _ = place
    put(files)
    path = tmp_path / next(iter(files))
    path.chmod(mode)
    try:
        with modes_hold():
            assert command.main(arguments) == 2
    finally:
        path.chmod(0o755)
    is_one_line(capsys.readouterr().err, words)


def test_a_batch_that_does_not_divide_over_the_devices(place, monkeypatch, capsys):
    three = jax.devices() * 3
    monkeypatch.setattr(jax, "devices", lambda: three)
    _, there = place
    assert command.main([DIGITS, RUN]) == 2
    is_one_line(capsys.readouterr().err, ("config.batch_size", "64", "63 or 66"))
    assert there() == {}
