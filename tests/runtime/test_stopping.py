import contextlib
import gc
import signal
import time

import pytest

from granq_jax.runtime.stopping import Interrupted, interruptible


def test_a_signal_during_garbage_collection_is_raised_after_it():
    phases = []

    def called_by_the_collector(phase, info):
        phases.append(phase)
        if phase == "stop":
            signal.raise_signal(signal.SIGTERM)
            phases.append("goes on")

    def collect_and_go_on():
        with interruptible():
            gc.callbacks.append(called_by_the_collector)
            try:
                gc.collect()
            finally:
                gc.callbacks.remove(called_by_the_collector)
            time.sleep(60)

    gc.disable()  # so that the collector calls when it is told to, and then only
    try:
        with pytest.raises(Interrupted, match="SIGTERM"):
            collect_and_go_on()
    finally:
        gc.enable()
    assert phases == ["start", "stop", "goes on"]


def test_a_signal_that_was_lost_is_raised_before_the_next_step():
    def take_step():
        with interruptible() as interruption:
            with contextlib.suppress(Interrupted):  # as where an object is finalized
                signal.raise_signal(signal.SIGTERM)
            with interruption.held_back():
                pytest.fail("the step is taken")

    with pytest.raises(Interrupted, match="SIGTERM"):
        take_step()


def test_a_second_signal_does_not_disturb_what_is_saved():
    saved = []

    def end():
        with interruptible():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGINT)
                saved.append("all")

    with pytest.raises(Interrupted, match="SIGTERM"):
        end()
    assert saved == ["all"]
