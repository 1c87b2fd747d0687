"""What is claimed of GPUs, put to the test on one, in as many minutes as there are.

    python benchmarks/gpu_campaign.py --minutes M [--only PART ...] [--out DIR] [--data-dir DIR] [--teacher100 FILE]
                                      [--networks NETWORK[@BATCH] ...] [--runs CONFIG[,KEY=VALUE...] ...]
                                      [--tune] [--rehearse]
    python benchmarks/gpu_campaign.py --page    # the summary in docs/gpu.md anew from results/gpu

The parts, in this order, each in a process of its own, so that a fault in one ends no other:

    a  versions, the card, bandwidth of copies, rate of matrix products           machine.csv
    b  correctness of every kernel, students code by code, golden figures         correctness.csv
    c  bandwidth of every kernel at every shape; --tune tries other blocks        bandwidth.csv, tuning.csv, tiles.json
    d  the joint step of all networks, beside XLA's form and PyTorch              steps.csv, operations.csv
    e  whole runs on CIFAR-10 and CIFAR-100, recommended and released settings    runs.csv
    f  an ImageNet network's steps for as long as there is time                   imagenet.csv

Every row is on disk as soon as it is measured. A part that does not get to its end has the rows it got to, and
``plan.csv`` says what was left out. A part replaces its tables; of a campaign in several goes, rename those that are
to stay (``steps_2.csv``), and ``--page`` makes one summary of all. ``--data-dir`` holds ``cifar10.npz`` and
``cifar100.npz``, or what else ``config.data_dir`` may be; without it runs are not evaluated. ``--rehearse`` runs it on
a CPU at tiny sizes, the kernels interpreted. Part d needs PyTorch for its other side: ``pip install -e ".[parity]"``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # where tools/ lies
# Of each part its module, the function there, and the minutes that it would like to have.
PARTS = {
    "a": ("gpu_machine", "run", 1.0),
    "b": ("gpu_correctness", "run", 4.0),
    "c": ("gpu_bandwidth", "run", 4.0),
    "d": ("gpu_steps", "run", 12.0),
    "e": ("gpu_runs", "run", 12.0),
    "f": ("gpu_runs", "imagenet", 3.0),
}
LEFT_OUT = "left out: "  # what a part prints before the name of what it had no time for
GRACE = 20.0  # seconds that a part may go on after its time, before it is ended


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--page", action="store_true", help="make the page of the tables there are, and no more")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--data-dir", default="", help="CIFAR: TFDS's directory, or an .npz of the test split")
    parser.add_argument("--teacher100", default="", help="checkpoint of the CIFAR-100 teacher")
    parser.add_argument("--networks", nargs="+", help="of part d, such as resnet18 or resnet20_cifar10@64")
    parser.add_argument("--runs", nargs="+", help="of part e, such as cifar10_w3a3,seed=1,epochs=20")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of the campaign
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    for place in ("data_dir", "teacher100"):  # runs have another working directory
        if value := getattr(options, place):
            setattr(options, place, str(Path(value).absolute()))
    if options.minutes is None and not options.page:
        parser.error("--minutes: not given, allowed are numbers above 0")
    return options


def run_part(options: argparse.Namespace) -> None:
    """A part, in this process."""
    deadline = time.monotonic() + options.seconds
    from gpu_common import Context  # JAX is imported here only: the campaign's own process leaves the GPU alone

    context = Context(options.out, deadline, options.rehearse, options)
    module, function, _ = PARTS[options.part]
    getattr(importlib.import_module(module), function)(context)


def start_part(part: str, seconds: float, options: argparse.Namespace, given: list[str]) -> tuple[str, list[str]]:
    """Runs a part in a process of its own; says how it went, and what it left out."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "granq_jax_gpu_campaign"))
    if options.rehearse:
        environment |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *given, f"--part={part}", f"--seconds={seconds}"]
    left_out: list[str] = []

    def tell(lines):
        for line in lines:
            print(line, end="", flush=True)
            if line.startswith(LEFT_OUT):
                left_out.append(line.removeprefix(LEFT_OUT).strip())

    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as process:
        reader = threading.Thread(target=tell, args=(process.stdout,))
        reader.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds + GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        reader.join()
    status = process.returncode
    how = {0: "ran", -signal.SIGKILL: "was ended: it took too long"}.get(status, f"ended with status {status}")
    return how, left_out


def write_page(out: Path) -> None:
    """The summary of the tables in ``out``: in docs/gpu.md, or beside tables that lie elsewhere."""
    gpu_page = importlib.import_module("gpu_page")
    if out.resolve() == (ROOT / "results" / "gpu").resolve():
        place = ROOT / "docs" / "gpu.md"
        place.write_text(gpu_page.put_into(place.read_text(), gpu_page.page(out)))
    else:
        (out / "summary.md").write_text(f"{gpu_page.page(out)}\n")


def main() -> int:
    given = sys.argv[1:]
    options = arguments(given)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.page:
        write_page(options.out)
        return 0
    if options.part:
        run_part(options)
        return 0
    end = time.monotonic() + 60 * options.minutes - GRACE / 2
    plan = [("part", "seconds", "how", "left_out")]
    parts = [part for part in PARTS if part in options.only]
    for i, part in enumerate(parts):
        start, wanted = time.monotonic(), [PARTS[p][2] for p in parts[i:]]
        seconds = (end - start) * wanted[0] / sum(wanted)
        how, left_out = start_part(part, seconds, options, given) if seconds > 0 else ("was left out: no time", [])
        took = time.monotonic() - start
        print(f"part {part}: {how}, {took:.0f} s of {max(0.0, seconds):.0f}", flush=True)
        plan.append((part, f"{took:.0f}", how, "; ".join(left_out)))
        with (options.out / "plan.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(plan)
        print(importlib.import_module("gpu_page").of_part(part, options.out), flush=True)
        write_page(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
