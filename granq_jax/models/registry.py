"""Networks by name."""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from granq_jax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Network:
    """A registered network: the module and the input it is made for."""

    model: nn.Module
    classes: int
    image_size: int
    channels: int = 3


NETWORKS = {
    "resnet20_cifar10": Network(ResNet(10), classes=10, image_size=32),
    "resnet20_cifar100": Network(ResNet(100), classes=100, image_size=32),
    "resnet8_digits": Network(ResNet(10, units=(1, 1, 1)), classes=10, image_size=8, channels=1),
}


def network(name: str) -> Network:
    """The registered network ``name``; a ``ValueError`` lists the names there are."""
    if name not in NETWORKS:
        raise ValueError(f"network: got {name!r}, allowed are {', '.join(NETWORKS)}")
    return NETWORKS[name]


def create_model(name: str) -> nn.Module:
    """The Flax module of the network ``name``.

    Raises:
      ValueError: for a name that is not registered; it lists those that are.

    Example:
      >>> create_model("resnet20_cifar10").classes
      10
    """
    return network(name).model
