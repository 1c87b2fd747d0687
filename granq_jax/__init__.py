"""Zero-shot quantization in JAX: a low-bit image classifier from a trained one, without data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granq_jax.config import load_config as load_config
    from granq_jax.distill.joint_run import zero_shot_quantize as zero_shot_quantize
    from granq_jax.distill.settings import LossSettings as LossSettings
    from granq_jax.distill.settings import OptimizerSettings as OptimizerSettings
    from granq_jax.distill.trainer import Trainer as Trainer
    from granq_jax.models import Activation as Activation
    from granq_jax.models import Generator as Generator
    from granq_jax.models import create_model as create_model
    from granq_jax.modes.train import train_and_evaluate as train_and_evaluate
    from granq_jax.quant import QuantSpec as QuantSpec
    from granq_jax.quant import dequantize as dequantize
    from granq_jax.quant import fake_quant as fake_quant
    from granq_jax.quant import quantize as quantize
    from granq_jax.quant import quantize_codes as quantize_codes
    from granq_jax.teachers.torch_import import load_torch as load_torch

# Each is imported when it is used: all of them together take as long as half of JAX.
_HOMES = {
    "load_config": "granq_jax.config",
    "zero_shot_quantize": "granq_jax.distill.joint_run",
    "Activation": "granq_jax.models",
    "Generator": "granq_jax.models",
    "create_model": "granq_jax.models",
    "QuantSpec": "granq_jax.quant",
    "dequantize": "granq_jax.quant",
    "fake_quant": "granq_jax.quant",
    "quantize": "granq_jax.quant",
    "quantize_codes": "granq_jax.quant",
    "load_torch": "granq_jax.teachers.torch_import",
    "train_and_evaluate": "granq_jax.modes.train",
    "LossSettings": "granq_jax.distill.settings",
    "OptimizerSettings": "granq_jax.distill.settings",
    "Trainer": "granq_jax.distill.trainer",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
