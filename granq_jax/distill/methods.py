"""Methods of zero-shot quantization beside GranQ, as settings of the same loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from granq_jax.errors import InputError, check_choice

_GRANQ: Mapping[str, Any] = {
    "quant.act_granularity": "sample_channel",
    "quant.act_ranges": "dynamic",
    "loss.objective": "adadfq",
    "loss.attention": 0.0,
}
_ADADFQ: Mapping[str, Any] = {**_GRANQ, "quant.act_granularity": "tensor", "quant.act_ranges": "moving_average"}

METHODS: dict[str, Mapping[str, Any]] = {
    # The losses of AdaDFQ, a range for each (sample, channel), measured anew on each input.
    "granq": _GRANQ,
    # Qian et al., CVPR 2023: one range an activation, a moving average frozen after the warm-up.
    "adadfq": _ADADFQ,
    # Xu et al., ECCV 2020.
    "gdfq": {**_ADADFQ, "loss.objective": "gdfq", "loss.gamma": 0.1},
    # Hong et al., ACM SAC 2025: AdaDFQ and the distillation of feature maps.
    "akt": {**_ADADFQ, "loss.attention": 1000.0},
    # Nothing is trained but the generator, whose images give the ranges: those of the warm-up.
    "calibration": {**_ADADFQ, "student.lr": 0.0},
}


def set_method(config: ConfigDict, method: str) -> None:
    """Gives ``config`` the settings of ``method``; all others stay as they are.

    Raises:
      InputError: if there is no such method, or ``config`` has no place for its settings.

    Examples:
      >>> from granq_jax import load_config
      >>> config = load_config("cifar10_w3a3")
      >>> set_method(config, "gdfq")
      >>> config.quant.act_ranges, config.loss.objective
      ('moving_average', 'gdfq')
    """
    check_choice("method", method, METHODS)
    try:
        with config.unlocked():  # a setting that it leaves out may be one of the method's
            config.update_from_flattened_dict(METHODS[method])
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"method: {method!r} has settings that this config cannot take: {error}") from None
