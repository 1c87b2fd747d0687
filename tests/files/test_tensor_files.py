"""Files of tensors: of every kind read alike, and of those made to harm, none does."""

import functools
import io
import json
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.flax
from flax.traverse_util import flatten_dict

from granq_jax import create_model, load_torch
from granq_jax.teachers.torch_import import torch_name
from tests.conftest import one_line_error
from tests.pth_files import Call, Raw, Tensor, legacy, pickled, tensors_of, zipped

NAME = "resnet8_digits"
KEY = "output.weight"
SHAPE = (10, 64)
HUGE = 60_000_000  # bytes that a small file asks for
MAX_BYTES = 30_000_000
MAX_SECONDS = 5


def state_dict(dtype=np.float32):
    """Random tensors of the network, in PyTorch's names and layout."""
    return {name: array.astype(dtype) for name, array in random_tensors().items()}


@functools.cache
def random_tensors():
    shapes = jax.eval_shape(create_model(NAME).init, jax.random.key(0), np.ones((1, 8, 8, 1), np.float32))
    random = np.random.default_rng(0)
    tensors = {}
    for path, leaf in flatten_dict(shapes).items():
        shape = (leaf.shape[3], leaf.shape[2], *leaf.shape[:2]) if leaf.ndim == 4 else leaf.shape[::-1]
        tensors[torch_name(NAME, path)] = random.uniform(0.5, 1.5, shape)
    return tensors


def pth(change=None, storage=None, **options):
    """A zipped file in which the tensor ``KEY`` is changed, or the content of its storage."""
    described, storages = tensors_of(state_dict())
    array, key = described[KEY].array, described[KEY].key
    if storage is not None:
        storages[key] = storage(storages[key])
    if change is not None:
        described[KEY] = Tensor(array, **{"key": key, **change})
    return zipped(described, storages, **options)


def legacy_pth(change=None, **options):
    described, storages = tensors_of(state_dict(), legacy=True)
    if change is not None:
        described[KEY] = Tensor(described[KEY].array, **{"key": described[KEY].key, "legacy": True, **change})
    return legacy(described, storages, **options)


