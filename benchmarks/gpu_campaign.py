"""What is claimed of GPUs, put to the test on one, in as many minutes as there are.

    python benchmarks/gpu_campaign.py --minutes M [--only PART ...] [--out DIR] [--data-dir DIR] [--teacher100 FILE]
                                      [--tune] [--rehearse]

The parts, in this order, each in a process of its own, so that a fault in one ends no other:

    a  versions, the card, bandwidth of copies, rate of matrix products           machine.csv
    b  correctness of every kernel, students code by code, golden figures         correctness.csv
    c  bandwidth of every kernel at every shape; --tune tries other blocks        bandwidth.csv, tuning.csv, tiles.json
    d  the joint step of all networks, beside XLA's form and PyTorch              steps.csv, operations.csv

Every row is on disk as soon as it is measured. A part that does not get to its end has the rows it got to, and what
was left out is said at the end and in ``plan.csv``. ``--rehearse`` runs every line on a CPU at tiny sizes, the kernels
interpreted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of each part its module and the minutes that it would like to have.
PARTS = {
    "a": ("gpu_machine", 1.0),
    "b": ("gpu_correctness", 4.0),
    "c": ("gpu_bandwidth", 4.0),
    "d": ("gpu_steps", 12.0),
}
GRACE = 20.0  # seconds that a part may go on after its time, before it is ended


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--data-dir", default="", help="CIFAR: TFDS's directory, or an .npz of the test split")
    parser.add_argument("--teacher100", default="", help="checkpoint of the CIFAR-100 teacher")
    parser.add_argument(
        "--networks", nargs="+", default=None, help="of part d, such as resnet18 or resnet20_cifar10@64"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of the campaign
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def run_part(options: argparse.Namespace) -> None:
    """A part, in this process."""
    deadline = time.monotonic() + options.seconds
    from gpu_common import Context  # JAX is imported here only: the campaign's own process leaves the GPU alone

    context = Context(options.out, deadline, options.rehearse, options)
    importlib.import_module(PARTS[options.part][0]).run(context)


def start_part(part: str, seconds: float, options: argparse.Namespace, given: list[str]) -> str:
    """Runs a part in a process of its own and says how it went."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "granq_jax_gpu_campaign"))
    if options.rehearse:
        environment |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, *given, f"--part={part}", f"--seconds={seconds}"]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds + GRACE)
        return "ran" if status == 0 else f"ended with status {status}"
    except subprocess.TimeoutExpired:
        return "was ended: it took too long"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()


def main() -> int:
    given = sys.argv[1:]
    options = arguments(given)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        run_part(options)
        return 0
    end = time.monotonic() + 60 * options.minutes - GRACE / 2
    plan = options.out / "plan.csv"
    lines = ["part,seconds,how"]
    parts = [part for part in PARTS if part in options.only]
    for i, part in enumerate(parts):
        start, wanted = time.monotonic(), [PARTS[p][1] for p in parts[i:]]
        seconds = max(0.0, end - start) * wanted[0] / sum(wanted)
        how = start_part(part, seconds, options, given) if end > start else "was left out: no time"
        took = time.monotonic() - start
        print(f"part {part}: {how}, {took:.0f} s of {seconds:.0f}", flush=True)
        lines.append(f"{part},{took:.0f},{how}")
        plan.write_text("\n".join(lines) + "\n")
        summary = importlib.import_module("gpu_summary").of_part(part, options.out)
        print(summary, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
