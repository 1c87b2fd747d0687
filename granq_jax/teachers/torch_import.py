"""PyTorch checkpoints to Flax variables.

A file may hold the tensors of the network alone or, as training scripts leave it, among other
things: somewhere in dictionaries, under names that all have a prefix. They are looked for by their
names and shapes, and where they are found twice, with different numbers, the file is refused.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from granq_jax.errors import InputError, InputFileError
from granq_jax.files.pickles import PickledArray, Unread
from granq_jax.files.tensor_files import StoredTensor, open_tensors
from granq_jax.models.registry import network
from granq_jax.runtime.paths import expanded
from granq_jax.teachers.torch_names import Naming, namings, same_name
from granq_jax.teachers.torch_names import torch_name as torch_name

# What wrappers of a whole model or a part of it put into names, and buffers that count for themselves.
_WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module"})
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LISTED = 5  # of a file that does not fit; a hostile one may hold thousands
_REASON_LENGTH = 300
_DEPTH, _MOST_DICTIONARIES = 3, 100  # where tensors are looked for
_LONGEST_NAME = 10  # modules: of the namings' there are eight

logger = logging.getLogger(__name__)


def load_torch(name: str, source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """Flax variables of the network ``name`` from a PyTorch state dict.

    Convolution kernels turn from OIHW to HWIO and linear weights from (out, in) to (in, out); dtypes
    are kept. Whose names the tensors have, pytorchcv's, torchvision's or timm's, is seen from them, and
    logged. A file in this package's own names and layout, as
    :func:`granq_jax.runs.checkpoint.save_variables` writes it, is read as it is.

    Of what a training script saves, the dictionary whose tensors fit is taken (``state_dict``,
    ``model``, ...), and prefixes that all names share (``module.``, ``_orig_mod.``, ...) and counters
    (``num_batches_tracked``) are left out. MobileNetV2 is taken as pytorchcv and as torchvision build
    it, see :class:`granq_jax.models.mobilenet_v2.MobileNetV2`.

    Args:
      name: a registered network, see :func:`granq_jax.create_model`.
      source: ``{name: array}``, or the path of an ``.npz``, ``.safetensors`` or PyTorch file, whatever
        its suffix. It may come from anyone: no code in it is run, and no tensor is read before names,
        shapes and dtypes of all were found to fit. PyTorch is not needed.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` for ``create_model(name).apply``.

    Raises:
      InputError: if tensors are missing, surplus, wrongly shaped or not floating point: they are
        listed by name, five of each kind at most. Also for two sets of tensors that fit, a whole model
        that was pickled, a tensor that holds NaN, infinity or a negative variance, an unknown network
        or kind of file, a file that cannot be read, or torchvision's names for resnet50, whose strides
        lie elsewhere: that one is resnet50b.
      FileNotFoundError: if there is no such file.

    Examples:
      >>> load_torch("resnet20_cifar10", {"output.bias": [0.0] * 10})
      Traceback (most recent call last):
      ...
      granq_jax.errors.InputError: teacher: the tensors do not fit resnet20_cifar10: missing ...
    """
    return load_named(name, source)[0]


def load_named(name: str, source: str | os.PathLike | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What :func:`load_torch` gives, and the zoo whose names the tensors had, as in ``torch_names``."""
    network(name)  # raises if there is none
    if isinstance(source, Mapping):
        # Other lists are none of the tensors.
        lists = {
            key: _to_numpy(key, source[key])
            for naming in namings(name)
            for key in naming.names.values()
            if isinstance(source.get(key), list)
        }
        found = _found(name, {**source, **lists})
        arrays = found.read()
    else:
        place = expanded(source, "teacher")
        with _opened(place) as content:
            found = _found(name, content, place)
            with _file_is_to_blame(place):
                arrays = found.read()
    variables = {}
    for path, key in found.naming.names.items():
        value = arrays[key] if found.naming.is_own else _to_flax_layout(arrays[key])
        variables[path] = _checked(key, value, path[-1] == "var")
    zoo = found.naming.zoo
    logger.info("teacher: %s in %s names%s", name, zoo if found.naming.is_own else f"{zoo}'s", found.whereabouts)
    return jax.device_put(flax.traverse_util.unflatten_dict(variables), may_alias=False), zoo


@dataclasses.dataclass(frozen=True)
class _Found:
    """Tensors that may be those of a network.

    Attributes:
      naming: whose names they have.
      place: the keys of the dictionaries that they were found in.
      prefix: what all of their names begin with.
      tensors: those of the naming's names that are there, or what is there instead.
      surplus: the names of other tensors beside them.
    """

    naming: Naming
    place: tuple[str, ...]
    prefix: str
    tensors: dict[str, Any]
    surplus: list[str]

    @property
    def whereabouts(self) -> str:
        """Where they are, to follow what they are."""
        within = "".join(f"[{key[:_REASON_LENGTH]!r}]" for key in self.place)
        return (f", in {within}" if within else "") + (f", below {self.prefix!r}" if self.prefix else "")

    @property
    def missing(self) -> list[str]:
        """Names that are not there."""
        return sorted(set(self.naming.names.values()) - self.tensors.keys())

    def expected(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, in the naming's layout."""
        n = self.naming
        return {key: n.shapes[path] if n.is_own else _torch_layout(n.shapes[path]) for path, key in n.names.items()}

    def wrong(self) -> list[str]:
        """What is wrong with the shapes and dtypes of the tensors that are there."""
        wrong, expected = [], self.expected()
        for key, value in self.tensors.items():
            if not _is_array(value):
                wrong.append(f"{key} is {_named(value)}, allowed are tensors")
            elif not _same_shape(_shape(key, value), expected[key]):
                wrong.append(f"{key} has shape {list(_shape(key, value))} instead of {list(expected[key])}")
            elif (dtype := _dtype(key, value)) not in _DTYPES:
                wrong.append(f"{key} has dtype {dtype}, allowed are {', '.join(_DTYPES)}")
        return wrong

    @property
    def is_whole(self) -> bool:
        """Whether they make the network."""
        return not self.missing and not self.wrong()

    def read(self) -> dict[str, np.ndarray]:
        """All of them."""
        return {key: _read(key, self.tensors[key]).reshape(shape) for key, shape in self.expected().items()}


def _found(name: str, content: Any, path: Path | None = None) -> _Found:
    """The one set of tensors in ``content`` that fits; raises an ``InputError`` that says why there is none."""
    file = "" if path is None else f"{str(path)!r} "
    dictionaries = dict(_dictionaries(content))
    candidates = [
        found for place, tensors in dictionaries.items() for found in _candidates(namings(name), place, tensors)
    ]
    whole = [found for found in candidates if found.is_whole]
    if not whole:
        if model := _whole_model(content, dictionaries.values()):
            raise InputError(
                f"teacher: {file}holds a whole pickled model ({model}), whose code would have to run; where it does, "
                "save what load_state_dict() takes instead: torch.save(model.state_dict(), FILE)"
            )
        if not dictionaries:
            raise InputError(f"teacher: {file}holds {_named(content)}, allowed are tensors by name")
        best = max(candidates, key=lambda found: len(found.tensors), default=None)
        raise InputError(_reason(name, best, dictionaries, file))
    first, *others = whole
    for other in others:
        with contextlib.nullcontext() if path is None else _file_is_to_blame(path):
            are_equal = _equal(first, other)
        if not are_equal:
            places = " and ".join(found.whereabouts[2:] or "on their own" for found in (first, other))
            raise InputError(
                f"teacher: {file}holds two sets of tensors that fit {name} and differ, {places}; save the one you want "
                "in a file of its own"
            )
    # Equal ones may lie beside different others.
    chosen = min(whole, key=lambda found: len(found.surplus))
    if chosen.naming.refusal or chosen.surplus:
        raise InputError(chosen.naming.refusal or _reason(name, chosen, dictionaries, file))
    return chosen


def _dictionaries(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The dictionaries in ``content`` that hold more than others, by the keys that lead there, each once."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for _ in range(_DEPTH):
        deeper = []
        for place, value in level:
            if not isinstance(value, Mapping) or id(value) in seen or len(seen) >= _MOST_DICTIONARIES:
                continue
            seen.add(id(value))
            items = {key: item for key, item in value.items() if isinstance(key, str)}
            if tensors := {key: item for key, item in items.items() if not isinstance(item, Mapping)}:
                yield place, tensors
            deeper += [((*place, key), item) for key, item in items.items() if isinstance(item, Mapping)]
        level = deeper


def _candidates(known: Sequence[Naming], place: tuple[str, ...], given: Mapping[str, Any]) -> Iterator[_Found]:
    """For each prefix that names of the network have in ``given``, the tensors in the naming that most of them have."""
    plain = {_without_wrappers(key): key for key in given}
    if len(plain) < len(given):  # they tell tensors apart
        plain = {key: key for key in given}
    in_other_words = {same_name(key): key for key in plain}
    best: dict[str, tuple[tuple[int, int], Naming, dict[str, str]]] = {}
    for naming in known:
        keys = {same: plain[key] for same, key in in_other_words.items()} if naming.zoo == "torchvision" else plain
        for prefix, names in _prefixes(naming, keys).items():
            count = (len(names), -len(naming.names))  # of equal counts, the one that lacks fewer
            if prefix not in best or count > best[prefix][0]:
                best[prefix] = (count, naming, {name: keys[prefix + name] for name in names})
    for prefix, (_, naming, keys) in best.items():
        tensors = {name: given[key] for name, key in keys.items()}
        used = set(keys.values())
        surplus = sorted(key for key, value in given.items() if key not in used and not _counts(key, value))
        yield _Found(naming, place, prefix, tensors, surplus)


def _prefixes(naming: Naming, keys: Mapping[str, str]) -> dict[str, list[str]]:
    """By what stands before them, the names of the naming that ``keys`` hold."""
    wanted, found = set(naming.names.values()), collections.defaultdict(list)
    for key in keys:
        parts = key.rsplit(".", _LONGEST_NAME)
        for start in range(len(parts)):
            if (name := ".".join(parts[start:])) in wanted:
                found[key[: len(key) - len(name)]].append(name)
    return found


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _counts(key: str, value: Any) -> bool:
    """Whether an entry beside the tensors is none of a network's, or one that counts something."""
    if not _is_array(value) or key.rpartition(".")[2] in _COUNTERS:
        return True
    return int(np.prod(_shape(key, value))) == 1 and "int" in _dtype(key, value)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape")


def _whole_model(content: Any, dictionaries: Any) -> str:
    """The class of a module that was pickled with its code's name; ``""`` if there is none."""
    for value in [content, *(value for held in dictionaries for value in held.values())]:
        if isinstance(value, Unread) and isinstance(value.state, Mapping) and "_modules" in value.state:
            return value.name.replace(" ", ".")[:_REASON_LENGTH]
    return ""


def _named(content: Any) -> str:
    if isinstance(content, Unread):
        return f"a {content.name.replace(' ', '.')[:_REASON_LENGTH]}"
    return f"a {type(content).__name__}"


def _reason(name: str, best: _Found | None, dictionaries: Mapping[Any, Mapping[str, Any]], file: str) -> str:
    """Why tensors do not fit a network: what is wrong comes first, and what is missing last."""
    if best is None:
        names = [key[:_REASON_LENGTH] for held in dictionaries.values() for key in held]
        zoos = ", ".join(dict.fromkeys(naming.zoo for naming in namings(name)))
        return (
            f"teacher: {file}holds no tensor by a name of {name}, as {zoos} names have them; surplus {_listed(names)}"
        )
    if best.naming.refusal and len(best.tensors) > len(best.naming.names) / 2:
        return best.naming.refusal
    missing, wrong = best.missing, best.wrong()
    if best.naming.zoo == "torchvision" and not wrong and missing and set(missing) == best.naming.shortcuts:
        return (
            f"teacher: {file}holds a network whose shortcuts have no weights (they are padded with zeros, option A of "
            f"the paper); those of {name} are projected by 1x1 convolutions (option B): it is another network"
        )
    problems = [
        *([_listed(wrong, "; ")] if wrong else []),
        *([f"surplus {_listed(best.surplus)}"] if best.surplus else []),
        *([f"missing {_listed(missing)}"] if missing else []),
    ]
    return f"teacher: {file and f'in {file}'}the tensors{best.whereabouts} do not fit {name}: {'; '.join(problems)}"


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = [f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return separator.join([*(item[:_REASON_LENGTH] for item in items[:_LISTED]), *more])


def _equal(first: _Found, other: _Found) -> bool:
    if first.naming is not other.naming:
        return False
    arrays = other.read()
    return all(np.array_equal(value, arrays[key], equal_nan=True) for key, value in first.read().items())


def _torch_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return shape[::-1]


def _to_flax_layout(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _same_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether they are equal, or those of a linear layer and of the 1x1 convolution that it is."""
    linear, convolution = sorted((shape, expected), key=len)
    return shape == expected or (len(linear) == 2 and convolution == (*linear, 1, 1))


def _shape(key: str, value: Any) -> tuple[int, ...]:
    return value.shape if isinstance(value, StoredTensor | PickledArray) else _to_numpy(key, value).shape


def _dtype(key: str, value: Any) -> str:
    return value.dtype if isinstance(value, StoredTensor | PickledArray) else _to_numpy(key, value).dtype.name


def _read(key: str, value: Any) -> np.ndarray:
    return value.read() if isinstance(value, StoredTensor | PickledArray) else _to_numpy(key, value)


def _to_numpy(key: str, value: Any) -> np.ndarray:
    try:
        if hasattr(value, "detach"):  # a PyTorch tensor, perhaps on a GPU
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # which numpy does not know
                return np.asarray(value.float()).astype(jnp.bfloat16)
        return np.asarray(value)
    except Exception as error:  # whatever an object that is no array does
        raise InputError(f"teacher: {key} is a {type(value).__name__} that is no array") from error


def _checked(key: str, value: np.ndarray, is_variance: bool) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
        array = value.astype(jax.dtypes.canonicalize_dtype(value.dtype.newbyteorder("=")), copy=False)
    if not np.isfinite(array).all():
        raise InputError(f"teacher: {key} holds NaN or infinity, allowed are finite numbers of {array.dtype}")
    if is_variance and (array < 0).any():
        raise InputError(f"teacher: {key} holds {array.min()}, allowed are numbers from 0, since it is a variance")
    return array


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise InputFileError(f"teacher: got {str(path)!r}, but there is no such file")
    with contextlib.ExitStack() as stack:
        with _file_is_to_blame(path):
            tensors = stack.enter_context(open_tensors(path))
        yield tensors


@contextlib.contextmanager
def _file_is_to_blame(path: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each reader has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"teacher: {str(path)!r} cannot be read: {reason[:_REASON_LENGTH]}") from error
