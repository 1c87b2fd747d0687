"""The networks against their PyTorch originals: same weights, same logits."""

import logging

import jax
import numpy as np
import pytest

from granq_jax import create_model, load_torch
from granq_jax.models.registry import network
from granq_jax.runs.checkpoint import save_variables
from tests.conftest import one_line_error

torch = pytest.importorskip("torch", exc_type=ImportError)
nn = torch.nn

# Each from its own module: pytorchcv.model_provider imports them all, and one of them needs torchvision.
PYTORCHCV = {
    name: getattr(pytest.importorskip(f"pytorchcv.models.{module}", exc_type=ImportError), name)
    for name, module in {
        "resnet20_cifar10": "resnet_cifar",
        "resnet20_cifar100": "resnet_cifar",
        "resnet18": "resnet",
        "resnet50": "resnet",
        "resnet50b": "resnet",
        "mobilenetv2_w1": "mobilenetv2",
    }.items()
}


def conv(inputs, outputs, size, strides):
    return nn.Conv2d(inputs, outputs, size, strides, padding=size // 2, bias=False)


class Unit(nn.Module):
    """A residual unit under torchvision's names, the stride in its first 3x3 convolution."""

    def __init__(self, inputs, outputs, strides, bottleneck):
        super().__init__()
        inside = outputs // 4
        basic = [(outputs, 3, strides), (outputs, 3, 1)]
        layers = [(inside, 1, 1), (inside, 3, strides), (outputs, 1, 1)] if bottleneck else basic
        self.downsample = nn.Identity()
        if strides != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, strides), nn.BatchNorm2d(outputs))
        self.names = [(f"conv{i + 1}", f"bn{i + 1}") for i in range(len(layers))]
        widths = [inputs, *(width for width, _, _ in layers)]
        for (conv_name, bn_name), before, layer in zip(self.names, widths, layers, strict=False):
            self.add_module(conv_name, conv(before, *layer))
            self.add_module(bn_name, nn.BatchNorm2d(layer[0]))

    def forward(self, x):
        y = x
        for conv_name, bn_name in self.names:
            y = self.get_submodule(bn_name)(self.get_submodule(conv_name)(y))
            y = y + self.downsample(x) if bn_name == self.names[-1][1] else y
            y = y.relu()
        return y


