"""GranQ's arithmetic in PyTorch, as its users run it: what the other benchmarks compare with.

The networks are pytorchcv's, the quantizer the formula of :mod:`granq_jax.quant.affine` vectorized
over (sample, channel), the losses those of :mod:`granq_jax.distill.losses`. Student and teacher are separate
forward passes, and so are the student's for the generator's loss and for its own, as in the released
code. Where PyTorch offers a choice the faster way is taken: minimum and maximum of contiguous maps
in one pass, mean and variance in one pass, gradients of the generator's loss for the generator only,
the teacher's logits used twice, weights quantized once an evaluation. Nothing waits for the device.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from pytorchcv.models import mobilenetv2, resnet, resnet_cifar
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

NETWORKS = {
    "resnet20_cifar10": resnet_cifar.resnet20_cifar10,
    "resnet20_cifar100": resnet_cifar.resnet20_cifar100,
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
    "mobilenetv2_w1": mobilenetv2.mobilenetv2_w1,
}
MEMORY_FORMATS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}


class FakeQuant(torch.autograd.Function):
    """Quantize and dequantize with a range for each index of the axes before ``first``."""

    @staticmethod
    def forward(ctx, x, bits, first):
        if x.is_contiguous():
            low, high = torch.aminmax(x.flatten(first), dim=first, keepdim=True)
            shape = (*x.shape[:first], *(1,) * (x.ndim - first))
            low, high = low.view(shape), high.view(shape)
        else:
            axes = tuple(range(first, x.ndim))
            low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        half = 2 ** (bits - 1)
        scale = (2**bits - 1) / (high - low).clamp_(min=1e-8)
        zero_point = (scale * low).round_().add_(half)
        codes = (scale * x).sub_(zero_point).round_().clamp_(-half, half - 1)
        return codes.add_(zero_point).div_(scale)

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent, None, None


class QuantizedWeight(nn.Module):
    """A range for each output channel."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def forward(self, weight):
        return FakeQuant.apply(weight, self.bits, 1)


