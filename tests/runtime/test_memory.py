import gc
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from granq_jax.runtime import memory
from granq_jax.runtime.memory import compile_to_repeat, without_collecting

BLOCKS = """
import resource, sys, warnings
import jax, jax.numpy as jnp
from granq_jax.runtime.memory import compile_to_repeat

warnings.simplefilter("error")
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

@jax.jit
def program(x):
    # Eight matrices of 16 MB that live side by side, which no fusion can do without.
    parts = [x @ (x.T + i) for i in range(8)]
    return sum(jnp.sin(a * b) for a, b in zip(parts, reversed(parts))).sum()

x = jnp.ones((2048, 4))
lowered = program.lower(x)
compiled = compile_to_repeat(lowered, "cpu") if sys.argv[2] == "kept" else lowered.compile()
expected = compiled(x).item()
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert compiled(x).item() == expected
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
# Each of XLA's threads keeps memory of its own, and which of them runs the program is a matter of chance.
print(min(faults))
"""


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_within_and_is_as_before_after(collects):
    was_on = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    within = []

    def failing():
        with without_collecting():
            within.append(gc.isenabled())
            raise KeyError

    try:
        with pytest.raises(KeyError):
            failing()
        assert within == [False]
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was_on else gc.disable)()


@pytest.mark.slow
def test_temporaries_are_kept_from_run_to_run(tmp_path):
    """Page faults of a run: as many as its temporaries have pages, unless their memory is kept."""

    def page_faults(how):
        command = [sys.executable, "-c", BLOCKS, str(tmp_path), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    if sys.platform != "linux" or (taken_anew := page_faults("anew")) < 10_000:
        pytest.skip("a C library, pages or an XLA of another kind: nothing is taken anew")
    assert page_faults("kept") < taken_anew / 10


def test_an_xla_without_these_options_compiles_all_the_same(monkeypatch):
    monkeypatch.setattr(memory, "_CPU_OPTIONS", {"xla_of_another_time": 1})
    assert compile_to_repeat(jax.jit(jnp.sin).lower(0.0), "cpu")(0.0) == 0


def test_what_else_fails_in_compiling_is_not_hidden():
    class Lowered:
        def compile(self, options=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more")

    with pytest.raises(jax.errors.JaxRuntimeError, match="no more"):
        compile_to_repeat(Lowered(), "cpu")
