"""The results table: its cells can be run, and its rows come back as they were written."""

import json
import time

import pytest

from granq_jax import load_config
from granq_jax.config import check_config, default_config, flat
from granq_jax.distill.methods import set_method


def test_every_cell_is_a_run_that_is_allowed(table):
    cells = table.grid()
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        config = load_config(cell.config)
        set_method(config, cell.method)
        config.update_from_flattened_dict(cell.settings)
        check_config(config)
        assert config.epochs % config.eval_every_epochs == 0
        if cell.method == "calibration":
            assert config.warmup_epochs == config.epochs


def test_a_row_is_added_and_rendered(table, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "TABLE", tmp_path / "results" / "table.csv")
    cell, other = table.grid()[:2]
    settings = {f"config.{key}": value for key, value in flat(default_config())}
    figures = dict.fromkeys(table.MEASURED, 91.61) | {"student_top1": 86.2, "versions": {"jax": "0.10.2"}}
    row = {"name": cell.name, "method": cell.method, "commit": "abc", **figures, "seconds": 7200.0}
    row |= settings | {"top1_by_epoch": {10: 80.0, 20: 86.2}}
    table.add_row(row)
    table.add_row({**row, "name": other.name, "new": 1})
    table.add_row({**row, "student_top1": 87.0})  # once more
    done = table.rows()
    assert list(done) == [cell.name, other.name]
    assert json.loads(done[cell.name]["versions"]) == {"jax": "0.10.2"}
    text = table.rendered(done, table.grid())
    (line,) = [line for line in text.splitlines() if line.startswith(f"| CIFAR-10, W3A3 | `{cell.method}` |")]
    assert line.endswith("| 91.61 | **87.00** | 91.61 |")


def test_paths_take_the_place_of_the_names_that_are_printed(table):
    cell = next(cell for cell in table.grid() if "teacher" in cell.settings)
    places = {"DIR": "/data", "TEACHER100": "/teachers/t.pth"}
    placed = [table._placed(part, places) for part in cell.command()]
    assert "--config.data_dir=/data" in placed
    assert "--config.teacher=/teachers/t.pth" in placed


@pytest.mark.slow
def test_a_cell_is_run_and_goes_on_where_it_was_broken_off(table, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "TABLE", tmp_path / "results" / "table.csv")
    settings = {"epochs": 2, "steps_per_epoch": 4, "warmup_epochs": 1, "teacher_training.epochs": 1}
    cell = table.Cell("digits_w2a2", "adadfq", settings | {"teacher_training.small_epochs": 0})
    assert not table.run(cell, {"DIR": ""}, tmp_path, deadline=time.monotonic() + 1)
    assert table.rows() == {}
    assert table.run(cell, {"DIR": ""}, tmp_path, deadline=float("inf"))
    row = table.rows()[cell.name]
    assert (row["steps"], row["config.quant.act_ranges"], row["eval_examples"]) == ("8", "moving_average", "360")
    assert json.loads(row["top1_by_epoch"])["2"] == float(row["student_top1"])
    assert row["effective_act_bits"] == "2.0"
    assert f"**{float(row['student_top1']):.2f}**" in table.rendered(table.rows(), [cell])
