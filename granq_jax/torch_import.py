"""PyTorch checkpoints to Flax variables.

The names understood are pytorchcv's, torchvision's for the networks the two have in common, and this
package's own. Every Flax variable of a network has exactly one name in each, so the map is written
once, from the Flax path to that name.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from granq_jax.models.registry import network
from granq_jax.models.resnet import ResNet
from granq_jax.platforms import traced_for
from granq_jax.tensor_files import READERS, StoredTensor

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_IGNORED = "num_batches_tracked"
_OWN_NAMES = "this package's own"
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LISTED = 20  # of a file that does not fit; a hostile one may hold thousands
_REASON_LENGTH = 300
_TORCHVISION_NETWORKS = ("resnet18", "resnet50b")

logger = logging.getLogger(__name__)


def load_torch(name: str, source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """Flax variables of the network ``name`` from a PyTorch state dict.

    Convolution kernels turn from OIHW to HWIO and linear weights from (out, in) to (in, out); dtypes
    are kept. ``num_batches_tracked`` is ignored. Whose names the tensors have, pytorchcv's or (of
    resnet18 and resnet50b) torchvision's, is seen from them, and logged. A file in this package's own
    names and layout, as :func:`granq_jax.checkpoint.save_variables` writes it, is read as it is.

    Args:
      name: a registered network, see :func:`granq_jax.create_model`.
      source: ``{name: array}``, or the path of an ``.npz``, ``.safetensors``, ``.pth`` or ``.pt``
        file. It may come from anyone: no code in it is run, and no tensor is read before names,
        shapes and dtypes of all were found to fit. PyTorch is not needed.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` for ``create_model(name).apply``.

    Raises:
      ValueError: if tensors are missing, surplus, wrongly shaped or not floating point: they are
        listed by name, twenty of each kind at most. Also for a tensor that holds NaN, infinity or a
        negative variance, an unknown network or kind of file, a file that cannot be read, or
        torchvision's names for resnet50, whose strides lie elsewhere: that one is resnet50b.
      FileNotFoundError: if there is no such file.

    Examples:
      >>> load_torch("resnet20_cifar10", {"output.bias": [0.0] * 10})
      Traceback (most recent call last):
      ...
      ValueError: teacher: the tensors do not fit resnet20_cifar10: missing features.init_block.bn.bias, ...
    """
    network(name)  # raises if there is none
    wanted = _shapes(name)
    with contextlib.nullcontext(source) if isinstance(source, Mapping) else _opened(Path(source)) as tensors:
        if not isinstance(tensors, Mapping) or not all(isinstance(key, str) for key in tensors):
            raise ValueError(f"teacher: {str(source)!r} holds a {type(tensors).__name__}, allowed are tensors by name")
        given = {key: value for key, value in tensors.items() if not key.endswith(_IGNORED)}
        zoo, names = _recognise(name, wanted, given)
        in_flax_names = zoo == _OWN_NAMES
        expected = {key: wanted[path] if in_flax_names else _torch_layout(wanted[path]) for path, key in names.items()}
        fitting = _fitting(name, expected, given)
        variables = {}
        for path, key in names.items():
            with _file_is_to_blame(source):
                value = fitting[key].read() if isinstance(fitting[key], StoredTensor) else fitting[key]
            variables[path] = _checked(key, value if in_flax_names else _to_flax_layout(value), path[-1] == "var")
    logger.info("teacher: %s in %s names", name, zoo if in_flax_names else f"{zoo}'s")
    return jax.device_put(flax.traverse_util.unflatten_dict(variables), may_alias=False)


def torch_name(name: str, path: tuple[str, ...], zoo: str = "pytorchcv") -> str:
    """The name that a zoo gives to the variable at ``path`` (its collection first) of network ``name``.

    Examples:
      >>> path = ("params", "stage1", "unit2", "conv1", "norm", "bn", "scale")
      >>> torch_name("resnet18", path), torch_name("resnet18", path, "torchvision")
      ('features.stage1.unit2.body.conv1.bn.weight', 'layer1.1.bn1.weight')
    """
    _, *modules, leaf = path
    parts = _torchvision_modules(modules) if zoo == "torchvision" else _pytorchcv_modules(name, modules)
    return ".".join([*parts, _LEAVES[leaf]])


@functools.cache
def _shapes(name: str) -> dict[tuple[str, ...], tuple[int, ...]]:
    info = network(name)
    images = jax.ShapeDtypeStruct((1, info.image_size, info.image_size, info.channels), jnp.float32)
    with traced_for(()):  # nowhere
        # The key within: it is not computed then, for which JAX would have to compile.
        variables = jax.eval_shape(lambda x: info.model.init(jax.random.key(0), x), images)
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}


def _pytorchcv_modules(name: str, modules: list[str]) -> list[str]:
    model = network(name).model
    body = ["body"] if isinstance(model, ResNet) else []
    stem = ["conv"] if isinstance(model, ResNet) and model.large_images else []
    first, *rest = (module for module in modules if module != "norm")
    if first == "head":
        return ["output"]
    if first == "stem":
        return ["features", "init_block", *stem, *rest]
    if first == "final":
        return ["features", "final_block", *rest]
    unit, conv, layer = rest
    return ["features", first, unit, *(["identity_conv"] if conv == "shortcut" else [*body, conv]), layer]


def _torchvision_modules(modules: list[str]) -> list[str]:
    if modules == ["head"]:
        return ["fc"]
    first, *rest, layer = (module for module in modules if module != "norm")
    if first == "stem":
        return [f"{layer}1"]
    unit, conv = rest
    number = conv.removeprefix("conv")
    inside = ["downsample", "01"[layer == "bn"]] if conv == "shortcut" else [f"{layer}{number}"]
    return [first.replace("stage", "layer"), str(int(unit.removeprefix("unit")) - 1), *inside]


def _recognise(name: str, paths: Iterable[tuple[str, ...]], given: Container[str]) -> tuple[str, dict]:
    """The zoo whose names most of the tensors have, and the name in it of every path."""
    zoos = {"pytorchcv": {path: torch_name(name, path) for path in paths}}
    zoos[_OWN_NAMES] = {path: "/".join(path) for path in paths}
    if isinstance(network(name).model, ResNet):
        zoos["torchvision"] = {path: torch_name(name, path, "torchvision") for path in paths}
    zoo = max(zoos, key=lambda zoo: sum(key in given for key in zoos[zoo].values()))
    if zoo == "torchvision" and name not in _TORCHVISION_NETWORKS:
        raise ValueError(
            f"teacher: got torchvision's names for {name!r}, allowed are pytorchcv's; "
            f"torchvision's are understood for {', '.join(_TORCHVISION_NETWORKS)}, which are built as it builds them"
        )
    return zoo, zoos[zoo]


def _torch_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return shape[::-1]


def _to_flax_layout(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _fitting(name: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays or ``StoredTensor`` of ``given``, if names, shapes and dtypes are as ``expected``."""
    problems = []
    if missing := sorted(set(expected) - set(given)):
        problems.append(f"missing {_listed(missing)}")
    if surplus := sorted(set(given) - set(expected)):
        problems.append(f"surplus {_listed(surplus)}")
    wrong, fitting = [], {}
    for key in [key for key in expected if key in given]:
        value = given[key] if isinstance(given[key], StoredTensor) else _to_numpy(key, given[key])
        dtype = value.dtype if isinstance(value, StoredTensor) else value.dtype.name
        if value.shape != expected[key]:
            wrong.append(f"{key} has shape {list(value.shape)} instead of {list(expected[key])}")
        elif dtype not in _DTYPES:
            wrong.append(f"{key} has dtype {dtype}, allowed are {', '.join(_DTYPES)}")
        else:
            fitting[key] = value
    if wrong:
        problems.append(_listed(wrong, "; "))
    if problems:
        raise ValueError(f"teacher: the tensors do not fit {name}: {'; '.join(problems)}")
    return fitting


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = [f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return separator.join([*items[:_LISTED], *more])


def _to_numpy(key: str, value: Any) -> np.ndarray:
    try:
        if hasattr(value, "detach"):  # a PyTorch tensor, perhaps on a GPU
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # which numpy does not know
                return np.asarray(value.float()).astype(jnp.bfloat16)
        return np.asarray(value)
    except Exception as error:  # whatever an object that is no array does
        raise ValueError(f"teacher: {key} is a {type(value).__name__} that is no array") from error


def _checked(key: str, value: np.ndarray, is_variance: bool) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
        array = value.astype(jax.dtypes.canonicalize_dtype(value.dtype.newbyteorder("=")), copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"teacher: {key} holds NaN or infinity, allowed are finite numbers of {array.dtype}")
    if is_variance and (array < 0).any():
        raise ValueError(f"teacher: {key} holds {array.min()}, allowed are numbers from 0, since it is a variance")
    return array


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix not in READERS:
        raise ValueError(f"teacher: got {str(path)!r}, allowed are files ending in {', '.join(READERS)}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"teacher: got {str(path)!r}, but there is no such file")
    with contextlib.ExitStack() as stack:
        with _file_is_to_blame(path):
            tensors = stack.enter_context(READERS[path.suffix](path))
        yield tensors


@contextlib.contextmanager
def _file_is_to_blame(path: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each reader has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"teacher: {str(path)!r} cannot be read: {reason[:_REASON_LENGTH]}") from error
