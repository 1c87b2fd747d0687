"""The results table: runs of the grid one after the other, a row of results/table.csv for each, and docs/results.md.

    python benchmarks/table.py run --data-dir DIR --teacher100 FILE [--only NAME ...] [--minutes M]
    python benchmarks/table.py list      # cells, and which are done
    python benchmarks/table.py render    # docs/results.md

A cell is a command that anyone can type, so that a row can be made again without this file. A cell that
was broken off goes on from its last checkpoint; one whose row is there is left out.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from granq_jax.config import flat, load_config
from granq_jax.files.writing import write_text

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "results" / "table.csv", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- the table begins: python benchmarks/table.py render -->", "<!-- the table ends -->"
MEASURED = (
    *("teacher_top1", "student_top1_before", "student_top1", "best_top1", "best_step"),
    *("effective_weight_bits", "effective_act_bits", "storage_bytes", "activation_bytes"),
    *("seconds_per_step", "compile_seconds", "peak_rss_mb", "eval_examples", "steps", "skipped_steps", "versions"),
)


class Cell(NamedTuple):
    """A run of the table: a config, a method, and the settings that differ."""

    config: str
    method: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its row and directory."""
        said = {**self.settings}
        epochs, seed = said.pop("epochs"), said.pop("seed", 0)
        for setting in ("warmup_epochs", "teacher", "on_breakdown"):
            said.pop(setting, None)
        parts = [
            Path(self.config).name,
            self.method,
            *(str(value) for value in said.values()),
            f"{epochs}_epochs",
            f"seed{seed}",
        ]
        return "-".join(parts)

    def command(self) -> list[str]:
        """What is typed; ``DIR`` and ``TEACHER100`` stand for the places of data and of CIFAR-100's teacher."""
        settings = [f"--config.{key}={value}" for key, value in self.settings.items()]
        method = [] if self.method == "granq" else [f"--method={self.method}"]
        config = f"--config=configs/{self.config}.py"
        return ["python", "-m", "granq_jax.main", config, *method, "--config.data_dir=DIR", *settings]


def grid() -> list[Cell]:
    """All cells, in the order in which they are run."""
    cells = [
        Cell("paper/cifar10_w3a3", method, {"epochs": 60, "seed": seed})
        for seed, methods in ((0, ("granq", "adadfq", "gdfq", "akt")), (1, ("granq", "adadfq")))
        for method in methods
    ]
    cells.append(Cell("paper/cifar10_w3a3", "calibration", {"epochs": 60, "warmup_epochs": 60}))
    cells.append(Cell("paper/cifar10_w3a3", "granq", {"quant.weight_granularity": "kernel", "epochs": 60}))
    for bits in (4, 5):
        cells += [Cell(f"paper/cifar10_w{bits}a{bits}", method, {"epochs": 30}) for method in ("granq", "adadfq")]
        cells.append(Cell(f"paper/cifar10_w{bits}a{bits}", "calibration", {"epochs": 30, "warmup_epochs": 30}))
    cells += [
        Cell("paper/cifar100_w3a3", method, {"teacher": "TEACHER100", "epochs": 20, "steps_per_epoch": 100})
        for method in ("granq", "adadfq")
    ]
    cells.append(Cell("paper/cifar10_w3a3", "granq", {"epochs": 200}))
    # What becomes of a student that breaks down is what the rows are there to show.
    return [cell._replace(settings=cell.settings | {"on_breakdown": "go_on"}) for cell in cells]


