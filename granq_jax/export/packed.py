"""A quantized model in one ``.safetensors`` file, its codes packed at their true width.

The file holds, under ``/``-joined names, in which a slash of a key is ``%2F``:

- for each quantized weight ``NAME``: ``NAME``, its codes as :func:`granq_jax.export.bits.pack` packs
  them, and ``NAME.ranges``, (2, ...), its steps (1 / scale) and zero points;
- every other variable as it is;
- in the header, under ``granq_jax``: JSON with ``format``, ``network``, ``spec`` and ``codes``, which
  gives ``[bits, shape, dtype]`` of each quantized weight, and ``empty``, the collections without arrays.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import safetensors.numpy

from granq_jax.errors import InputError, check_choice
from granq_jax.export.bits import pack, unpack
from granq_jax.files.tensor_files import MAX_HEADER_BYTES, joined, open_safetensors, split_name
from granq_jax.files.writing import write_bytes
from granq_jax.quant import (
    RANGES,
    Layout,
    QuantizedArray,
    QuantSpec,
    quantize_params,
    weight_paths,
    without_weights,
)
from granq_jax.quant.affine import affine_values
from granq_jax.quant.weights import plain_layouts, quantize_weight
from granq_jax.runtime.paths import expanded

_FORMAT = 1
_KEY = "granq_jax"
_RANGES = ".ranges"
_DTYPES = ("float64", "float32", "bfloat16", "float16")


class PackedModel(NamedTuple):
    """What a packed file holds.

    Attributes:
      variables: of the float model. Weights that were quantized have the values of their codes.
      spec: as the model was quantized, less what is done to the weights already: a
        ``quantize(model, spec)`` applies ``variables`` as the student applied its own.
      network: the name it was saved with.
    """

    variables: dict[str, Any]
    spec: QuantSpec
    network: str


def weight_codes(
    params: Mapping[str, Any], spec: QuantSpec, layouts: Mapping[str, Layout] | None = None
) -> dict[str, QuantizedArray]:
    """The codes of every weight that ``spec`` quantizes, by the path of its module.

    Their values are those of :func:`granq_jax.quant.quantize_params` by XLA, bit for bit; ``layouts`` are the same.

    Raises:
      InputError: if a weight holds NaN or infinity.
    """
    found = {}
    if layouts is None:
        layouts = plain_layouts(params)
        for path, layout in layouts.items():
            if layout.ndim not in (2, 4) and spec.at(path).weight_bits is not None:
                raise InputError(
                    f"layouts: got None, but the weight of {path!r} has {layout.ndim} dimensions, of which several may "
                    "be output features or layers; give quantize(model, spec).layouts(variables, images)"
                )
    expected = weight_paths(jax.device_get(quantize_params(params, spec, "xla", layouts)), layouts)
    for path, weight in weight_paths(params, layouts).items():
        q = jax.device_get(quantize_weight(weight, spec.at(path), layouts[path]))
        if q is None:
            continue
        if not np.isfinite(weight).all():
            raise InputError(f"variables: the weight of {path!r} holds NaN or infinity, allowed are finite numbers")
        found[path] = q
        if not np.array_equal(weight_values(q.codes, q.step, q.zero_point, weight.dtype), expected[path]):
            raise RuntimeError(f"the codes of {path!r} do not stand for what the fake quantizer computes")
    return found


def weight_values(codes: Any, step: Any, zero_point: Any, dtype: Any) -> Any:
    """The weight of ``dtype`` that codes stand for, as the fake quantizer computes it; of NumPy's arrays or JAX's."""
    return affine_values(codes.astype(step.dtype), step, zero_point).astype(dtype)


def save_packed(
    path: str | Path,
    variables: Mapping[str, Any],
    spec: QuantSpec,
    network: str = "",
    layouts: Mapping[str, Layout] | None = None,
) -> int:
    """Writes a quantized model to a ``.safetensors`` file, whole or not at all.

    Args:
      path: of the file.
      variables: of the float model, as they are given to ``quantize(model, spec).apply``.
      spec: how its weights and activations are quantized. Classes in it are saved by their names.
      network: the model's name, for those who load it.
      layouts: of the weights, ``quantize(model, spec).layouts(variables, images)``. Without them, every
        ``kernel`` is taken for that of a convolution or dense layer, (..., I, O): of a model whose layers are
        stacked (``nn.scan``), transposed or have several axes of features, codes would not be the student's.

    Returns:
      The size of the file in bytes.

    Raises:
      InputError: if a weight holds NaN or infinity, something is no array, or there are more of them than
        a file may describe.

    Examples:
      >>> import tempfile
      >>> variables = {"params": {"head": {"kernel": np.linspace(-1, 1, 300, dtype=np.float32).reshape(100, 3)}}}
      >>> path = Path(tempfile.mkdtemp()) / "head.safetensors"
      >>> _ = save_packed(path, variables, QuantSpec(weight_bits=2), network="head")
      >>> packed = load_packed(path)
      >>> packed.network, np.unique(packed.variables["params"]["head"]["kernel"].round(2)).size <= 12
      ('head', True)
    """
    variables = jax.device_get(dict(variables))
    codes = weight_codes(variables["params"], spec, layouts)
    tensors, described, empty = {}, {}, []
    for keys, leaf in flax.traverse_util.flatten_dict(variables, keep_empty_nodes=True).items():
        name, module = joined(keys), "/".join(keys[1:-1])
        if leaf is flax.traverse_util.empty_node:
            empty.append(name)
            continue
        if not isinstance(leaf, np.ndarray | np.generic):
            raise InputError(f"variables: {name!r} is a {type(leaf).__name__}, allowed are arrays in dictionaries")
        if keys[0] == "params" and keys[-1] == "kernel" and module in codes:
            q = codes[module]
            tensors[name], tensors[name + _RANGES] = pack(np.asarray(q.codes), q.bits), np.stack([q.step, q.zero_point])
            described[joined(keys[1:-1])] = [q.bits, leaf.shape, leaf.dtype.name]
        else:
            tensors[name] = np.asarray(leaf)
    fields = dataclasses.asdict(spec)
    fields["overrides"] = [[pattern, dict(changes)] for pattern, changes in spec.overrides]
    fields["activation_modules"] = [getattr(module, "__name__", module) for module in spec.activation_modules]
    header = {
        "format": _FORMAT,
        "network": network,
        "spec": fields,
        "codes": described,
        "empty": empty,
    }
    content = safetensors.numpy.save(tensors, {_KEY: json.dumps(header, separators=(",", ":"))})
    if (size := int.from_bytes(content[:8], "little")) > MAX_HEADER_BYTES:
        raise InputError(
            f"variables: the names and shapes of {len(tensors)} arrays take {size} bytes, allowed are up to "
            f"{MAX_HEADER_BYTES} in a file that can be read again"
        )
    return write_bytes(expanded(path, "path"), content)


def load_packed(path: str | Path) -> PackedModel:
    """Reads what :func:`save_packed` wrote. Nothing in the file is run.

    Raises:
      InputError: if it is no such file, or damaged.
      OSError: if it cannot be read.
    """
    path = expanded(path, "path")
    try:
        with open_safetensors(path) as file:
            header = json.loads((file.metadata() or {})[_KEY])
            if header["format"] != _FORMAT:
                raise InputError(f"format {header['format']!r}, allowed is {_FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not iterable)
        spec, variables = QuantSpec(**header["spec"]), {}
        for module, (bits, shape, dtype) in header["codes"].items():
            name = "/".join(("params", *filter(None, [module]), "kernel"))
            check_choice("dtype", dtype, _DTYPES)
            codes = unpack(tensors.pop(name), bits, tuple(shape))
            step, zero_point = tensors.pop(name + _RANGES)
            # Before they meet: together they could be far larger than either.
            if step.ndim != codes.ndim or any(size not in (1, n) for size, n in zip(step.shape, shape, strict=True)):
                raise InputError(f"the ranges of {name!r} are not those of a weight of shape {shape}")
            variables[name] = weight_values(codes, step, zero_point, dtype)
        variables |= tensors
        variables |= dict.fromkeys(header.get("empty", ()), flax.traverse_util.empty_node)
        tree = flax.traverse_util.unflatten_dict({split_name(name): leaf for name, leaf in variables.items()})
        if spec.act_ranges == "moving_average" and RANGES not in tree and "ranges" in tree:
            tree[RANGES] = tree.pop("ranges")  # as earlier versions called the collection
        return PackedModel(tree, without_weights(spec), str(header["network"]))
    except OSError:
        raise
    except Exception as error:  # damage shows in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{str(path)!r} is not a packed model, or damaged: {reason}") from error
