import numpy as np

from granq_jax.distill.schedules import step_decay


def test_a_decay_takes_effect_at_the_first_step_of_its_epoch():
    rate = step_decay(1e-3, (2, 4), steps_per_epoch=5)
    expected = [1e-3] * 10 + [1e-4] * 10 + [1e-5] * 5
    np.testing.assert_allclose([rate(step) for step in range(25)], expected, rtol=1e-6)


def test_an_optimizer_that_starts_later_sees_the_same_epochs():
    rate, late = step_decay(1.0, (2,), 5), step_decay(1.0, (2,), 5, first_step=7)
    np.testing.assert_allclose([late(count) for count in range(8)], [rate(count + 7) for count in range(8)])


def test_without_decays_the_rate_is_constant():
    rate = step_decay(0.5, (), steps_per_epoch=10)
    assert [float(rate(step)) for step in (0, 10, 10**6)] == [0.5] * 3
