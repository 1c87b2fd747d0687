"""A run's files without the run: settings, metrics, a checkpoint of a student moved at random."""

import json

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from granq_jax.config import make_trainer
from granq_jax.files.writing import write_json
from granq_jax.runs.checkpoint import Checkpoints, save_variables
from granq_jax.runs.record import record_start
from tests.digits import digits


def write_run(workdir, command="", finished=True, **changes):
    """Writes the files of a run of two epochs; returns its config, teacher and last state."""
    workdir.mkdir(parents=True)
    config = digits()
    config.epochs, config.steps_per_epoch, config.warmup_epochs = 2, 10, 1
    config.teacher = str(workdir / "given.safetensors")
    config.update_from_flattened_dict(changes)
    trainer = make_trainer(config)
    model_variables = jax.jit(trainer.model.init)(jax.random.key(config.seed), np.ones((2, 8, 8, 1), np.float32))
    teacher = jax.device_get(model_variables)
    state = jax.device_get(trainer.init(teacher))
    rng = np.random.default_rng(0)
    moved = {
        path: np.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), np.float32)
        for path, leaf in flatten_dict(state.student["params"]).items()
    }
    state = state.replace(student={**state.student, "params": unflatten_dict(moved)})
    save_variables(workdir / "given.safetensors", teacher)
    write_json(workdir / "config.json", config.to_dict())
    record_start(workdir, command)
    lines = [
        {
            "step": step,
            "epoch": step // 10,
            "loss_g": 1.0 / step,
            "loss_s": -step,
            "hinge": 0.1,
            "onehot": 2.0,
            "bns": 3.0,
        }
        for step in range(2, 21, 2)
    ]
    lines += [{"step": 10, "epoch": 1, "student_top1": 81.25}, {"step": 20, "epoch": 2, "student_top1": 87.5}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(20, state)
    if finished:
        accuracies = {"teacher_top1": 95.0, "student_top1_before": 70.0, "student_top1": 87.5}
        accuracies |= {key.replace("top1", "top5"): 99.0 for key in accuracies}
        result = {
            **accuracies,
            **{"best_top1": 88.125, "best_step": 10, "best_picked_on": "the test set", "eval_examples": 360},
            **{"effective_weight_bits": 3.25, "seconds_per_step": 0.5, "compile_seconds": 1.5, "peak_rss_mb": 100.0},
        }
        write_json(workdir / "result.json", result)
    return config, teacher, state
