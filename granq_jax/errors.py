"""The two ways in which things go wrong, and what values of settings and arguments are allowed.

:class:`InputError` is for what the user gave, :class:`RunError` for what happened. The command exits with status 2 for
the first, with 1 for the second; any other exception is a fault of the package, and is shown with its trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

Check = tuple[Callable[[Any], bool], str]


class InputError(ValueError):
    """What was given cannot be used: the message names it, and says what was given and what is allowed."""


class InputTypeError(InputError, TypeError):
    """What was given is of a type that cannot be used."""


class InputFileError(InputError, FileNotFoundError):
    """A file that was named is not there."""


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that is not in its code; its last checkpoint is intact."""


@contextlib.contextmanager
def reading_input() -> Iterator[None]:
    """Within, what cannot be read or imported was given by the user: an ``OSError`` becomes an :class:`InputError`.

    Examples:
      >>> with reading_input():
      ...     open("/nowhere")
      Traceback (most recent call last):
      ...
      granq_jax.errors.InputError: [Errno 2] No such file or directory: '/nowhere'
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ImportError) as error:
        raise InputError(str(error)) from error


def whole(low: int, high: int | None = None) -> Check:
    """Whole numbers from ``low`` to ``high``."""
    allowed = f"whole numbers from {low}" + ("" if high is None else f" to {high}")
    return lambda v: is_whole(v) and v >= low and (high is None or v <= high), allowed


def real(low: float, high: float = math.inf, low_open: bool = False) -> Check:
    """Finite numbers from ``low``, or above it, to ``high``."""
    allowed = f"finite numbers {'above' if low_open else 'from'} {low:g}"
    if high < math.inf:
        allowed += f" to {high:g}"

    def holds(v):
        v = _plain(v)  # NumPy's would be compared in their own dtype
        # Whole numbers too large for a float are not finite either.
        return _is_real(v) and abs(v) <= _MAX and (v > low if low_open else v >= low) and v <= high

    return holds, allowed


def choice(*values: str) -> Check:
    """One of ``values``."""
    return lambda v: isinstance(v, str) and v in values, ", ".join(map(repr, values))


def truth() -> Check:
    """Truth values."""
    return lambda v: isinstance(v, bool | np.bool_), "True and False"


def text() -> Check:
    """Strings."""
    return lambda v: type(v) is str, "strings"


def decay() -> Check:
    """Decay rates of an average."""
    return lambda v: _is_real(v) and 0 <= v < 1, "numbers from 0 to below 1"


def betas() -> Check:
    """Decay rates of Adam."""
    holds, allowed = decay()
    return lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(holds, v)), f"pairs of {allowed}"


def for_channels(check: Check) -> Check:
    """Tuples of values that ``check`` allows, one for each channel of images, or none."""
    holds, allowed = check
    return lambda v: isinstance(v, tuple) and all(map(holds, v)), f"tuples of {allowed}"


def increasing_epochs() -> Check:
    """Epochs at which something happens."""

    def holds(v):
        return (
            isinstance(v, tuple)
            and all(is_whole(e) and e >= 1 for e in v)
            and all(a < b for a, b in itertools.pairwise(v))
        )

    return holds, "tuples of increasing whole numbers from 1"


def check_fields(owner: Any, checks: Mapping[str, Check]) -> None:
    """Raises an ``InputError`` that names the first attribute of ``owner`` that is not allowed.

    NumPy's numbers among those that are become Python's, which JAX does not promote to their dtypes.

    Examples:
      >>> import types
      >>> check_fields(types.SimpleNamespace(bits=1), {"bits": whole(2, 8)})
      Traceback (most recent call last):
      ...
      granq_jax.errors.InputError: SimpleNamespace.bits: got 1, allowed are whole numbers from 2 to 8
    """
    for field, (holds, allowed) in checks.items():
        value = getattr(owner, field)
        if not holds(value):
            raise InputError(f"{type(owner).__name__}.{field}: got {value!r}, allowed are {allowed}")
        plain = tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        if plain is not value:
            object.__setattr__(owner, field, plain)  # it may be a frozen dataclass


def setting(default: Any, check: Check) -> Any:
    """A field of a dataclass of settings: :func:`check_settings` checks it, and the config has it from there.

    Examples:
      >>> @dataclasses.dataclass
      ... class Settings:
      ...     bits: int = setting(3, whole(2, 8))
      >>> check_settings(Settings(bits=9))
      Traceback (most recent call last):
      ...
      granq_jax.errors.InputError: Settings.bits: got 9, allowed are whole numbers from 2 to 8
    """
    return dataclasses.field(default=default, metadata={"check": check})


def checks_of(owner: Any) -> dict[str, Check]:
    """The checks of the fields of ``owner``, a dataclass or an instance of one, that are settings."""
    return {field.name: field.metadata["check"] for field in dataclasses.fields(owner) if "check" in field.metadata}


def check_settings(owner: Any, but: Iterable[str] = ()) -> None:
    """Raises an ``InputError`` that names the first setting of ``owner``, a dataclass, that is not allowed.

    Those in ``but`` are not looked at.
    """
    check_fields(owner, {name: check for name, check in checks_of(owner).items() if name not in but})


def check_choice(field: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises an ``InputError`` naming ``field`` if ``value`` is not one of ``allowed``."""
    holds, words = choice(*allowed)
    if not holds(value):
        raise InputError(f"{field}: got {value!r}, allowed are {words}")


_MAX = 1.7976931348623157e308


def is_whole(v: Any) -> bool:
    """Whether ``v`` is a whole number, Python's or NumPy's.

    Examples:
      >>> is_whole(3), is_whole(np.int64(3)), is_whole(3.0), is_whole(True)
      (True, True, False, False)
    """
    return isinstance(v, int | np.integer) and not isinstance(v, bool)


def _is_real(v: Any) -> bool:
    return is_whole(v) or isinstance(v, float | np.floating)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
