"""GranQ's arithmetic in eager PyTorch, as its users run it: what the other benchmarks compare with.

The network is pytorchcv's, the quantizer the formula of :mod:`granq_jax.quant.affine` vectorized
over (sample, channel), the losses those of :mod:`granq_jax.losses`. Student and teacher are separate
forward passes, and so are the student's for the generator's loss and for its own, as in the released
code. Where PyTorch offers a choice the faster way is taken: minimum and maximum of contiguous maps
in one pass, mean and variance in one pass, gradients of the generator's loss for the generator only,
the teacher's logits used twice, weights quantized once an evaluation.
"""

from __future__ import annotations

import math

import torch
from pytorchcv.models.resnet_cifar import resnet20_cifar10
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

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
        elif isinstance(module, nn.ReLU):
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


def entropy(logits):
    log_p = functional.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


class JointStep:
    """One GranQ step after another; ``weights`` are the teacher's state dict, random ones by default."""

    def __init__(self, batch, classes, memory_format, bits=3, latent=100, weights=None, seed=0):
        torch.manual_seed(seed)
        self.batch, self.classes, self.latent = batch, classes, latent
        self.memory_format = MEMORY_FORMATS[memory_format]
        teacher, student = (resnet20_cifar10(num_classes=classes) for _ in range(2))
        if weights is not None:
            teacher.load_state_dict(weights)
            student.load_state_dict(weights)
        self.teacher = teacher.to(memory_format=self.memory_format).eval()
        self.student = quantized(student, bits).to(memory_format=self.memory_format).eval()
        self.generator = Generator(classes).to(memory_format=self.memory_format).train()
        self.teacher.requires_grad_(False)
        self.moments: list = []  # of a teacher pass: (batch norm, variance, mean of its input)
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._observe)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(
            self.student.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4
        )

    def _observe(self, module, args, output):
        self.moments.append((module, *torch.var_mean(args[0], dim=(0, 2, 3), correction=0)))

    def generator_loss(self, t, s, labels):
        cross = functional.cross_entropy
        onehot = 0.2 * cross(t - s, labels) + 0.1 * cross(t + s, labels)
        h = entropy(t - s)
        h = (h - h.min()) / (math.log(self.classes) - h.min())
        hinge = functional.relu(0.1 - h).mean() + functional.relu(h - 0.8).mean()
        mse = functional.mse_loss
        bns = sum(mse(mean, norm.running_mean) + mse(var, norm.running_var) for norm, var, mean in self.moments)
        return hinge + onehot + bns / len(self.moments)

    def __call__(self, warmup=False):
        """Takes a step, in the warm-up of the generator alone; returns its losses."""
        z = torch.randn(self.batch, self.latent)
        labels = torch.randint(0, self.classes, (self.batch,))
        images = self.generator(z, labels).contiguous(memory_format=self.memory_format)
        self.moments.clear()
        t = self.teacher(images)
        loss_g = self.generator_loss(t, self.student(images), labels)
        gradients = torch.autograd.grad(loss_g, list(self.generator.parameters()))
        for parameter, gradient in zip(self.generator.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()
        if warmup:
            return loss_g.item(), None

        s = self.student(images.detach())
        loss_s = -(20.0**2) * entropy((t.detach() - s) / 20.0).mean()
        self.student_optimizer.zero_grad()
        loss_s.backward()
        self.student_optimizer.step()
        return loss_g.item(), loss_s.item()


class Evaluation:
    """Top-1 accuracy, in percent, of a student, by default a random one, on uint8 images (N, 32, 32, 3) with labels."""

    def __init__(self, images, labels, batch, memory_format, mean, std, student=None):
        self.memory_format = MEMORY_FORMATS[memory_format]
        if student is None:
            torch.manual_seed(0)
            student = quantized(resnet20_cifar10(num_classes=10), 3)
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
