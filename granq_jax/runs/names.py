"""What the files of a run are called, beside each other in its directory."""

from __future__ import annotations

CONFIG = "config.json"
LOCK = "run.lock"
STARTS = "starts.jsonl"
METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
CHECKPOINTS = "checkpoints"
HELD_OUT = "held_out.safetensors"
RESULT = "result.json"
REPORT = "report.html"
EVALUATION = "evaluation.json"
PROFILE = "profile.json"
TRACES = "profile"
EXPORT = "export"
TRAINED_TEACHER = "teacher.safetensors"
TEACHER_RESULT = "teacher.json"  # written by --mode train_teacher alone
TEACHER_TRAINING = "teacher_training"
TEACHER_SETTINGS = "settings.json"  # in TEACHER_TRAINING
