"""The README's example is run as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_the_example_on_a_model_of_ones_own(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    accuracy = {name: float(value) for name, value in re.findall(r"^([a-z, ]+): ([\d.]+) %$", printed, re.MULTILINE)}
    assert accuracy["teacher"] > 95
    assert accuracy["student"] > accuracy["teacher"] - 4
    assert "Site(path='Conv_0', kind='weight', shape=(3, 3, 1, 16), bits=8" in printed
    assert "Site(path='Conv_0', kind='activation', shape=(360, 8, 8, 1), bits=None" in printed
    assert "Site(path='Dense_0', kind='activation', shape=(360, 128), bits=3" in printed
