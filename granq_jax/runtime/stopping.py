"""Ways in which a run ends before its last step: a signal asks it to, or it cannot go on."""

from __future__ import annotations

import _thread
import contextlib
import gc
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """Raised where a signal asks a run to end.

    Attributes:
      signal: its number.
    """

    def __init__(self, signum: int, detail: str = ""):
        super().__init__(f"interrupted by {signal.Signals(signum).name}{detail}")
        self.signal = signum

    @property
    def exit_status(self) -> int:
        """As shells give it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal


class Interruption:
    """What :func:`interruptible` gives: the first signal, and a way to hold it back for a while."""

    def __init__(self) -> None:
        self._held_back = False
        self._signal: int | None = None

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """A signal that comes within is raised when the block is left, and one that was lost when it is entered."""
        self._raise()
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False
        self._raise()

    def agree(self) -> None:
        """Called where several processes have taken the same steps; see :mod:`granq_jax.runtime.processes`."""

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            return  # it is ending already, and must not lose what it saves by a second signal
        if _in_garbage_collection(frame):
            # What is raised there is lost. (A thread of `threading` takes locks to start, which may be held here.)
            _thread.start_new_thread(_send_again, (signum, threading.get_ident()))
            return
        self._signal = signum
        if not self._held_back:
            self._raise()

    def _raise(self) -> None:
        if self._signal is not None:
            raise Interrupted(self._signal)


def _send_again(signum: int, thread: int) -> None:
    time.sleep(0.05)
    signal.pthread_kill(thread, signum)


def _in_garbage_collection(frame: FrameType | None) -> bool:
    """Whether ``frame`` lies in a callback of the garbage collector; JAX has one."""
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None and frame.f_code not in callbacks:
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def interruptible(interruption: Interruption | None = None) -> Iterator[Interruption]:
    """SIGTERM and SIGINT raise :class:`Interrupted` within, unless they are ignored.

    Outside the main thread nothing changes, since signals come to that one.

    Examples:
      >>> try:
      ...     with interruptible() as interruption, interruption.held_back():
      ...         signal.raise_signal(signal.SIGTERM)
      ...         print("the step is completed")
      ... except Interrupted as interrupted:
      ...     print(interrupted)
      the step is completed
      interrupted by SIGTERM
    """
    interruption = interruption or Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    # A shell starts what runs in its background with SIGINT ignored, which is to stay so.
    caught = [signum for signum, handler in before.items() if handler is not signal.SIG_IGN]
    for signum in caught:
        signal.signal(signum, interruption._handle)
    try:
        yield interruption
    finally:
        for signum in caught:
            signal.signal(signum, before[signum] or signal.SIG_DFL)
