import gc

import pytest

from granq_jax.memory import without_collecting


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_within_and_is_as_before_after(collects):
    was_on = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    within = []

    def failing():
        with without_collecting():
            within.append(gc.isenabled())
            raise KeyError

    try:
        with pytest.raises(KeyError):
            failing()
        assert within == [False]
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was_on else gc.disable)()
