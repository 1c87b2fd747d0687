"""Every kernel at every shape that the networks have, compiled for GPUs and inspected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from granq_jax.kernels import codes, gpus, mosaic, out_channel, sample_channel
from granq_jax.kernels.tiles import VECTOR_BYTES, Tiling, tiling

from granq_jax.models.layers import NormAct
from granq_jax.models.registry import create_model
from granq_jax.quant.weights import weight_paths
from tools.gpu_check.ptx import Kernel, inspect, mosaic_faults
from tools.gpu_check.targets import compiled_by_mosaic, compiled_for

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
BITS = 3
# Networks, image sizes and batches of the configs.
_RUNS = (
    ("resnet20_cifar10", 32, 16),
    ("resnet20_cifar100", 32, 200),
    ("resnet18", 224, 16),
    ("resnet50", 224, 16),
    ("mobilenetv2_w1", 224, 16),
)
MAX_SHARED_BYTES = 48 * 1024
MAX_RATIO = 1.05


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at a shape.

    Attributes:
      what: ``"fake_quant"``, ``"quantize"`` (to codes) or ``"weight"``.
      shape: of what is quantized.
      dtype: name of its dtype.
      norm: whether a batch norm is fused.
      residual: whether a residual sum is.
      activation: which one is.
    """

    what: str
    shape: tuple[int, ...]
    dtype: str
    norm: bool = False
    residual: bool = False
    activation: str | None = None

    @property
    def name(self) -> str:
        """The kernel with what is fused into it."""
        parts = ["norm"] * self.norm + ["residual"] * self.residual + [self.activation] * bool(self.activation)
        return " + ".join([*map(str, parts), self.what])

    @property
    def array(self) -> tuple[int, int, int]:
        """Samples, pixels and channels."""
        shape = (1, *self.shape) if self.what == "weight" else self.shape
        return shape[0], math.prod(shape[1:-1]), shape[-1]

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def tiling(self) -> Tiling:
        """Its tiles."""
        return tiling(*self.array, self.itemsize, self.written_itemsize)

    @property
    def least_bytes(self) -> int:
        """What has to be moved: every input read and every output written once."""
        samples, pixels, channels = self.array
        elements = samples * pixels * channels
        if self.what == "quantize":
            return elements * (self.itemsize + 1) + samples * channels * 8
        return elements * self.itemsize * (3 if self.residual else 2) + (8 * channels if self.norm else 0)

    @property
    def written_itemsize(self) -> int:
        """Bytes an element of what is written."""
        return 1 if self.what == "quantize" else self.itemsize

    @property
    def map_bytes(self) -> tuple[int, int]:
        """Of activations, residuals and codes: what has to be read, once in each launch, and what is written."""
        elements, launches = math.prod(self.array), 2 if self.tiling.rows else 1
        return elements * self.itemsize * (2 if self.residual else 1) * launches, elements * self.written_itemsize

    @property
    def regular(self) -> bool:
        """Whether every thread has a vector, of channels of the array, in all tiles but the last of a map."""
        tiles, (_, pixels, channels) = self.tiling, self.array
        whole = tiles.tile_rows * tiles.columns == tiles.threads * tiles.vector and not tiles.ragged
        # Predicates of stores of single numbers and of masked codes, and of masks in every tile, look alike.
        told_apart = pixels % (tiles.rows or tiles.tile_rows) == 0 or (self.what != "quantize" and not tiles.rows)
        return whole and tiles.columns >= tiles.vector and channels % tiles.vector == 0 and told_apart

    def function(self) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
        """What is compiled, and for which arguments."""
        x = jax.ShapeDtypeStruct(self.shape, self.dtype)
        if self.what == "weight":
            return partial(out_channel.fake_quant, bits=BITS), [x]
        if self.what == "quantize":
            return partial(codes.quantize, bits=BITS), [x]
        names = ["norm"] * self.norm + ["residual"] * self.residual
        arguments = {"norm": jax.ShapeDtypeStruct((2, self.shape[-1]), jnp.float32), "residual": x}

        def fused(x, *rest):
            return sample_channel.fake_quant(x, BITS, activation=self.activation, **dict(zip(names, rest, strict=True)))

        return fused, [x, *(arguments[name] for name in names)]


