"""CIFAR as people have it: the archives' files as they were published, and as others write them."""

import builtins
import functools
import importlib.util
import io
import os
import pickle
import struct

import numpy as np
import pytest

from granq_jax.data.datasets import load_split
from granq_jax.files.pickles import NUMPY, Unread, unpickle
from tests.conftest import one_line_error

COUNTS = {"cifar10": {"train": 5, "test": 1}, "cifar100": {"train": 1, "test": 1}}
CLASSES = {"cifar10": 10, "cifar100": 100}
EACH = 3  # images a file
FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}


@functools.cache
def made_up(name, split):
    """Images (N, 32, 32, 3) and labels of a split of a few images."""
    random = np.random.default_rng(len(split) + len(name))
    count = EACH * COUNTS[name][split]
    return random.integers(0, 256, (count, 32, 32, 3), np.uint8), random.integers(0, CLASSES[name], count).tolist()


def file_names(name, split):
    if name == "cifar100":
        return [split]
    return ["test_batch"] if split == "test" else [f"data_batch_{number + 1}" for number in range(5)]


def python2(label, rows, labels):
    """What Python 2 wrote of one file, with the opcodes of the published ones."""
    text = lambda value: b"U" + bytes([len(value)]) + value  # noqa: E731
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85" + text(b"b") + b"\x87Rq\x09"
        b"(K\x01K" + bytes([len(rows)]) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0a" + text(b"u1") + b"K\x00K\x01\x87Rq\x0b"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    )
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([number]) for number in labels) + b"e"
    names = b"](" + text(b"leptodactylus_pentadactylus_s_000004.png") * len(labels) + b"e"
    return (
        b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"batch 1 of 5") + text(label.encode()) + numbers
        + text(b"data") + array + text(b"filenames") + names + b"u."
    )  # fmt: skip


def python3(protocol):
    return lambda label, rows, labels: pickle.dumps({label.encode(): labels, b"data": rows}, protocol)


def write_archive(folder, name, kind, write=python2):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = made_up(name, split)
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        for place, file in enumerate(file_names(name, split)):
            part = slice(EACH * place, EACH * (place + 1))
            if kind == "python":
                content = write("fine_labels" if name == "cifar100" else "labels", rows[part], labels[part])
            else:
                coarse = [[7]] * EACH if name == "cifar100" else [[]] * EACH
                records = zip(coarse, labels[part], rows[part], strict=True)
                content = b"".join(bytes([*first, label]) + row.tobytes() for first, label, row in records)
            (folder / (file if kind == "python" else f"{file}.bin")).write_bytes(content)


def write_npz(path, name, splits=("train", "test"), save=np.savez_compressed, **change):
    arrays = {}
    for split in splits:
        images, labels = made_up(name, split)
        arrays |= {f"x_{split}": images, f"y_{split}": np.array(labels)}
    save(path, **(arrays | change))


def check(name, split, data_dir):
    found = load_split(name, split, os.fspath(data_dir))
    images, labels = made_up(name, split)
    np.testing.assert_array_equal(found.images, images)
    assert found.labels.tolist() == labels
    assert (found.images.dtype, found.labels.dtype) == (np.uint8, np.int32)


@pytest.fixture(autouse=True)
def without_tfds(monkeypatch):
    """What reads TFDS's format cannot be imported, and neither can what prepares it."""
    absent = ("tensorflow_datasets", "array_record", "tensorflow")
    imported, find_spec = builtins.__import__, importlib.util.find_spec

    def only_others(name, *rest, **more):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", only_others)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("below", [True, False], ids=["beside others", "directly"])
