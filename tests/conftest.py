import contextlib
import importlib
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("same_every_time", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same_every_time")

jax.config.update("jax_numpy_rank_promotion", "raise")
# The command line takes two where nothing is said, if JAX has not computed: that would depend on the order of tests.
jax.config.update("jax_num_cpu_devices", 1)

# Many tests compile the same programs: a cache that lives as long as the session spares them that.
_compiled = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_module():
    """Compiled programs live no longer than a module's tests: a process may map only so many."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def one_line_error(error, *words):
    """Asserts that ``error`` is raised with a one-line message that holds all ``words``."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)


@pytest.fixture
def table(monkeypatch):
    """The module ``benchmarks/table.py``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("table")
