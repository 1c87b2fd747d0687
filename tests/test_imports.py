"""What `import granq_jax` needs, and what it can do without."""

import ast
import subprocess
import sys
from pathlib import Path

import granq_jax

HEAVY = ("jax.experimental.pallas", "jax._src.pallas", "tensorboardX", "orbax", "requests", "tensorflow_datasets")


def run(script, *arguments, **options):
    """What ``script`` prints, run in a process of its own."""
    command = [sys.executable, *options.pop("flags", ()), "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800, **options)


def test_nothing_heavy_is_imported():
    """Neither by the package nor with all that it gives, but for what Flax imports itself."""

    def imported(script):
        lines = run(script, flags=("-X", "importtime")).stderr.splitlines()
        return {line.rpartition("|")[2].strip() for line in lines}

    before = imported("import jax, flax.linen, optax")
    for script in ("import granq_jax", f"from granq_jax import {', '.join(granq_jax.__all__)}"):
        ours = imported(script) - before
        assert "granq_jax" in ours
        assert not [name for name in ours if name.startswith(HEAVY)]


def test_every_public_name_is_there():
    for name in granq_jax.__all__:
        assert getattr(granq_jax, name).__name__ == name
        assert name in dir(granq_jax)
    assert not hasattr(granq_jax, "fake_quantize")


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse(Path(granq_jax.__file__).read_text())
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("granq_jax")
    ]
    assert {alias.asname: node.module for node in imports for alias in node.names} == granq_jax._HOMES


WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import jax.numpy as jnp
import granq_jax
from granq_jax import fake_quant
print(fake_quant(jnp.array([[0.0, 0.9, 2.2, 3.0]]), bits=2).tolist())
import granq_jax.main, granq_jax.report.__main__
from granq_jax.runs.record import peak_rss_mb
print(peak_rss_mb())
"""


def test_a_system_without_fcntl_and_resource():
    """Windows has neither."""
    assert run(WITHOUT, "fcntl,resource").stdout.split("\n") == ["[[0.0, 1.0, 2.0, 3.0]]", "None", ""]