@pytest.mark.parametrize(("name", "kind"), FOLDERS, ids=lambda value: value)
def test_the_published_archives_are_read(tmp_path, name, kind, below, split):
    write_archive(tmp_path / FOLDERS[name, kind] if below else tmp_path, name, kind)
    check(name, split, tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", CLASSES)
def test_batches_that_python_3_wrote_are_read(tmp_path, name, protocol):
    write_archive(tmp_path, name, "python", python3(protocol))
    check(name, "train", tmp_path)


@pytest.mark.parametrize("labels", [np.array, lambda labels: list(map(np.int64, labels))], ids=["array", "NumPy's"])
def test_labels_of_numpys_are_read(tmp_path, labels):
    write_archive(tmp_path, "cifar10", "python", lambda *a: python3(4)(a[0], a[1], labels(a[2])))
    check("cifar10", "train", tmp_path)


def test_a_batch_in_fortran_order_is_read(tmp_path):
    write_archive(tmp_path, "cifar10", "python", lambda *a: python3(4)(a[0], np.asfortranarray(a[1]), a[2]))
    check("cifar10", "train", tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", CLASSES)
def test_one_file_of_numpys_is_read(tmp_path, name, save, split):
    write_npz(tmp_path / f"{name}.npz", name, save=save)
    write_npz(tmp_path / "mine.npz", name, [split], save)  # what is not needed may be missing
    check(name, split, tmp_path)
    check(name, split, tmp_path / "mine.npz")


def test_labels_in_a_column_are_read(tmp_path):
    _, labels = made_up("cifar10", "test")
    write_npz(tmp_path / "cifar10.npz", "cifar10", y_test=np.array(labels, np.uint8)[:, None])
    check("cifar10", "test", tmp_path)


IMAGES = made_up("cifar10", "test")[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": IMAGES.astype(np.float32) / 255}, ["x_test is of float32", "uint8"]),
        ({"x_test": IMAGES.transpose(0, 3, 1, 2)}, ["(3, 3, 32, 32)", "(N, 32, 32, 3)"]),
        ({"x_test": IMAGES[:0], "y_test": np.zeros(0, int)}, ["(0, 32, 32, 3)"]),
        ({"y_test": np.zeros(2, int)}, ["labels of shape (2,)", "3"]),
        ({"y_test": np.zeros(3)}, ["y_test of float64", "whole numbers"]),
        ({"y_test": np.eye(10, dtype=int)[:3]}, ["(3, 10)"]),
        ({"y_test": np.array([0, 10, 3])}, ["0 to 10", "0 to 9"]),
        ({"y_test": np.array([0, -1, 3])}, ["-1 to 3", "0 to 9"]),
        ({"y_test": np.array([0, None, 3], object)}, ["object"]),
    ],
    ids=["float images", "NCHW", "none", "other count", "float labels", "one-hot", "too large", "negative", "objects"],
)
def test_arrays_that_are_not_the_data_set_are_refused(tmp_path, change, words):
    write_npz(tmp_path / "cifar10.npz", "cifar10", **change)
    with one_line_error(ValueError, "config.data_dir", "cifar10.npz", *words):
        load_split("cifar10", "test", os.fspath(tmp_path))


def test_arrays_that_are_missing_are_named(tmp_path):
    write_npz(tmp_path / "mine.npz", "cifar10", ["train"])
    with one_line_error(ValueError, "config.data_dir", "mine.npz", "no x_test and no y_test", "x_train, y_train"):
        load_split("cifar10", "test", os.fspath(tmp_path / "mine.npz"))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b")
    with one_line_error(ValueError, "config.data_dir", "cifar-10-python.tar.gz", ".npz"):
        load_split("cifar10", "test", os.fspath(tmp_path / "cifar-10-python.tar.gz"))


def test_what_an_archive_lacks_is_named_and_only_when_it_is_needed(tmp_path):
    write_archive(tmp_path / "cifar-10-batches-py", "cifar10", "python")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    check("cifar10", "test", tmp_path)
    with one_line_error(ValueError, "config.data_dir", "cifar-10-batches-py", "no data_batch_3"):
        load_split("cifar10", "train", os.fspath(tmp_path))


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_a_whole_layout_is_taken_before_one_that_lacks_files(tmp_path, kind):
    for each in ("python", "binary"):
        write_archive(tmp_path / FOLDERS["cifar10", each], "cifar10", each)
    other = {"python": "cifar-10-batches-bin/data_batch_1.bin", "binary": "cifar-10-batches-py/data_batch_1"}[kind]
    (tmp_path / other).unlink()
    check("cifar10", "train", tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_found_says_what_was_looked_for(tmp_path, name):
    archives = [folder for (of, _), folder in FOLDERS.items() if of == name]
    (tmp_path / "train").mkdir()  # a folder of that name is no batch
    with one_line_error(ValueError, "config.data_dir", os.fspath(tmp_path), f"{name}.npz", *archives, "TFDS"):
        load_split(name, "test", os.fspath(tmp_path))


def test_a_packed_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with one_line_error(ValueError, "config.data_dir", "cifar-10-python.tar.gz", "unpacked"):
        load_split("cifar10", "test", os.fspath(tmp_path))


def test_a_data_set_for_tfds_without_tfds_says_so(tmp_path):
    (tmp_path / "cifar10").mkdir()
    with one_line_error(ValueError, "config.data_dir", "cifar10", "tensorflow_datasets"):
        load_split("cifar10", "test", os.fspath(tmp_path))


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (os.fspath(self.path),)


def damaged_batches(tmp_path):
    rows = np.zeros((2, 3072), np.uint8)
    whole = {"data": rows, "labels": [0, 1]}
    yield "code for data", pickle.dumps({**whole, "data": Touches(tmp_path / "ran")})
    yield "code for labels", pickle.dumps({**whole, "labels": Touches(tmp_path / "ran")})
    yield "code for all", pickle.dumps(Touches(tmp_path / "ran"))
    yield "objects", pickle.dumps({**whole, "data": rows.astype(object)}, 2)
    yield "other numbers", pickle.dumps({**whole, "data": rows.astype(np.int32)})
    yield "cut off", pickle.dumps(whole)[:-9]
    yield "no labels", pickle.dumps({"data": rows, "fine_labels": [0, 1]})
    yield "labels of text", pickle.dumps({**whole, "labels": ["0", "1"]})
    yield "too few labels", pickle.dumps({**whole, "labels": [0]})
    yield "a label too large", pickle.dumps({**whole, "labels": [0, 10]})
    yield "part of an image", pickle.dumps({**whole, "data": rows[:, :-1]})
    yield "no pickle", b"data"
    yield "nothing", b""


def test_batches_that_are_none_are_refused_and_no_code_is_run(tmp_path):
    for case, content in damaged_batches(tmp_path):
        (tmp_path / "test_batch").write_bytes(content)
        with pytest.raises(ValueError, match=r"^config\.data_dir: .*test_batch"):
            print(case, load_split("cifar10", "test", os.fspath(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_code_beside_the_images_is_not_run(tmp_path):
    beside = {"more": Touches(tmp_path / "ran")}
    write_archive(
        tmp_path, "cifar10", "python", lambda label, rows, labels: pickle.dumps({label: labels, "data": rows, **beside})
    )
    check("cifar10", "test", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("extra", [-1, 1])
@pytest.mark.parametrize("name", CLASSES)
def test_binary_files_of_another_length_are_refused(tmp_path, name, extra):
    write_archive(tmp_path, name, "binary")
    path = tmp_path / f"{file_names(name, 'test')[0]}.bin"
    content = path.read_bytes()
    path.write_bytes(content[:extra] if extra < 0 else content + bytes(extra))
    with one_line_error(ValueError, "config.data_dir", path.name, str(len(content) + extra), "multiples"):
        load_split(name, "test", os.fspath(tmp_path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpys_numbers_become_pythons(protocol):
    numbers = [np.float64(0.5), np.int64(-3), np.uint8(7), np.float16(2), np.bool_(True)]
    found = unpickle(io.BytesIO(pickle.dumps(numbers, protocol)), NUMPY)
    assert found == [0.5, -3, 7, 2.0, True]
    assert [type(number) for number in found] == [float, int, int, float, bool]
    others = [np.str_("a"), np.datetime64(1, "s"), np.complex64(1)]
    found = unpickle(io.BytesIO(pickle.dumps(others, protocol)), NUMPY)
    assert all(isinstance(other, Unread) for other in found)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "<f4", ">f2", "?"])
def test_arrays_are_read_as_numpy_wrote_them(protocol, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for value in array, np.asfortranarray(array), array[:0]:
        found = unpickle(io.BytesIO(pickle.dumps(value, protocol)), NUMPY)
        np.testing.assert_array_equal(found.read(), value)
        assert (found.shape, found.dtype) == (value.shape, value.dtype.name)