@dataclasses.dataclass(frozen=True)
class Row:
    """A case, compiled for a GPU.

    Attributes:
      case: which.
      gpu: for what.
      kernel: what came out.
    """

    case: Case
    gpu: str
    kernel: Kernel

    @property
    def ratio(self) -> float:
        """Bytes moved by instructions over the least possible."""
        return self.kernel.moved_bytes / self.case.least_bytes

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        case, kernel = self.case, self.kernel
        must_read, must_write = case.map_bytes if case.regular else (0, 0)
        written = min(VECTOR_BYTES, case.tiling.vector * case.written_itemsize)  # by a thread at a time
        checks = {
            f"{kernel.spilled_bytes} bytes spilled": kernel.spilled_bytes > 0,
            f"{kernel.shared_bytes} bytes of shared memory": kernel.shared_bytes > MAX_SHARED_BYTES,
            f"moves {self.ratio:.3f} of the least": self.exact and self.ratio > MAX_RATIO,
            f"reads {dict(kernel.reads)}": kernel.reads[VECTOR_BYTES] < must_read,
            f"writes {dict(kernel.writes)}": kernel.writes[written] < must_write,
            "no test for NaN": not kernel.tests_nan,
        }
        return [fault for fault, holds in checks.items() if holds]

    @property
    def wide(self) -> float:
        """Share of the bytes that are moved 16 at a time."""
        return (self.kernel.reads[VECTOR_BYTES] + self.kernel.writes[VECTOR_BYTES]) / self.kernel.moved_bytes

    @property
    def exact(self) -> bool:
        """Whether memory is read once, and no norm, which every thread reads by itself and from the nearest cache."""
        return self.case.regular and not self.case.tiling.rows and not self.case.norm


def cases() -> list[Case]:
    """All that the networks of the configs need, each once."""
    found = dict.fromkeys(case for run in _RUNS for case in _cases_of(*run))
    return list(found)


def _cases_of(network: str, image_size: int, batch: int) -> Iterator[Case]:
    model = create_model(network)
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    epilogues: dict[tuple[tuple[int, ...], bool, str], None] = {}

    def note(next_call, args, kwargs, context):
        module = context.module
        if isinstance(module, NormAct) and context.method_name == "__call__" and module.activation:
            epilogues[args[0].shape, len(args) > 1 and args[1] is not None, module.activation] = None
        return next_call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.apply, variables, images)
    for dtype in (jnp.dtype(dtype).name for dtype in DTYPES):
        for shape, residual, activation in epilogues:
            yield Case("fake_quant", shape, dtype, norm=True, residual=residual, activation=activation)
            yield Case("fake_quant", shape, dtype, activation=activation)
            yield Case("fake_quant", shape, dtype)
            yield Case("quantize", shape, dtype)
        for weight in weight_paths(variables["params"]).values():
            yield Case("weight", weight.shape, dtype)


def on_mosaic(chosen: Iterable[Case]) -> list[Case]:
    """Those of which there is a kernel on Mosaic GPU, too, if this JAX has all that it needs."""
    if jax.__version_info__ < mosaic.LEAST_JAX:
        return []
    plain = [case for case in chosen if case.name == "fake_quant"]
    return [case for case in plain if mosaic.columns(*case.array[1:], case.itemsize)]


def faults_on_mosaic(case: Case, gpu: str) -> list[str]:
    """Compiles it there."""
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    return mosaic_faults(compiled_by_mosaic(gpu, partial(mosaic.fake_quant, bits=BITS), x))


def compiled_row(case: Case, gpu: str) -> Row:
    """Compiles a case; it also has to lower for ROCm, which no compiler here can go on from."""
    function, arguments = case.function()
    with gpus.lowering():
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("rocm",))
        return Row(case, gpu, inspect(compiled_for(gpu, function, *arguments), case.tiling))
