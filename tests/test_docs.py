"""The documentation stays short, and the tutorial is run as it stands, as a stranger would paste it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from granq_jax.data.datasets import load_split

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MOST_WORDS, MOST_LINES, LONGEST_LINE = 8000, 90, 100  # of README and docs; of the README
BLOCKS = re.findall(r"^```python\n(.*?)^```", (DOCS / "own_model.md").read_text(), re.DOTALL | re.MULTILINE)
# The last block is said to need neither the package nor the model's code.
ALONE = """
import sys
sys.modules["granq_jax"] = sys.modules["flax"] = None
import jax
import jax.numpy as jnp
images, labels = jnp.load("images.npy"), jnp.load("labels.npy")
"""


def run(code, folder):
    finished = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def percentages(printed):
    return {name: float(value) for name, value in re.findall(r"^([a-z, ]+): ([\d.]+) %$", printed, re.MULTILINE)}


def test_the_documentation_is_short():
    """What ``wc -w`` counts; the API's reference is made of docstrings."""
    pages = [ROOT / "README.md", *(page for page in sorted(DOCS.glob("*.md")) if page.name != "api.md")]
    words = {page.name: len(page.read_text().split()) for page in pages}
    assert sum(words.values()) <= MOST_WORDS, words


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


@pytest.mark.slow
def test_a_model_of_ones_own_from_its_definition_to_the_artifact(tmp_path):
    printed = run("\n".join(BLOCKS), tmp_path)
    accuracy = percentages(printed)
    assert accuracy["teacher"] > 95
    assert accuracy["student"] > accuracy["teacher"] - 4
    assert accuracy["artifact"] == accuracy["student"]
    assert "Site(path='Conv_0', kind='weight', shape=(3, 3, 1, 16), bits=8" in printed
    assert "Site(path='Conv_0', kind='activation', shape=(360, 8, 8, 1), bits=None" in printed
    assert "Site(path='Dense_0', kind='activation', shape=(360, 128), bits=3" in printed
    size = int(re.search(r"^packed: (\d+) bytes$", printed, re.MULTILINE)[1])
    assert size == (tmp_path / "my_net.safetensors").stat().st_size

    split = load_split("digits", "test")
    np.save(tmp_path / "images.npy", split.dataset.normalise(split.images))
    np.save(tmp_path / "labels.npy", split.labels)
    assert percentages(run(ALONE + BLOCKS[-1], tmp_path))["artifact"] == accuracy["student"]