def quantized(model, bits):
    """Quantizes the weights of every layer and the outputs of every ReLU of ``model``."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrize.register_parametrization(module, "weight", QuantizedWeight(bits))
        elif isinstance(module, nn.ReLU | nn.ReLU6):
            module.register_forward_hook(lambda module, args, output: FakeQuant.apply(output, bits, 2))
    return model


class Generator(nn.Module):
    """The 32-pixel generator."""

    def __init__(self, classes, latent=100):
        super().__init__()
        self.embed = nn.Embedding(classes, latent)
        self.dense = nn.Linear(latent, 8 * 8 * 128)
        self.norm0 = nn.BatchNorm2d(128)
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.BatchNorm2d(128, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, 64, 3, padding=1),
            nn.BatchNorm2d(64, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, 3, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(3, affine=False),
        )

    def forward(self, z, labels):
        x = self.dense(z * self.embed(labels)).view(-1, 128, 8, 8)
        return self.body(self.norm0(x))


class ConditionalNorm(nn.Module):
    """A batch norm whose scale and shift the label chooses."""

    def __init__(self, classes, features, epsilon):
        super().__init__()
        self.norm = nn.BatchNorm2d(features, epsilon, affine=False)
        self.weights, self.biases = (nn.Embedding(classes, features) for _ in range(2))
        nn.init.ones_(self.weights.weight)
        nn.init.zeros_(self.biases.weight)

    def forward(self, x, labels):
        scale, shift = (table(labels)[:, :, None, None] for table in (self.weights, self.biases))
        return self.norm(x) * scale + shift


class ConditionalGenerator(nn.Module):
    """The generator of ImageNet's images: of noise alone, with a conditional batch norm for the label."""

    def __init__(self, classes, latent=100, image_size=224):
        super().__init__()
        self.small = image_size // 4
        self.dense = nn.Linear(latent, self.small**2 * 128)
        self.norm0 = ConditionalNorm(classes, 128, 1e-5)
        self.conv1 = nn.Conv2d(128, 128, 3, padding=1)
        self.norm1 = ConditionalNorm(classes, 128, 0.8)
        self.conv2 = nn.Conv2d(128, 64, 3, padding=1)
        self.norm2 = ConditionalNorm(classes, 64, 0.8)
        self.conv3 = nn.Conv2d(64, 3, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(3, affine=False)

    def forward(self, z, labels):
        def larger(x):
            return functional.interpolate(x, scale_factor=2)

        x = self.norm0(self.dense(z).view(-1, 128, self.small, self.small), labels)
        x = functional.leaky_relu(self.norm1(self.conv1(larger(x)), labels), 0.2)
        x = functional.leaky_relu(self.norm2(self.conv2(larger(x)), labels), 0.2)
        return self.norm3(torch.tanh(self.conv3(x)))


def entropy(logits):
    log_p = functional.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What differs between the networks: classes, whether the images are ImageNet's, and the losses' numbers."""

    classes: int = 10
    large: bool = False
    temperature: float = 20.0
    lower: float = 0.1
    alpha_ds: float = 0.2
    lr: float = 1e-4


# As the configs have them at W3A3.
SETTINGS = {
    "resnet20_cifar10": Settings(),
    "resnet20_cifar100": Settings(classes=100),
    "resnet18": Settings(1000, True, temperature=5.0, lr=1e-5),
    "resnet50": Settings(1000, True, temperature=5.0, lower=0.4),
    "mobilenetv2_w1": Settings(1000, True, temperature=5.0, lr=1e-5),
}


class JointStep:
    """One GranQ step after another.

    ``weights`` are the teacher's state dict, random ones by default; ``compiled`` has ``torch.compile`` make one
    program of everything up to the generator's loss, and one of the student's; it may name a mode of it.
    """

    def __init__(
        self,
        batch,
        network="resnet20_cifar10",
        memory_format="channels_first",
        bits=3,
        latent=100,
        weights=None,
        seed=0,
        device="cpu",
        compiled=False,
    ):
        torch.manual_seed(seed)
        self.settings = SETTINGS[network]
        self.batch, self.classes, self.latent, self.device = batch, self.settings.classes, latent, device
        self.memory_format = MEMORY_FORMATS[memory_format]
        teacher, student = (NETWORKS[network]() for _ in range(2))
        student.load_state_dict(weights or teacher.state_dict())
        teacher.load_state_dict(weights or teacher.state_dict())
        self.teacher = self._placed(teacher).eval()
        self.student = self._placed(quantized(student, bits)).eval()
        make_generator = ConditionalGenerator if self.settings.large else Generator
        self.generator = self._placed(make_generator(self.classes, latent)).train()
        self.teacher.requires_grad_(False)
        self.moments: list = []  # of a teacher pass: (batch norm, variance, mean of its input)
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._observe)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(
            self.student.parameters(), lr=self.settings.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
        )
        self.compiled = bool(compiled)
        self.for_generator, self.for_student = (
            torch.compile(loss, mode=None if compiled is True else compiled) if compiled else loss
            for loss in (self._for_generator, self._for_student)
        )

    def _placed(self, module):
        return module.to(self.device, memory_format=self.memory_format)

    def _observe(self, module, args, output):
        self.moments.append((module, *torch.var_mean(args[0], dim=(0, 2, 3), correction=0)))

    def generator_loss(self, t, s, labels):
        cross = functional.cross_entropy
        onehot = self.settings.alpha_ds * cross(t - s, labels) + 0.1 * cross(t + s, labels)
        h = entropy(t - s)
        h = (h - h.min()) / (math.log(self.classes) - h.min())
        hinge = functional.relu(self.settings.lower - h).mean() + functional.relu(h - 0.8).mean()
        mse = functional.mse_loss
        bns = sum(mse(mean, norm.running_mean) + mse(var, norm.running_var) for norm, var, mean in self.moments)
        return hinge + onehot + bns / len(self.moments)

    def _for_generator(self, z, labels):
        images = self.generator(z, labels).contiguous(memory_format=self.memory_format)
        self.moments.clear()  # and at the end, lest it is compiled again for a list that is not empty
        t = self.teacher(images)
        loss = self.generator_loss(t, self.student(images), labels)
        self.moments.clear()
        return loss, images.detach(), t.detach()

    def _for_student(self, images, t):
        temperature = self.settings.temperature
        return -(temperature**2) * entropy((t - self.student(images)) / temperature).mean()

    def __call__(self, warmup=False):
        """Takes a step, in the warm-up of the generator alone; returns its losses, which stay on the device."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the step before is read any more
        z = torch.randn(self.batch, self.latent, device=self.device)
        labels = torch.randint(0, self.classes, (self.batch,), device=self.device)
        self.student.requires_grad_(False)  # a compiled backward pass would compute those gradients as well
        loss_g, images, t = self.for_generator(z, labels)
        gradients = torch.autograd.grad(loss_g, list(self.generator.parameters()))
        for parameter, gradient in zip(self.generator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()
        if warmup:
            return loss_g.detach(), None

        self.student.requires_grad_(True)
        loss_s = self.for_student(images, t)
        self.student_optimizer.zero_grad()
        loss_s.backward()
        self.student_optimizer.step()
        return loss_g.detach(), loss_s.detach()


class Evaluation:
    """Top-1 accuracy, in percent, of a student, by default a random one, on uint8 images (N, H, W, 3) with labels."""

    def __init__(self, images, labels, batch, memory_format, mean, std, student=None, network="resnet20_cifar10"):
        self.memory_format = MEMORY_FORMATS[memory_format]
        if student is None:
            torch.manual_seed(0)
            student = quantized(NETWORKS[network](), 3)
        self.student = student.to(memory_format=self.memory_format).eval()
        self.batches = list(
            zip(torch.from_numpy(images).split(batch), torch.from_numpy(labels).split(batch), strict=True)
        )
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    @torch.inference_mode()
    def __call__(self):
        """Evaluates once."""
        correct = examples = 0
        with parametrize.cached():
            for images, labels in self.batches:
                scaled = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format) / 255
                logits = self.student((scaled - self.mean) / self.std)
                correct += (logits.argmax(1) == labels).sum().item()
                examples += len(labels)
        return 100 * correct / examples