def npz(member=None, compression=zipfile.ZIP_STORED, count=0):
    """An ``.npz`` file with the content ``member`` for ``KEY``, and ``count`` empty members more."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in state_dict().items():
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(f"{name}.npy", member if name == KEY and member is not None else content.getvalue())
        for i in range(count):
            archive.writestr(str(i), b"")
    return file.getvalue()


def npy(shape=SHAPE, dtype="<f4", data=b"", header=None, version=1):
    text = header or repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def safetensors_file(change=(), header=None, length=None, count=0):
    entries, data = {}, b""
    for name, array in state_dict().items():
        entries[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    entries |= {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2} for i in range(count)}
    entries[KEY] |= dict(change)
    text = json.dumps(entries).encode() if header is None else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def objects():
    content = io.BytesIO()
    np.save(content, np.array([RunsCode()] * 640).reshape(SHAPE), allow_pickle=True)
    return content.getvalue()


SIZE = 10 * 64 * 4
DEEP = 250_000  # tuples within tuples, whose hash needs as many frames of C
# A list of many numbers, given to each of many calls.
QUADRATIC = (
    b"\x80\x02]("
    + b"N" * 120_000
    + b"eq\x00"
    + b"ctorch._utils\n_rebuild_parameter\nq\x01"
    + b"h\x01h\x00R" * 25_000
    + b"."
)

HOSTILE = {
    # Code.
    "runs.pth": lambda: zipped(pickle.dumps({KEY: RunsCode()}, 2), {}),
    "runs_by_system.pth": lambda: zipped({KEY: Call("posix system", ("touch ran",))}, {}),
    "runs_by_name.pth": lambda: zipped(pickle.dumps({KEY: RunsCode()}, 4), {}),
    "runs.pt": lambda: pickle.dumps(RunsCode(), 2),
    "runs_later.pt": lambda: legacy(pickle.dumps({KEY: RunsCode()}, 2), {}),
    "runs_as_magic.pth": lambda: pickled(Call("posix system", ("touch ran",))),
    "runs.npz": lambda: npz(objects()),
    "runs_by_header.npz": lambda: npz(npy(header=b"__import__('pathlib').Path('ran').touch()")),
    # Small files that ask for much memory.
    "inflated_storage.pth": lambda: pth({"size": HUGE // 4}, lambda _: bytes(HUGE), compression=zipfile.ZIP_DEFLATED),
    "inflated_pickle.pth": lambda: zipped(b"\x80\x02" + bytes(HUGE), {}, zipfile.ZIP_DEFLATED),
    "inflated_byteorder.pth": lambda: pth(compression=zipfile.ZIP_DEFLATED, byteorder=bytes(HUGE)),
    "bytearray.pth": lambda: zipped({KEY: Call("__builtin__ bytearray", (HUGE,))}, {}),
    "many_dicts.pkl": lambda: b"\x80\x02" + b"}" * 3_000_000,
    "large_objects.pth": lambda: zipped(b"\x80\x02" + bytes(5_000_000), {}),
    "bytearray8.pth": lambda: zipped(b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", {}),
    "memo.pth": lambda: zipped(b"\x80\x02}r\xff\xff\xff\xff.", {}),
    "long_text.pth": lambda: zipped(b"\x80\x02}X\xff\xff\xff\x7f.", {}),
    "large_storage.pt": lambda: legacy_pth({"size": HUGE}),
    "inflated.npz": lambda: npz(npy(data=bytes(HUGE)), zipfile.ZIP_DEFLATED),
    "inflated_header.npz": lambda: npz(npy(header=b" " * HUGE, version=2), zipfile.ZIP_DEFLATED),
    "inflated_by_bzip2.npz": lambda: npz(npy(data=bytes(HUGE)), zipfile.ZIP_BZIP2),
    "absurd_shape.npz": lambda: npz(npy((1 << 40, 1 << 40))),
    "absurd_itemsize.npz": lambda: npz(npy(dtype=f"|V{HUGE}")),
    "absurd_shape.safetensors": lambda: safetensors_file({"shape": [1 << 40, 1 << 40]}),
    "overflowing_shape.safetensors": lambda: safetensors_file({"shape": [1 << 62, 4, 10, 64]}),
    "long_header.safetensors": lambda: safetensors_file(length=1 << 62),
    "header_of_50_mb.safetensors": lambda: safetensors_file(header=b"{}" + b" " * 50_000_000),
    "members.pth": lambda: pth(more=[(str(i), b"") for i in range(10_000)]),
    "members.npz": lambda: npz(count=10_000),
    "entries.safetensors": lambda: safetensors_file(count=200_000),
    # Tensors that are not what they say.
    "expanded.pth": lambda: pth({"size": 1, "shape": (1 << 20, 1 << 20), "strides": (0, 0)}, lambda _: bytes(4)),
    "short_storage.pth": lambda: pth(storage=lambda content: content[:100]),
    "short_storage_that_says_so.pth": lambda: pth({"size": 25}, lambda content: content[:100]),
    "beyond_storage.pth": lambda: pth({"offset": 1}),
    "far_strides.pth": lambda: pth({"strides": (1 << 40, 1)}),
    "before_storage.pth": lambda: pth({"offset": -10}),
    "negative_strides.pth": lambda: pth({"strides": (-64, 1)}),
    "fractions.pth": lambda: pth({"offset": None}),
    "dimensions.pth": lambda: pth({"shape": (1,) * 1000, "strides": (1,) * 1000}),
    "negative_size.pth": lambda: pth({"size": -1}),
    "no_storage.pth": lambda: pth({"key": "none"}),
    "elsewhere.pth": lambda: pth({"key": "../../../../etc/passwd"}),
    "damaged.pth": lambda: (b := pth())[: (i := b.index(state_dict()[KEY].tobytes()))] + b"!" + b[i + 1 :],
    "big_endian.pth": lambda: pth(byteorder=b"big"),
    "big_endian.pt": lambda: legacy_pth(little_endian=False),
    "view.pt": lambda: legacy_pth({"view_of": ("0", 0, 640)}),
    "two_pickles.pth": lambda: pth(more=[("other/data.pkl", b"")]),
    "no_pickle.pth": lambda: pth().replace(b"archive/data.pkl", b"archive/data.pkk"),
    "truncated.pt": lambda: legacy_pth()[:-100],
    "lengthened.pt": lambda: legacy_pth() + b"!",
    "other_lengths.pt": lambda: legacy_pth(itemsize=8),
    "short.npz": lambda: npz(npy(data=bytes(SIZE - 1))),
    "long.npz": lambda: npz(npy(data=bytes(SIZE + 1))),
    "negative_shape.npz": lambda: npz(npy((-10, -64), data=bytes(SIZE))),
    "short.safetensors": lambda: safetensors_file()[:-1],
    "overlapping.safetensors": lambda: safetensors_file({"data_offsets": [0, SIZE]}),
    "outside.safetensors": lambda: safetensors_file({"data_offsets": [1 << 40, (1 << 40) + SIZE]}),
    "backwards.safetensors": lambda: safetensors_file({"data_offsets": [SIZE, 0]}),
    # Input that takes long, or more stack than there is.
    "nested_key.pth": lambda: zipped(b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s.", {}),
    "nested_storage_key.pt": lambda: legacy(b"\x80\x02" + b")" + b"\x85" * DEEP + b"N" * 5 + b"tQ.", {}),
    "nested_keys.pt": lambda: legacy(pickled({}), {}).removesuffix(pickled([])) + pickled([Raw(b")" + b"\x85" * DEEP)]),
    "quadratic.pth": lambda: zipped(QUADRATIC, {}),
    "nested.npz": lambda: npz(npy(header=b"(" * 9000)),
    "nested.safetensors": lambda: safetensors_file(header=b'{"a":' + b"[" * 100_000),
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in HOSTILE.items():
        (folder / name).write_bytes(make())
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_no_cost(hostile, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = hostile / name
    tracemalloc.start()
    start = time.process_time()  # the machine may be busy
    try:
        with pytest.raises(ValueError, match=r"^teacher: ") as caught:
            load_torch(NAME, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < MAX_SECONDS
    assert peak < MAX_BYTES
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 3000
    assert list(tmp_path.iterdir()) == []


def test_the_process_outlives_them_and_stays_small(hostile, tmp_path):
    """Also counts what libraries allocate beside Python's memory, and what would end the process."""
    program = f"""if True:
        import pathlib, resource
        from granq_jax import load_torch
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        def refused(path):
            try:
                load_torch("{NAME}", path)
            except ValueError:
                return True
        paths = sorted(pathlib.Path({str(hostile)!r}).iterdir())
        assert refused(paths[0])  # what this has to import and trace is no cost of the others
        before = peak()
        assert all(map(refused, paths))
        print(len(paths), (peak() - before) // 1024)
    """
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    count, megabytes = map(int, finished.stdout.split())
    assert count == len(HOSTILE)
    assert megabytes < MAX_BYTES // 1_000_000
    assert list(tmp_path.iterdir()) == []