def rows() -> dict[str, dict[str, str]]:
    """The rows there are, by name."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def add_row(row: dict[str, Any]) -> None:
    """Adds a row, or replaces that of the same name; the columns are those of all rows together."""
    TABLE.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{TABLE}.lock"):
        kept = rows() | {row["name"]: {key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()}}
        columns = list(dict.fromkeys(key for r in kept.values() for key in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
        write_text(TABLE, text.getvalue())


def run(cell: Cell, places: dict[str, str], workdirs: Path, deadline: float) -> bool:
    """Runs a cell to its end and adds its row; ``False`` if there was no time for that."""
    workdir = workdirs / cell.name
    command = [sys.executable, *(_placed(part, places) for part in cell.command()[1:]), f"--workdir={workdir}"]
    workdir.mkdir(parents=True, exist_ok=True)
    commits = workdir / "commits.json"  # of every start
    started = [*(json.loads(commits.read_text()) if commits.exists() else []), commit()]
    commits.write_text(json.dumps(started))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        status = process.wait(min(deadline - time.monotonic(), threading.TIMEOUT_MAX))
    except subprocess.TimeoutExpired:
        process.terminate()  # it completes its step and writes a checkpoint
        if process.wait() in (128 + signal.SIGTERM, -signal.SIGTERM):
            return False
        status = process.returncode
    if status:
        raise SystemExit(f"{cell.name}: the run ended with status {status}")
    result = json.loads((workdir / "result.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    settings = dict(flat(load_config(workdir / "config.json"))) | {"data_dir": "DIR"}
    if "teacher" in cell.settings:
        settings["teacher"] = cell.settings["teacher"]
    add_row(
        {
            "name": cell.name,
            "method": cell.method,
            "command": shlex.join(cell.command()),
            "commit": " ".join(dict.fromkeys(started)),
            **{key: result[key] for key in MEASURED},
            "top1_by_epoch": {line["epoch"]: line["student_top1"] for line in lines if "student_top1" in line},
            "seconds": max(line["seconds"] for line in lines if "seconds" in line),
            **{f"config.{key}": value for key, value in settings.items()},
        }
    )
    return True


def _placed(argument: str, places: dict[str, str]) -> str:
    """An argument of a printed command with what stands for a path replaced by the path."""
    key, equals, value = argument.partition("=")
    return f"{key}{equals}{places.get(value, value)}"


def commit() -> str:
    """The commit that is checked out, with a ``+`` if the package differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = [*git, "status", "--porcelain", "--", "granq_jax", "kernels", "configs"]
    differs = subprocess.run(changed, capture_output=True, text=True, check=True).stdout
    return head.strip() + ("+" if differs else "")


def rendered(done: dict[str, dict[str, str]], cells: Iterable[Cell]) -> str:
    """The table, in Markdown: a row for each cell that is done, its accuracies in percent."""
    lines = ["| data, bits | method | seed | epochs | before | final | best |", "| --- " * 7 + "|"]
    for cell in cells:
        if (row := done.get(cell.name)) is None:
            continue
        data = row["config.dataset"].upper().replace("CIFAR", "CIFAR-")
        granularity = row["config.quant.weight_granularity"]
        columns = [
            f"{data}, W{row['config.quant.weight_bits']}A{row['config.quant.act_bits']}",
            f"`{cell.method}`" + ("" if granularity == "out_channel" else f", `{granularity}`"),
            row["config.seed"],
            row["config.epochs"],
            f"{float(row['student_top1_before']):.2f}",
            f"**{float(row['student_top1']):.2f}**",
            f"{float(row['best_top1']):.2f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def render() -> None:
    """Writes the table into docs/results.md, between its two marks."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{rendered(rows(), grid())}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "list", "render"))
    parser.add_argument("--data-dir", default="", help="where TFDS finds CIFAR-10 and CIFAR-100")
    parser.add_argument("--teacher100", default="", help="checkpoint of the CIFAR-100 teacher")
    parser.add_argument("--workdirs", type=Path, default=ROOT / "runs" / "table")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="of cells, as `list` prints them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which a run is broken off")
    options = parser.parse_args()
    cells = [cell for cell in grid() if options.only is None or cell.name in options.only]
    if unknown := set(options.only or ()) - {cell.name for cell in cells}:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, allowed are the names that `list` prints")
    if options.action == "render":
        return render()
    deadline = time.monotonic() + 60 * options.minutes
    places = {"DIR": options.data_dir, "TEACHER100": options.teacher100}
    for cell in cells:
        done = rows().get(cell.name)
        if options.action == "list":
            print(f"{cell.name}: {'to do' if done is None else done['student_top1']}")
        elif done is None and (time.monotonic() > deadline or not run(cell, places, options.workdirs, deadline)):
            return print(f"{cell.name} goes on when this is started again")


if __name__ == "__main__":
    main()
