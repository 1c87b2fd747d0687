"""Learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax


def step_decay(
    learning_rate: float, decay_epochs: Sequence[int], steps_per_epoch: int, first_step: int = 0
) -> optax.Schedule:
    """A tenth of the rate from each of ``decay_epochs`` on (epochs count from 0).

    Args:
      learning_rate: in epoch 0.
      decay_epochs: increasing epochs at whose first step the rate falls.
      steps_per_epoch: length of an epoch.
      first_step: global step at which the optimizer that uses the schedule counts 0.

    Returns:
      A function from the optimizer's count to the rate.

    Examples:
      >>> rate = step_decay(1.0, (2, 3), steps_per_epoch=10)
      >>> [round(float(rate(step)), 6) for step in (0, 19, 20, 29, 30)]
      [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    if not decay_epochs:  # XLA for CPUs of jax 0.11 crashes on a sum over no elements within a larger program
        return optax.constant_schedule(learning_rate)
    decays = np.array([epoch * steps_per_epoch - first_step for epoch in decay_epochs])
    rates = learning_rate * 0.1 ** np.arange(len(decays) + 1)
    # A sum and a look-up are computed once a step, where XLA repeats a formula for every parameter.
    return lambda count: jnp.asarray(rates)[jnp.sum(count >= decays)]
