"""Damaged checkpoint directories are read, or refused with an error of a kind that the command reports in a line.

See :mod:`tests.fuzzing` for how to run this for long.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from granq_jax.errors import RunError
from granq_jax.runs.checkpoint import Checkpoints
from tests.fuzzing import damaged, fuzz

STATE = {"step": np.int32(7), "student": {"kernel": np.arange(600, dtype=np.float32).reshape(20, 30)}}


@functools.cache
def whole():
    """A directory with two checkpoints, kept while the process lasts."""
    folder = tempfile.TemporaryDirectory()
    with Checkpoints(Path(folder.name)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, jax.device_put(STATE))
    return folder


def files():
    root = Path(whole().name)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@st.composite
def damages(draw):
    """What happens to which files."""
    changes = []
    for name in draw(st.lists(st.sampled_from(files()), min_size=1, max_size=4)):
        content = (Path(whole().name) / name).read_bytes()
        kind = draw(st.sampled_from(["damage", "empty", "gone", "folder", "folder gone", "swap"]))
        extra = draw(damaged(content)) if kind == "damage" and content else draw(st.sampled_from(files()))
        changes.append((name, kind, extra))
    return changes


def apply(root, name, kind, extra):
    path = root / name
    if not path.is_file():  # an earlier change took it away
        return
    match kind:
        case "damage" if isinstance(extra, bytes):
            path.write_bytes(extra)
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case "folder gone":
            shutil.rmtree(path.parent)
        case "swap":
            if (root / extra).is_file():
                path.write_bytes((root / extra).read_bytes())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves of a failure
@fuzz(st.deferred(damages), examples=15)
def test_checkpoint_directories(changes):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        shutil.copytree(whole().name, root)
        for change in changes:
            apply(root, *change)
        try:
            with Checkpoints(root) as checkpoints:
                saved = checkpoints.newest(STATE)
        except (RunError, ValueError, TypeError, OSError) as error:
            assert str(error)  # noqa: PT017 (it may be raised)
        else:  # what is used is what was saved, or nothing
            for found, expected in zip(jax.tree.leaves(saved and saved.state), jax.tree.leaves(STATE), strict=False):
                np.testing.assert_array_equal(found, expected)
