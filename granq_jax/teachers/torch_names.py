"""What zoos and training scripts call the variables of a network.

Every Flax variable of a network has exactly one name in each naming, so each is written once, from
the Flax path to that name.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from granq_jax.files.tensor_files import joined
from granq_jax.models.mobilenet_v2 import STAGES
from granq_jax.models.registry import network, variants
from granq_jax.models.resnet import ResNet
from granq_jax.runtime.platforms import traced_for

Path = tuple[str, ...]

OWN_NAMES = "this package's own"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_PYTORCHCV, _TORCHVISION, _TIMM, _OLDER = "pytorchcv", "torchvision", "timm", "mobilenetv2.pytorch"
_BUILT_AS_TORCHVISION = ("resnet18", "resnet50b")  # of those with units that it builds in a way of its own


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names of a network's variables in one zoo.

    Attributes:
      zoo: whose names they are.
      names: the name of the variable at each path (its collection first).
      shapes: its shape.
      refusal: why tensors of these names are not those of the network, if they are not.
    """

    zoo: str
    names: dict[Path, str]
    shapes: dict[Path, tuple[int, ...]]
    refusal: str = ""

    @property
    def is_own(self) -> bool:
        """Whether the tensors are in this package's own names and layout."""
        return self.zoo == OWN_NAMES

    @functools.cached_property
    def shortcuts(self) -> set[str]:
        """The names of what projects shortcuts."""
        return {name for path, name in self.names.items() if "shortcut" in path}


def torch_name(name: str, path: Path, zoo: str = _PYTORCHCV) -> str:
    """The name that a zoo gives to the variable at ``path`` (its collection first) of network ``name``.

    Examples:
      >>> path = ("params", "stage1", "unit2", "conv1", "norm", "bn", "scale")
      >>> torch_name("resnet18", path), torch_name("resnet18", path, "torchvision")
      ('features.stage1.unit2.body.conv1.bn.weight', 'layer1.1.bn1.weight')
    """
    _, *modules, leaf = path
    model = network(name).model
    modules_of: dict[str, Callable[[list[str]], list[str]]] = {
        _PYTORCHCV: partial(_pytorchcv, model),
        _TORCHVISION: _torchvision_resnet if isinstance(model, ResNet) else _torchvision_mobilenet,
        _OLDER: _older_mobilenet,
        _TIMM: _timm_mobilenet,
    }
    return ".".join([*modules_of[zoo](modules), _LEAVES[leaf]])


@functools.cache
def namings(name: str) -> list[Naming]:
    """All namings of the registered network ``name``, and of the variants in which it is built elsewhere."""
    builds = _shapes(name)
    found = [Naming(_PYTORCHCV, {path: torch_name(name, path) for path in shapes}, shapes) for shapes in builds]
    found += [Naming(OWN_NAMES, {path: joined(path) for path in shapes}, shapes) for shapes in builds]
    elsewhere, refusal = [_TORCHVISION], ""
    if not isinstance(network(name).model, ResNet):
        elsewhere = [_TORCHVISION, _OLDER, _TIMM]
    elif name not in _BUILT_AS_TORCHVISION and any("conv3" in path for path in builds[0]):
        refusal = (
            f"teacher: got torchvision's names for {name!r}, allowed are pytorchcv's; torchvision's are understood for "
            f"{', '.join(_BUILT_AS_TORCHVISION)}, which are built as it builds them"
        )
    for zoo in elsewhere:
        names = {path: torch_name(name, path, zoo) for path in builds[-1]}
        found.append(Naming(zoo, names, builds[-1], refusal))
    return found


def same_name(key: str) -> str:
    """``key`` as torchvision's ResNets have it, where training scripts have other words for the same.

    Examples:
      >>> same_name("layer2.0.shortcut.0.weight"), same_name("linear.bias")
      ('layer2.0.downsample.0.weight', 'fc.bias')
    """
    *modules, leaf = key.split(".")
    return ".".join([*(_SAME.get(module, module) for module in modules), leaf])


_SAME = {"shortcut": "downsample", "linear": "fc"}


@functools.cache
def _shapes(name: str) -> list[dict[Path, tuple[int, ...]]]:
    """The shape of every variable, in each build of the network; the last is torchvision's."""
    info = network(name)
    images = jax.ShapeDtypeStruct((1, info.image_size, info.image_size, info.channels), jnp.float32)

    def shapes(model: nn.Module) -> dict[Path, tuple[int, ...]]:
        with traced_for(()):  # nowhere
            # The key within: it is not computed then, for which JAX would have to compile.
            variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
        return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}

    return [shapes(model) for model in variants(info.model)]


def _pytorchcv(model: nn.Module, modules: list[str]) -> list[str]:
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


def _torchvision_resnet(modules: list[str]) -> list[str]:
    if modules == ["head"]:
        return ["fc"]
    first, *rest, layer = (module for module in modules if module != "norm")
    if first == "stem":
        return [f"{layer}1"]
    unit, conv = rest
    number = conv.removeprefix("conv")
    inside = ["downsample", "01"[layer == "bn"]] if conv == "shortcut" else [f"{layer}{number}"]
    return [first.replace("stage", "layer"), str(int(unit.removeprefix("unit")) - 1), *inside]


def _torchvision_mobilenet(modules: list[str]) -> list[str]:
    place, conv, is_norm = _in_mobilenet(modules)
    if place is None:
        return {"stem": ["features", "0", "01"[is_norm]], "final": ["features", "18", "01"[is_norm]]}.get(
            conv, ["classifier", "1"]
        )
    # Convolutions with an activation are blocks of three; the last one is not.
    number = conv - (place == 1) - 1
    last = conv == 3
    inside = [str(number + is_norm)] if last else [str(number), "01"[is_norm]]
    return ["features", str(place), "conv", *inside]


def _older_mobilenet(modules: list[str]) -> list[str]:
    place, conv, is_norm = _in_mobilenet(modules)
    if place is None:
        return {"stem": ["features", "0", "01"[is_norm]], "final": ["conv", "01"[is_norm]]}.get(conv, ["classifier"])
    return ["features", str(place), "conv", str(3 * (conv - (place == 1) - 1) + is_norm)]


def _timm_mobilenet(modules: list[str]) -> list[str]:
    place, conv, is_norm = _in_mobilenet(modules)
    if place is None:
        return {"stem": [["conv_stem"], ["bn1"]][is_norm], "final": [["conv_head"], ["bn2"]][is_norm]}.get(
            conv, ["classifier"]
        )
    stage = next(stage for stage, end in enumerate(itertools.accumulate(_TIMM_UNITS)) if place <= end)
    unit = place - 1 - sum(_TIMM_UNITS[:stage])
    names = ("conv_dw", "conv_pw") if place == 1 else ("conv_pw", "conv_dw", "conv_pwl")
    number = conv - (place == 1) - 1
    return ["blocks", str(stage), str(unit), f"bn{number + 1}" if is_norm else names[number]]


_TIMM_UNITS = (1, 2, 3, 4, 3, 3, 1)  # of each of its stages, which begin where the width changes


def _in_mobilenet(modules: list[str]) -> tuple[int | None, Any, bool]:
    """Which unit it is, from 1, and which of its convolutions; or ``None`` and what lies outside of all units.

    The last says whether it is the convolution's batch norm.
    """
    first, *rest = modules
    is_norm = modules[-1] == "bn"
    if not first.startswith("stage"):
        return None, first, is_norm
    stage, unit, conv = (int(module[-1]) for module in (first, *rest[:2]))
    return sum(map(len, STAGES[: stage - 1])) + unit, conv, is_norm