def test_another_version_of_npy_is_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(npz(npy(version=2, data=bytes(SIZE))))
    with one_line_error(ValueError, "a.npz", "version (2, 0)", "allowed is (1, 0)"):
        load_torch(NAME, tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npz", ".safetensors"])
def test_files_of_every_kind_give_the_same_variables(tmp_path, suffix, dtype):
    if (suffix, dtype) == (".npz", "bfloat16"):
        pytest.skip("NumPy's files have no such dtype")
    tensors = state_dict(jax.numpy.dtype(dtype))
    arrays = {name: np.asfortranarray(array) for name, array in tensors.items()}  # strides of their own
    arrays["features.init_block.bn.num_batches_tracked"] = np.array(7)
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pth":
        described, storages = tensors_of(arrays)
        storages = {described[name].key: array.tobytes("A") for name, array in arrays.items()}
        path.write_bytes(zipped(described, storages))
    elif suffix == ".pt":
        del arrays["features.init_block.bn.num_batches_tracked"]  # of another size than the others
        path.write_bytes(legacy(*tensors_of(tensors, legacy=True), itemsize=jax.numpy.dtype(dtype).itemsize))
    elif suffix == ".npz":
        np.savez_compressed(path, **arrays)
    else:
        safetensors.flax.save_file({name: jax.numpy.asarray(array) for name, array in arrays.items()}, path)
    expected = load_torch(NAME, tensors)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(expected)} == {dtype}
    jax.tree.map(np.testing.assert_array_equal, load_torch(NAME, path), expected)


def test_tensors_may_share_a_storage(tmp_path):
    tensors = state_dict()
    flat = np.concatenate([array.ravel() for array in tensors.values()])
    described, place = {}, 0
    for name, array in tensors.items():
        described[name] = Tensor(array, "0", size=flat.size, offset=place)
        place += array.size
    (tmp_path / "flat.pth").write_bytes(zipped(described, {"0": flat.tobytes()}))
    jax.tree.map(np.testing.assert_array_equal, load_torch(NAME, tmp_path / "flat.pth"), load_torch(NAME, tensors))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_pytorch_writes_is_read_as_pytorch_reads_it(tmp_path, zipped):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    tensors = {name: torch.from_numpy(array) for name, array in state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 4:
            tensors[name] = tensor.contiguous(memory_format=torch.channels_last)
        elif "running" not in name:
            tensors[name] = torch.nn.Parameter(tensor)
    module = torch.nn.ParameterDict()
    module.load_state_dict({}, strict=False)
    saved = module.state_dict()  # an OrderedDict with attributes
    saved.update(tensors)
    saved["output.bias"] = torch.arange(30.0)[5:25:2]
    saved["features.init_block.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(saved, tmp_path / "t.pth", _use_new_zipfile_serialization=zipped)
    expected = load_torch(NAME, torch.load(tmp_path / "t.pth", weights_only=True))
    jax.tree.map(np.testing.assert_array_equal, load_torch(NAME, tmp_path / "t.pth"), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_none_are_refused(value):
    tensors = state_dict()
    tensors[KEY] = tensors[KEY].astype(np.float64)
    tensors[KEY][3, 4] = value
    with one_line_error(ValueError, "teacher", KEY, "NaN or infinity", "finite"):
        load_torch(NAME, tensors)


def test_a_negative_variance_is_refused():
    tensors = state_dict()
    tensors["features.init_block.bn.running_var"][3] = -1
    with one_line_error(ValueError, "teacher", "features.init_block.bn.running_var", "-1.0", "variance"):
        load_torch(NAME, tensors)
