import contextlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


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