class TorchvisionResNet(nn.Module):
    """ResNet as torchvision names and builds it."""

    def __init__(self, units, widths, bottleneck):
        super().__init__()
        self.conv1 = conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        before = 64
        for i, (number, width) in enumerate(zip(units, widths, strict=True)):
            first = Unit(before, width, 1 if i == 0 else 2, bottleneck)
            others = [Unit(width, width, 1, bottleneck) for _ in range(number - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *others))
            before = width
        self.fc = nn.Linear(before, 1000)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def conv_norm(inputs, outputs, size, strides=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, size, strides, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """A unit of MobileNetV2 under torchvision's names: without a first convolution that would widen nothing."""

    def __init__(self, inputs, outputs, strides, expansion):
        super().__init__()
        inside = inputs * expansion
        widen = [conv_norm(inputs, inside, 1)] if expansion > 1 else []
        last = [nn.Conv2d(inside, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*widen, conv_norm(inside, inside, 3, strides, inside), *last)
        self.adds = strides == 1 and inputs == outputs

    def forward(self, x):
        return self.conv(x) + x if self.adds else self.conv(x)


class TorchvisionMobileNet(nn.Module):
    """MobileNetV2 as torchvision names and builds it."""

    def __init__(self):
        super().__init__()
        layers, before = [conv_norm(3, 32, 3, 2)], 32
        stages = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        for expansion, width, units, strides in stages:
            for unit in range(units):
                layers.append(InvertedResidual(before, width, strides if unit == 0 else 1, expansion))
                before = width
        self.features = nn.Sequential(*layers, conv_norm(before, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class CifarResNet(nn.Module):
    """ResNet-20 for small images under torchvision's names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3, 1), nn.BatchNorm2d(16)
        before = 16
        for i, width in enumerate((16, 32, 64)):
            units = [
                Unit(before if unit == 0 else width, width, 2 if i and unit == 0 else 1, False) for unit in range(3)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*units))
            before = width
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(x.mean((2, 3)))


TORCHVISION = {
    "resnet20_cifar10": CifarResNet,
    "mobilenetv2_w1": TorchvisionMobileNet,
    "resnet18": lambda: TorchvisionResNet((2, 2, 2, 2), (64, 128, 256, 512), bottleneck=False),
    "resnet50b": lambda: TorchvisionResNet((3, 4, 6, 3), (256, 512, 1024, 2048), bottleneck=True),
}


def randomised(module, size):
    """``module`` with random weights, for evaluation, and two images of ``size`` pixels.

    The statistics of its batch norms lie about those of the images, so that no layer loses sight of
    them; no two tensors are alike.
    """
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size) + torch.randn(2, 3, 1, 1)  # noise on a colour of each one's own
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        module.train()(images)
        for norm in norms:
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.75, 1.5)
    return module.eval(), images


def logged(caplog, names, name):
    """Whether the log says that the tensors of network ``name`` came under ``names``."""
    return (
        "granq_jax.teachers.torch_import",
        logging.INFO,
        f"teacher: {name} in {names} names",
    ) in caplog.record_tuples


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.INFO, "granq_jax.teachers.torch_import")


@pytest.mark.parametrize(
    ("names", "name", "file"),
    [
        *(("pytorchcv's", name, None) for name in PYTORCHCV),
        *(("torchvision's", name, None) for name in TORCHVISION),
        ("pytorchcv's", "resnet20_cifar10", "t.pth"),
    ],
)
def test_logits_are_those_of_pytorch(tmp_path, caplog, names, name, file):
    make = (PYTORCHCV if names == "pytorchcv's" else TORCHVISION)[name]
    module, images = randomised(make(), network(name).image_size)
    with torch.no_grad():
        expected = module(images).numpy()
    source = module.state_dict()
    if file:
        torch.save(source, tmp_path / file)
        source = tmp_path / file

    variables = load_torch(name, source)

    assert logged(caplog, names, name)
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == trainable
    apply = jax.jit(create_model(name).apply, static_argnames="train")
    with jax.default_matmul_precision("float32"):
        logits = apply(variables, images.permute(0, 2, 3, 1).numpy(), train=False)
    assert logits.dtype == expected.dtype == np.float32
    scale = np.abs(expected).max()
    assert 0.1 < scale < 100
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)


def test_the_same_network_under_each_of_its_names(tmp_path, caplog):
    name = "resnet18"
    theirs = load_torch(name, PYTORCHCV[name]().state_dict())
    assert logged(caplog, "pytorchcv's", name)
    caplog.clear()
    save_variables(tmp_path / "own.safetensors", theirs)
    own = load_torch(name, tmp_path / "own.safetensors")
    assert logged(caplog, "this package's own", name)
    jax.tree.map(np.testing.assert_array_equal, own, theirs)


def test_torchvisions_resnet50_is_not_pytorchcvs():
    tensors = TORCHVISION["resnet50b"]().state_dict()
    with one_line_error(ValueError, "teacher", "torchvision", "'resnet50'", "resnet50b"):
        load_torch("resnet50", tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_tensors_are_kept(dtype):
    tensors = PYTORCHCV["resnet20_cifar10"]().to(dtype).state_dict()
    variables = load_torch("resnet20_cifar10", tensors)
    assert {f"torch.{leaf.dtype.name}" for leaf in jax.tree.leaves(variables)} == {str(dtype)}
    head = variables["params"]["head"]["kernel"].astype(np.float32)
    np.testing.assert_array_equal(head, tensors["output.weight"].float().numpy().T)
