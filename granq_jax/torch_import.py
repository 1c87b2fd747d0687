"""PyTorch checkpoints to Flax variables.

The names understood are those of the public CIFAR checkpoints (pytorchcv's): every Flax variable of
a network has exactly one name there, so the map is written once, from the Flax path to that name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from granq_jax.models.registry import network

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_IGNORED = "num_batches_tracked"


def load_torch(name: str, source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """Flax variables of the network ``name`` from a PyTorch state dict.

    Convolution kernels turn from OIHW to HWIO and linear weights from (out, in) to (in, out); dtypes
    are kept. ``num_batches_tracked`` is ignored. A file in this package's own names and layout, as
    :func:`granq_jax.checkpoint.save_variables` writes it, is read as it is.

    Args:
      name: a registered network, see :func:`granq_jax.create_model`.
      source: ``{name: array}``, or the path of an ``.npz``, ``.safetensors``, ``.pth`` or ``.pt``
        file. The last two need PyTorch (the ``torch`` extra) and are read with
        ``weights_only=True``, so that no code in them can run.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` for ``create_model(name).apply``.

    Raises:
      ValueError: if tensors are missing, surplus, wrongly shaped or not floating point: all are
        listed by name. Also for an unknown network or kind of file, or a file that cannot be read.
      FileNotFoundError: if there is no such file.
      ImportError: if the file needs PyTorch and it is not installed.

    Example:
      >>> load_torch("resnet20_cifar10", {"output.bias": [0.0] * 10})
      Traceback (most recent call last):
      ...
      ValueError: teacher: the tensors do not fit resnet20_cifar10: missing features.init_block.bn.bias, ...
    """
    info = network(name)
    tensors = _read(source)
    if not isinstance(tensors, Mapping) or not all(isinstance(key, str) for key in tensors):
        raise ValueError(f"teacher: {str(source)!r} holds a {type(tensors).__name__}, allowed are tensors by name")
    images = jax.ShapeDtypeStruct((1, info.image_size, info.image_size, info.channels), jnp.float32)
    shapes = jax.eval_shape(info.model.init, jax.random.key(0), images)
    wanted = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    in_flax_names = any(key.startswith("params/") for key in tensors)
    names = {path: "/".join(path) if in_flax_names else torch_name(path) for path in wanted}

    given = {key: value for key, value in tensors.items() if not key.endswith(_IGNORED)}
    problems = []
    if missing := sorted(set(names.values()) - set(given)):
        problems.append(f"missing {', '.join(missing)}")
    if surplus := sorted(set(given) - set(names.values())):
        problems.append(f"surplus {', '.join(surplus)}")
    variables = {}
    for path, key in names.items():
        if key not in given:
            continue
        value = _to_numpy(given[key])
        expected = wanted[path] if in_flax_names else _torch_layout(wanted[path])
        if value.shape != expected:
            problems.append(f"{key} has shape {list(value.shape)} instead of {list(expected)}")
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{key} has dtype {value.dtype}, which is not floating point")
        else:
            variables[path] = jnp.asarray(value if in_flax_names else _to_flax_layout(value))
    if problems:
        raise ValueError(f"teacher: the tensors do not fit {name}: {'; '.join(problems)}")
    return flax.traverse_util.unflatten_dict(variables)


def torch_name(path: tuple[str, ...]) -> str:
    """The name in public checkpoints of the Flax variable at ``path`` (its collection first).

    Example:
      >>> torch_name(("params", "stage1", "unit2", "conv1", "norm", "bn", "scale"))
      'features.stage1.unit2.body.conv1.bn.weight'
    """
    _, *modules, leaf = path
    parts = []
    for depth, module in enumerate(modules):
        if depth == 0 and module != "head":
            parts.append("features")
        if module.startswith("conv") and module != "conv":
            parts.append("body")
        if module != "norm":
            parts.append({"stem": "init_block", "head": "output", "shortcut": "identity_conv"}.get(module, module))
    return ".".join([*parts, _LEAVES[leaf]])


def _torch_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width)
    return shape[::-1]


def _to_flax_layout(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a PyTorch tensor; numpy knows no bfloat16 of its
        value = value.detach().float() if str(value.dtype) == "torch.bfloat16" else value.detach()
    return np.asarray(value)


def _read(source: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pth": _read_pth, ".pt": _read_pth}
    if path.suffix not in readers:
        raise ValueError(f"teacher: got {str(path)!r}, allowed are files ending in {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"teacher: got {str(path)!r}, but there is no such file")
    try:
        return readers[path.suffix](path)
    except ImportError:
        raise
    except Exception as error:  # each reader has errors of its own; what failed is always the file
        raise ValueError(f"teacher: {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    import safetensors.flax

    return safetensors.flax.load_file(path)


def _read_pth(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"teacher: reading {str(path)!r} needs PyTorch: pip install 'granq-jax[torch]', "
            "or convert the file to .npz or .safetensors where PyTorch is installed"
        ) from None
    return torch.load(path, map_location="cpu", weights_only=True)
