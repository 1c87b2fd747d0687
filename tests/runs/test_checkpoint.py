"""Checkpoints: what is kept, and what damage does to them."""

import contextlib
import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granq_jax.distill.trainer import AVERAGE
from granq_jax.errors import RunError
from granq_jax.quant import RANGES
from granq_jax.runs.checkpoint import Checkpoints, digest
from tests.conftest import one_line_error


def state_of(step):
    values = np.random.default_rng(step).normal(size=(40, 1000)).astype(np.float32)
    return {"kernel": jnp.asarray(values), "scale": jnp.full((3,), step, jnp.bfloat16), "step": jnp.int32(step)}


def save_all(workdir, steps, **settings):
    with Checkpoints(workdir, **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), {"seconds": step / 3})
            checkpoints.wait()
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def newest(workdir, **settings):
    with Checkpoints(workdir, **settings) as checkpoints:
        return checkpoints.newest(jax.eval_shape(lambda: state_of(0)))


@contextlib.contextmanager
def largest_file(size):
    """No file can be written beyond ``size``: what a full disk does, without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_is(saved, step):
    assert (saved.step, saved.notes) == (step, {"seconds": step / 3})
    jax.tree.map(np.testing.assert_array_equal, saved.state, jax.device_get(state_of(step)))


def test_there_is_none_at_first(tmp_path):
    assert newest(tmp_path) is None


def test_the_newest_ones_are_kept_and_the_best(tmp_path):
    assert save_all(tmp_path / "a", range(5)) == [3, 4]
    assert save_all(tmp_path / "b", range(5), keep=3) == [2, 3, 4]
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        for step in range(4):
            checkpoints.kept_steps = frozenset({min(step, 1)})
            checkpoints.save(step, state_of(step))
    assert sorted(path.name for path in (tmp_path / "c" / "checkpoints").iterdir()) == ["1", "3"]


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    state = jax.tree.map(np.array, jax.device_get(state_of(1)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"seconds": 1 / 3})
        state["kernel"][:] = 0  # as a step does to memory that is donated to it
    assert_is(newest(tmp_path), 1)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


# Where Orbax fails to read, reads that it had begun find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [_truncate, _flip, lambda path: path.unlink()], ids=["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, damage, caplog):
    save_all(tmp_path / "whole", [1, 2])
    files = [path for path in (tmp_path / "whole" / "checkpoints" / "2").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)  # that of the kernel
    for path in files:
        if not path.stat().st_size:
            continue
        caplog.clear()
        workdir = tmp_path / "damaged"
        shutil.copytree(tmp_path / "whole", workdir)
        damage(workdir / path.relative_to(tmp_path / "whole"))
        saved = newest(workdir)
        # Not all that Orbax writes is needed to read; what is read is right.
        assert_is(saved, saved.step)
        if path == largest:
            assert saved.step == 1
        if saved.step == 1:
            assert "step 2" in caplog.text
            assert "damaged" in caplog.text
            # The next one of that step finds its place free.
            with Checkpoints(workdir) as checkpoints:
                checkpoints.save(2, state_of(2), {"seconds": 2 / 3})
            assert_is(newest(workdir), 2)
        shutil.rmtree(workdir)


def failing(monkeypatch, errors):
    """Reading a checkpoint raises ``errors`` one after another, and then succeeds."""
    read, left = Checkpoints._read, list(errors)

    def fail(self, step, target):
        if left:
            raise left.pop(0)
        return read(self, step, target)

    monkeypatch.setattr(Checkpoints, "_read", fail)
    return left


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("DATA_LOSS"), KeyError("a")])
def test_an_error_that_passes_is_no_damage(tmp_path, monkeypatch, error):
    save_all(tmp_path, [1, 2])
    left = failing(monkeypatch, [error])
    assert_is(newest(tmp_path), 2)
    assert left == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("Stale file handle"),
        TimeoutError("no answer"),
        MemoryError(),
        ValueError('UNKNOWN: Error reading "/d/manifest" [OS error 116: ESTALE Stale file handle]'),
        caused_by(RuntimeError("cannot restore"), OSError(errno.EMFILE, "Too many open files")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_system_fails_to_read_is_neither_moved_nor_passed_over(tmp_path, monkeypatch, error):
    save_all(tmp_path, [1, 2])
    failing(monkeypatch, [error, error])
    with one_line_error(RunError, "step 2", str(tmp_path), "try again"):
        newest(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert_is(newest(tmp_path), 2)


def test_a_state_may_be_of_one_of_several_structures(tmp_path):
    save_all(tmp_path, [1, 2])
    like = jax.eval_shape(lambda: state_of(0))
    others = {**like, "bias": like["scale"]}, {key: like[key] for key in ("kernel", "step")}
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.newest(*others, like), 2)
        assert_is(checkpoints.newest(like, *others), 2)


def test_keys_with_slashes_and_dots_come_back(tmp_path):
    state = {"a": {"b/c": jnp.ones(3)}, "a/b": {"c": jnp.zeros(3)}, "a.b": {"c": jnp.full(3, 2.0)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    with Checkpoints(tmp_path) as checkpoints:
        saved = checkpoints.newest(state)
    jax.tree.map(np.testing.assert_array_equal, saved.state, state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_moves_nothing(tmp_path):
    save_all(tmp_path, [1, 2])
    for path in (tmp_path / "checkpoints" / "2").rglob("d/*"):
        _truncate(path)
    before = sorted((tmp_path / "checkpoints").rglob("*"))
    assert_is(newest(tmp_path, read_only=True), 1)
    assert sorted((tmp_path / "checkpoints").rglob("*")) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_a_whole_checkpoint_nothing_is_begun_anew(tmp_path):
    save_all(tmp_path, [1, 2])
    for path in (tmp_path / "checkpoints").rglob("d/*"):
        _truncate(path)
    with one_line_error(RunError, "checkpoints", "2, 1", "--overwrite"):
        newest(tmp_path)
    assert (tmp_path / "checkpoints" / "2").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint(tmp_path):
    save_all(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints, largest_file(50_000):
        checkpoints.save(2, state_of(2))
        with one_line_error(RunError, "checkpoint", str(tmp_path), "File too large"):
            checkpoints.wait()
    assert_is(newest(tmp_path), 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path):
    def interrupted():
        with Checkpoints(tmp_path) as checkpoints, largest_file(50_000):
            checkpoints.save(2, state_of(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_digest_tells_values_names_and_types_apart():
    arrays = [{"a": np.zeros(4)}, {"b": np.zeros(4)}, {"a": np.ones(4)}, {"a": np.zeros(4, np.float32)}]
    arrays += [{"a": np.zeros((2, 2))}, {"a": np.int32(0)}]
    assert len({digest(tree) for tree in arrays}) == len(arrays)


def test_collections_under_their_former_names_are_found(tmp_path):
    def state(*names):
        return {"step": jnp.int32(3), "student": {name: {"x": jnp.full(2, i)} for i, name in enumerate(names)}}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state("params", "ranges", "average"), {"seconds": 1.0})
    with Checkpoints(tmp_path) as checkpoints:
        saved = checkpoints.newest(jax.eval_shape(lambda: state("params", RANGES, AVERAGE)))
    expected = jax.device_get(state("params", RANGES, AVERAGE))
    assert saved.state.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, saved.state, expected)
