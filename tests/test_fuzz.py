"""Settings and teacher files of any content are used or refused in one line: no trace, no hang.

See :mod:`tests.fuzzing` for how to run these for long.
"""

import contextlib
import functools
import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from granq_jax import load_torch
from granq_jax import main as command
from granq_jax.config import CHECKS, check_config, default_config
from tests.files.test_tensor_files import KEY, NAME, npy, npz, safetensors_file, state_dict
from tests.fuzzing import NUMBERS, damaged, fuzz
from tests.pth_files import Call, Raw, Tensor, legacy, pickled, tensors_of, zipped

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # files have long reprs
CONFIG = Path(__file__).parents[1] / "configs" / "digits_w2a2.py"

# Values as someone may write them.
literals = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    NUMBERS,
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["activation", "operand", "cifar10", "digits", "xla", "test", "train", "resnet8_digits"]),
    st.lists(st.one_of(st.integers(-3, 400), st.floats(), st.text(max_size=3)), max_size=4).map(tuple),
)
written = st.one_of(literals.map(str), literals.map(repr), st.text(max_size=30), st.sampled_from(["(1,", "[", "1e999"]))
keys = st.one_of(
    st.sampled_from(sorted(CHECKS)), st.sampled_from(["quant", "", ".", "quant.", "a.b"]), st.text(max_size=9)
)


def run(*arguments):
    """Runs the command up to where a run would begin: exit status, and what it said."""
    stderr = io.StringIO()
    modes = dict.fromkeys(command.MODES, lambda config, workdir, **_: check_config(config) or {})
    silent, listening = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr)
    with mock.patch.object(command, "MODES", modes), silent, listening:
        status = command.main(list(arguments))
    return status, stderr.getvalue()


def is_used_or_refused(*arguments):
    status, said = run(*arguments)
    if status == 0:
        assert said == ""
    else:
        assert status == 2
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert said.endswith("\n")
        assert said.removesuffix("\n").isprintable()


@fuzz(st.lists(st.tuples(keys, written), min_size=1, max_size=3), examples=60)
def test_arguments(settings):
    is_used_or_refused("--config=digits_w2a2", *(f"--config.{key}={value}" for key, value in settings))


@st.composite
def python_files(draw):
    text = CONFIG.read_text().removesuffix("    return config\n")
    for key, value in draw(st.lists(st.tuples(keys, literals), max_size=3)):
        line = draw(
            st.sampled_from(
                [
                    f"config.{key} = {value!r}",
                    f"config[{key!r}] = {value!r}",
                    f"config.update({{{key!r}: {value!r}}})",
                    f"with config.ignore_type(): config.{key} = {value!r}",
                    f"del config.{key}",
                    "config.seed = __import__('ml_collections').config_dict.required_placeholder(int)",
                    "config.seed = config.get_ref('epochs')",
                    "raise SystemExit(0)",
                    "config = None",
                    "config.lock()",
                ]
            )
        )
        text += f"    {line}\n"
    data = (text + "    return config\n").encode(errors="surrogatepass")
    return ".py", draw(st.one_of(st.just(data), damaged(data)))


@st.composite
def json_files(draw):
    config = default_config().to_dict()
    for key, value in draw(st.lists(st.tuples(keys, literals), max_size=3)):
        section, _, name = key.rpartition(".")
        (config.get(section) if isinstance(config.get(section), dict) else config)[name] = value
    tree = st.recursive(literals, lambda inner: st.dictionaries(st.text(max_size=9), inner, max_size=3), max_leaves=8)
    text = json.dumps(draw(st.one_of(st.just(config), tree))).encode()
    return ".json", draw(st.one_of(st.just(text), damaged(text), st.just(b"[" * 9_000)))


@fuzz(st.one_of(python_files(), json_files()), examples=60)
def test_config_files(file):
    suffix, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mine{suffix}"
        path.write_bytes(content)
        is_used_or_refused(f"--config={path}")


