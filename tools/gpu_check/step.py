"""The whole joint step, compiled for GPUs with the kernels and without."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
from granq_jax.kernels import sample_channel

from granq_jax.config import load_config, make_trainer
from granq_jax.distill.joint_step import mapped_step
from granq_jax.quant import quantize
from tools.gpu_check.hlo import Sites, moved_bytes, sites
from tools.gpu_check.targets import Program, compiled, devices

MAX_SITES_RATIO = 0.8  # maps that a program cannot hold are read twice, as XLA does
MAX_TEMPORARY_RATIO = 1.005  # launches in another order hold a little more or less
_LAUNCH = re.compile(r"^\d+: k\w+", re.M)


@dataclasses.dataclass(frozen=True)
class StepRow:
    """The joint step of a config for a number of GPUs.

    Attributes:
      config: its name.
      gpu: for what.
      count: of GPUs.
      quantized: activations that the student quantizes.
      kernels: what the step with the kernels does there.
      xla: what the one without does.
      launches: of both.
      moved_bytes: by every launch, of both.
      temporary_bytes: of both.
    """

    config: str
    gpu: str
    count: int
    quantized: int
    kernels: Sites
    xla: Sites
    launches: tuple[int, int]
    moved_bytes: tuple[int, int]
    temporary_bytes: tuple[int, int]

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        checks = {
            f"{self.kernels.kernels} kernels for {self.quantized} activations": self.kernels.kernels != self.quantized,
            f"{self.kernels.unfused} activations quantized without the kernel": self.kernels.unfused > 0,
            f"moves {self.ratio:.2f} of XLA's bytes at the activations": self.ratio > MAX_SITES_RATIO,
            "takes {} bytes of temporary memory, XLA's form {}".format(*self.temporary_bytes): (
                self.count == 1 and self.temporary_bytes[0] > MAX_TEMPORARY_RATIO * self.temporary_bytes[1]
            ),
        }
        return [fault for fault, holds in checks.items() if holds]

    @property
    def ratio(self) -> float:
        """Bytes moved where activations are quantized, over those of XLA's form."""
        return self.kernels.moved_bytes / self.xla.moved_bytes


def step_row(config: str, gpu: str, count: int = 1) -> StepRow:
    """Compiles the joint step of a config twice: all by kernels, and without any."""
    lowered = {impl: _lowered(config, gpu, count, impl) for impl in ("pallas", "xla")}
    programs: list[Program] = [compiled(lowered[impl]) for impl in ("pallas", "xla")]
    kernels, xla = (sites(program.hlo, sample_channel.NAME) for program in programs)
    ours, theirs = programs
    return StepRow(
        config=config,
        gpu=gpu,
        count=count,
        quantized=_quantized(config),
        kernels=kernels,
        xla=xla,
        launches=(len(_LAUNCH.findall(ours.launches)), len(_LAUNCH.findall(theirs.launches))),
        moved_bytes=(moved_bytes(ours.hlo), moved_bytes(theirs.hlo)),
        temporary_bytes=(ours.temporary_bytes, theirs.temporary_bytes),
    )


def _trainer(config, impl="auto"):
    settings = load_config(config)
    settings.quant.impl = impl
    return make_trainer(settings)


def _variables(trainer):
    size, channels = trainer.generator.image_size, trainer.generator.channels
    images = jnp.zeros((trainer.batch_size, size, size, channels))
    return jax.eval_shape(trainer.model.init, jax.random.key(0), images), images


def _quantized(config):
    trainer = _trainer(config)
    found = quantize(trainer.model, trainer.spec).sites(*_variables(trainer))
    return sum(site.kind == "activation" and site.bits is not None for site in found)


def _lowered(config, gpu, count, impl):
    trainer = _trainer(config, impl)
    teacher, _ = _variables(trainer)
    state = trainer.state_shapes(teacher)
    index = jax.ShapeDtypeStruct((count, trainer.batch_size // count), jnp.int32)
    return mapped_step(trainer, False, devices(gpu, count)).lower(state, teacher, index)
