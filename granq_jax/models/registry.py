"""Networks by name."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn

from granq_jax.errors import InputError
from granq_jax.models.mobilenet_v2 import MobileNetV2
from granq_jax.models.resnet import BottleneckUnit, ResNet


@dataclasses.dataclass(frozen=True)
class Network:
    """A registered network: the module and the input it is made for."""

    model: nn.Module
    classes: int
    image_size: int
    channels: int = 3


def _imagenet(model: nn.Module) -> Network:
    return Network(model, classes=1000, image_size=224)


_ImageNetResNet = partial(ResNet, 1000, stem_width=64, large_images=True)
_resnet50 = partial(_ImageNetResNet, (3, 4, 6, 3), (256, 512, 1024, 2048))

NETWORKS = {
    "resnet20_cifar10": Network(ResNet(10), classes=10, image_size=32),
    "resnet20_cifar100": Network(ResNet(100), classes=100, image_size=32),
    "resnet8_digits": Network(ResNet(10, units=(1, 1, 1)), classes=10, image_size=8, channels=1),
    "resnet18": _imagenet(_ImageNetResNet((2, 2, 2, 2), (64, 128, 256, 512))),
    "resnet50": _imagenet(_resnet50(BottleneckUnit)),
    # The stride in the 3x3 convolutions, as torchvision has it.
    "resnet50b": _imagenet(_resnet50(partial(BottleneckUnit, late_strides=True))),
    "mobilenetv2_w1": _imagenet(MobileNetV2(1000)),
}


def network(name: str) -> Network:
    """The registered network ``name``; a ``ValueError`` lists the names there are."""
    if not isinstance(name, str) or name not in NETWORKS:
        raise InputError(f"network: got {name!r}, allowed are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def variants(model: nn.Module) -> list[nn.Module]:
    """Modules with the sets of variables that ``model`` computes: its own first, then those of other builds.

    Examples:
      >>> [variant.head_bias for variant in variants(create_model("mobilenetv2_w1"))]
      [False, False, True]
    """
    if not isinstance(model, MobileNetV2):
        return [model]
    builds = {(model.first_expansion, model.head_bias): None, (False, False): None, (False, True): None}
    return [dataclasses.replace(model, first_expansion=first, head_bias=bias) for first, bias in builds]


def create_model(name: str) -> nn.Module:
    """The Flax module of the network ``name``.

    Raises:
      InputError: for a name that is not registered; it lists those that are.

    Examples:
      >>> create_model("resnet20_cifar10").classes
      10
    """
    return network(name).model
