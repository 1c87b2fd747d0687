"""Learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence

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
    decays = {epoch * steps_per_epoch: 0.1 for epoch in decay_epochs}
    schedule = optax.piecewise_constant_schedule(learning_rate, decays)
    return lambda count: schedule(count + first_step)