def is_read_or_refused(suffix, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"teacher{suffix}"
        path.write_bytes(content)
        try:
            variables = load_torch(NAME, path)
        except (ValueError, OSError) as error:
            said = str(error)
            assert (said[:9], said.count("\n")) == ("teacher: ", 0)
        else:
            for leaf in jax.tree.leaves(variables):
                assert np.isfinite(np.asarray(leaf)).all()
        assert list(Path(folder).iterdir()) == [path]


dimensions = st.lists(st.one_of(st.integers(-2, 700), NUMBERS), max_size=5)
shapes = st.one_of(st.permutations((10, 64)), dimensions, st.sampled_from([(640,), (1, 640), (10, 64, 1), ()]))
dtypes = st.sampled_from(["F32", "F64", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "", "Q3"])


@functools.cache
def whole_safetensors():
    return safetensors_file()


@st.composite
def safetensors_headers(draw):
    """A header in which entries are changed, swapped, or of other kinds."""
    whole = whole_safetensors()
    length = int.from_bytes(whole[:8], "little")
    entries, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for name in draw(st.lists(st.sampled_from(sorted(entries)), max_size=3)):
        if not isinstance(entry := entries[name], dict):
            continue
        match draw(st.sampled_from(["dtype", "shape", "data_offsets", "swap", "any", "drop"])):
            case "dtype":
                entry["dtype"] = draw(st.one_of(dtypes, literals))
            case "shape":
                entry["shape"] = draw(st.one_of(shapes, literals))
            case "data_offsets":
                entry["data_offsets"] = draw(st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), literals))
            case "swap":
                other = draw(st.sampled_from(sorted(entries)))
                entries[name], entries[other] = entries[other], entries[name]
            case "any":
                entries[draw(st.sampled_from([name, "__metadata__", "new"]))] = draw(literals)
            case "drop" if len(entries) > 1:
                del entries[name]
                break
    text = json.dumps(entries).encode()
    return struct.pack("<Q", draw(st.one_of(st.just(len(text)), NUMBERS.filter(lambda n: n >= 0)))) + text + data


@fuzz(st.deferred(lambda: st.one_of(safetensors_headers(), damaged(whole_safetensors()))), examples=40)
def test_safetensors_files(content):
    is_read_or_refused(".safetensors", content)


@functools.cache
def whole_npz(compression):
    return npz(compression=compression)


@st.composite
def npz_members(draw):
    """A member with another header, shape, dtype or content, whole or damaged."""
    described = ["<f4", ">f4", "<f2", "|O", "<i4", "|V4", "<M8[s]", "|S4", [("a", "<f4")], "f" * 999, "", "<f16"]
    member = npy(
        tuple(draw(shapes)),
        draw(st.sampled_from(described)),
        bytes(draw(st.sampled_from([2560, 0, 2559, 2561, 1280, 5120]))),
        version=draw(st.sampled_from([1, 1, 1, 2, 3])),
    )
    compression = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    return npz(draw(st.one_of(st.just(member), damaged(member))), compression)


@fuzz(
    st.deferred(
        lambda: st.one_of(
            npz_members(), damaged(whole_npz(zipfile.ZIP_STORED)), damaged(whole_npz(zipfile.ZIP_DEFLATED))
        )
    ),
    examples=40,
)
def test_npz_files(content):
    is_read_or_refused(".npz", content)


@st.composite
def pth_files(draw):
    """PyTorch's files, of both kinds: a tensor described otherwise, storages cut, damage before and after packing."""
    old = draw(st.booleans())
    described, storages = tensors_of(state_dict(), legacy=old)
    whole = legacy if old else zipped
    tensor = described[KEY]
    numbers = st.one_of(NUMBERS, st.integers(-3, 700), literals.map(lambda v: v if isinstance(v, bool | int) else None))
    match draw(st.sampled_from(["tensor", "storage", "value", "pickle", "file", "swap"])):
        case "tensor":
            described[KEY] = Tensor(
                tensor.array,
                draw(st.sampled_from([tensor.key, "0", "none", ""])),
                draw(st.sampled_from([old, old, not old])),
                draw(st.one_of(st.none(), numbers)),
                draw(st.one_of(st.just(0), numbers)),
                draw(st.one_of(st.none(), st.lists(numbers, max_size=4).map(tuple))),
                draw(st.one_of(st.none(), st.lists(numbers, max_size=4).map(tuple))),
            )
        case "storage":
            storages[tensor.key] = storages[tensor.key][: draw(st.integers(0, 2560))]
        case "value":
            other = [
                Call("collections OrderedDict", ((),)),
                Call("torch FloatStorage", ()),
                Raw(b")"),
                Raw(b"h\x00"),
                {},
            ]
            described[draw(st.sampled_from([KEY, "new"]))] = draw(st.sampled_from([*other, None, 3, "text", [1], ()]))
        case "pickle":
            return (".pth", whole(draw(damaged(pickled(described))), storages))
        case "file":
            return (".pth", draw(damaged(whole(described, storages))))
        case "swap":
            other = draw(st.sampled_from(sorted(described)))
            described[KEY], described[other] = described[other], described[KEY]
    return draw(st.sampled_from([".pth", ".pt"])), whole(described, storages)


@fuzz(pth_files(), examples=60)
def test_pth_files(file):
    is_read_or_refused(*file)
