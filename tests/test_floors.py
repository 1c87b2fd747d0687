"""Imports point one way: from what people call down to what everything stands on."""

import ast
import graphlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top. A room imports from rooms of lower floors, and from itself.
FLOORS = (
    ("tools",),
    ("main",),
    ("modes",),
    ("report", "export"),
    ("teachers",),
    ("runs",),
    ("configs",),
    ("config",),
    ("distill", "data"),
    ("quant",),
    ("kernels", "models"),
    ("ops",),
    ("files",),
    ("runtime",),
    ("errors",),
)


def modules():
    """Of each module its name, as it is imported, and its program."""
    for folder in ("granq_jax", "kernels", "configs", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield (parts if folder in ("granq_jax", "tools") else ("granq_jax", *parts)), ast.parse(path.read_text())


def imported(program):
    for node in ast.walk(program):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield (*node.module.split("."), alias.name)
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)


def room(parts):
    return parts[0] if parts[0] == "tools" else parts[1]


HEIGHTS = {name: -i for i, floor in enumerate(FLOORS) for name in floor}
MODULES = list(modules())


@pytest.mark.parametrize(("parts", "program"), MODULES, ids=[".".join(parts) for parts, _ in MODULES])
def test_imports_point_down(parts, program):
    here = room(parts)
    for there in imported(program):
        if here == "__init__" or there[0] not in ("granq_jax", "tools"):
            continue
        assert room(there) in HEIGHTS, f"{'.'.join(there)}: name the module that it lies in"
        assert room(there) == here or HEIGHTS[room(there)] < HEIGHTS[here], f"{here} imports {'.'.join(there)}"


def test_modules_of_quant_form_no_cycle():
    quant = {parts: program for parts, program in MODULES if room(parts) == "quant" and parts[-1] != "__init__"}
    below = {parts: {there[:3] for there in imported(program)} & {*quant} for parts, program in quant.items()}
    assert set(graphlib.TopologicalSorter(below).static_order()) == {*quant}


def test_nothing_else_lies_flat():
    flat = {path.stem for path in (ROOT / "granq_jax").glob("*.py")}
    assert flat == {"__init__", "main", "config", "errors"}


def test_the_wheel_holds_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for folder in ("granq_jax", "kernels", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            place = ".".join(path.parent.relative_to(ROOT).parts)
            found.add(place if folder == "granq_jax" else f"granq_jax.{place}")
    assert set(settings["packages"]) == found
