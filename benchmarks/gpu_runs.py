"""Parts e and f: whole runs of the command line on the GPU, to the end or for as long as there is time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from gpu_common import Context, reason

ROOT = Path(__file__).parents[1]
COLUMNS = (
    *("config", "settings", "dataset", "batch", "seed", "steps", "of_steps", "wall_s", "ms_a_step", "compile_s"),
    *("teacher_top1", "student_top1_before", "student_top1", "best_top1", "top1_by_epoch", "gpu_gb", "ended"),
)
POLL = 0.5  # seconds
STOPPING = 45.0  # that a run has to write its checkpoint


class Run(NamedTuple):
    """A run: a config's name, and the settings that differ."""

    config: str
    settings: dict[str, str]


# The paper's settings and the recommended ones, each network first with one seed.
END_TO_END = [
    Run(config, {"seed": str(seed)})
    for seeds in ((0,), (1, 2))
    for config in ("cifar10_w3a3", "paper/cifar10_w3a3", "cifar100_w3a3")
    for seed in seeds
]
RANDOM = "random"  # as teacher: weights that are as fast as a teacher's, which cannot be fetched here
IMAGENET = Run(
    "paper/imagenet_resnet18_w3a3", {"eval": "none", "on_nonfinite": "skip", "warmup_epochs": "1", "teacher": RANDOM}
)
_REHEARSED = {"epochs": "2", "steps_per_epoch": "2", "warmup_epochs": "1", "batch_size": "2", "log_every_steps": "1"}


def parsed(text: str) -> Run:
    """``CONFIG,KEY=VALUE,...`` as a run."""
    config, *settings = text.split(",")
    return Run(config, dict(setting.split("=", 1) for setting in settings))


def run(context: Context) -> None:
    """Part e: writes ``runs.csv``."""
    table = context.table("runs", *COLUMNS)
    runs = [parsed(text) for text in context.options.runs or ()] or END_TO_END
    if context.rehearsal:
        digits = {**_REHEARSED, "teacher_training.epochs": "1", "eval_every_epochs": "1"}
        runs = [Run("digits_w2a2", digits)]
    for one in runs:
        if context.left < STOPPING + 30:
            print(f"left out: {one.config} {_said(one.settings)}", flush=True)
            continue
        _row(one, context, table)


def imagenet(context: Context) -> None:
    """Part f: writes ``imagenet.csv``; rehearsed with a smaller network, for this one takes minutes on a CPU."""
    table = context.table("imagenet", *COLUMNS)
    rehearsed = Run("paper/cifar10_w3a3", {**IMAGENET.settings, **_REHEARSED})
    _row(rehearsed if context.rehearsal else IMAGENET, context, table)


def _row(one, context, table):
    described = {"config": one.config, "settings": _said(one.settings)}
    try:
        with tempfile.TemporaryDirectory() as directory:
            row = _run(one, context, Path(directory))
        table.add(**described, **row)
        print(
            f"{one.config} {_said(one.settings)}: {row['ended']}, {row['steps']} steps in {row['wall_s']:.0f} s, "
            f"top-1 {row.get('student_top1', row.get('top1_by_epoch', ''))}",
            flush=True,
        )
    except Exception as error:
        table.add(**described, error=reason(error))
        print(f"{one.config} {_said(one.settings)}: {reason(error)}", flush=True)


def _run(one, context, directory):
    workdir, log = directory / "run", directory / "log.txt"
    settings = dict(one.settings)
    if context.options.data_dir:
        settings.setdefault("data_dir", context.options.data_dir)
    elif not one.config.startswith("digits"):
        settings.setdefault("eval", "none")
    if one.config.startswith("cifar100"):
        settings.setdefault("teacher", context.options.teacher100 or RANDOM)
    if settings.get("teacher") == RANDOM:
        settings["teacher"] = _random_teacher(one.config, directory)
    command = [sys.executable, "-m", "granq_jax.main", f"--config={one.config}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    held, start = 0.0, time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None and context.left > STOPPING:
            held = max(held, gpu_gigabytes())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
        if cut := process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    wall = time.monotonic() - start
    if process.returncode and not cut:
        raise RuntimeError(f"status {process.returncode}: {log.read_text()[-400:]}")
    return {**_figures(workdir, wall), "gpu_gb": held or "", "ended": "cut off" if cut else "to the end"}


def _figures(workdir, wall):
    """What the run's files say: its result, or where it was when it was cut off."""
    config = json.loads((workdir / "config.json").read_text())
    metrics = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [line for line in lines if "seconds" in line]
    row = {
        "dataset": config["dataset"],
        "batch": config["batch_size"],
        "seed": config["seed"],
        "steps": max((line["step"] for line in lines), default=0),
        "of_steps": config["epochs"] * config["steps_per_epoch"],
        "wall_s": wall,
        "top1_by_epoch": " ".join(f"{x['epoch']}:{x['student_top1']:.2f}" for x in lines if "student_top1" in x),
    }
    if len(losses) > 1:
        first, last = losses[len(losses) // 4], losses[-1]
        row["ms_a_step"] = 1e3 * (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"])
    result = workdir / "result.json"
    if result.exists():
        known = json.loads(result.read_text())
        row |= {key: known[key] for key in COLUMNS if known.get(key) is not None}
        row |= {"ms_a_step": 1e3 * known["seconds_per_step"], "compile_s": known["compile_seconds"]}
    return row


def _random_teacher(config, directory):
    """A file of random weights, made on a CPU."""
    path = directory / "teacher.safetensors"
    code = (
        "import sys, jax, jax.numpy as jnp\n"
        "from granq_jax import load_config\n"
        "from granq_jax.runs.checkpoint import save_variables\n"
        "from granq_jax.models.registry import network\n"
        "from pathlib import Path\n"
        "info = network(load_config(sys.argv[1]).network)\n"
        "images = jnp.zeros((1, info.image_size, info.image_size, info.channels))\n"
        "save_variables(Path(sys.argv[2]), jax.jit(info.model.init)(jax.random.key(0), images))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code, config, str(path)], env=environment, check=True)
    return str(path)


def gpu_gigabytes() -> float:
    """What all processes together hold of the GPU's memory; 0 where nothing tells."""
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.splitlines()[0]) / 1e3
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return 0.0


def _said(settings):
    return " ".join(f"{key}={value}" for key, value in settings.items())
