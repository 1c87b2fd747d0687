"""What the fuzz tests share: how long they run, and the ways in which bytes are damaged.

By default each runs a few examples, the same every time. For long, with new ones::

    GRANQ_JAX_FUZZ_MINUTES=10 pytest tests/test_fuzz.py tests/runs/test_fuzz_checkpoint.py
"""

import functools
import os
import signal
import time

import hypothesis
from hypothesis import strategies as st

MINUTES = float(os.environ.get("GRANQ_JAX_FUZZ_MINUTES", "0"))
TARGETS = 6  # tests that share the minutes
HANGS_AFTER_S = 20


def fuzz(strategy, examples):
    """Makes a test of a check of one value: ``examples`` values, or as many as there is time for."""

    def decorate(check):
        count = 0

        def within_time(value):
            nonlocal count
            count += 1

            def hangs(*_):
                raise AssertionError(f"no end after {HANGS_AFTER_S} s")

            before = signal.signal(signal.SIGALRM, hangs)
            signal.alarm(HANGS_AFTER_S)
            try:
                check(value)
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)

        settings = hypothesis.settings(
            max_examples=500 if MINUTES else examples,
            derandomize=not MINUTES,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )

        @functools.wraps(check, updated=())
        def test():
            end = time.monotonic() + 60 * MINUTES / TARGETS
            while True:
                settings(hypothesis.given(strategy)(within_time))()
                if time.monotonic() >= end:
                    break
            print(f"{count} examples")  # shown by pytest -rP

        del test.__wrapped__  # pytest would take the value for a fixture
        return test

    return decorate


NUMBERS = st.sampled_from([0, 1, -1, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])


@st.composite
def damaged(draw, whole):
    """``whole`` with up to four damages: bits, cuts, copies, and numbers that matter."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        # Both ends hold what describes the rest.
        place = draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, min(400, len(data) - 1))))
        place = draw(st.sampled_from([place, len(data) - 1 - place]))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["bits", "text", "number", "cut", "end", "copy"])):
            case "bits":
                data[place] ^= draw(st.integers(1, 255))
            case "text":
                data[place : place + length] = draw(st.binary(max_size=64))
            case "number":
                size = draw(st.sampled_from([2, 4, 8]))
                data[place : place + size] = (draw(NUMBERS) % 256**size).to_bytes(size, "little")
            case "cut":
                del data[place : place + length]
            case "end":
                del data[place:]
            case "copy":
                other = draw(st.integers(0, len(data) - 1))
                data[place:place] = data[other : other + length]
    return bytes(data)
