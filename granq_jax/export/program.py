"""A quantized model as a StableHLO program that JAX runs without this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp

from granq_jax.errors import InputError, check_choice
from granq_jax.export.packed import weight_codes, weight_values
from granq_jax.quant import QuantSpec, quantize, without_weights

# JAX promises nothing for programs that hold one: Triton's own representation changes.
_TRITON = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")


def export_program(
    model: nn.Module,
    spec: QuantSpec,
    variables: Mapping[str, Any],
    image_shape: Sequence[int],
    *,
    dtype: Any = jnp.float32,
    prepare: Callable[[jax.Array], jax.Array] = lambda images: images,
    batch_size: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda"),
    impl: str = "xla",
    **call: Any,
) -> jax.export.Exported:
    """The function from images to logits of a quantized model, with its variables in it.

    Weights are in it as int8 codes, steps and zero points.

    Args:
      model: any linen module that classifies images.
      spec: how it is quantized.
      variables: of the float model.
      image_shape: (H, W, C).
      dtype: of the images that the program takes.
      prepare: from these to what the model takes, for example their normalisation.
      batch_size: ``None`` leaves it free.
      platforms: those that the program can run on.
      impl: ``"xla"``; or ``"pallas"``, with the package's kernels, for a fixed batch size and CUDA alone.
      **call: arguments of the model's call, such as ``train=False``.

    Returns:
      ``exported.serialize()`` is what to write to a file, and
      ``jax.export.deserialize(bytearray(file.read())).call(images)`` runs it. JAX promises that for six
      months of its releases after the one it was made with; of kernels it promises nothing.

    Raises:
      InputError: if a weight holds NaN or infinity, or for an ``impl`` that is not allowed.

    Examples:
      >>> model, shape = nn.Sequential([nn.Conv(2, (3, 3)), lambda x: x.mean((1, 2))]), (8, 8, 1)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)))
      >>> exported = export_program(model, QuantSpec(placement="operand"), variables, shape)
      >>> jax.export.deserialize(exported.serialize()).call(jnp.zeros((5, *shape))).shape
      (5, 2)
    """
    check_choice("impl", impl, ("xla", "pallas"))
    if impl == "pallas" and batch_size is None:
        raise InputError("batch_size: got None with impl='pallas', allowed is a whole number")
    if impl == "pallas" and tuple(platforms) != ("cuda",):
        raise InputError(f"platforms: got {tuple(platforms)} with impl='pallas', allowed is ('cuda',)")
    images = jax.ShapeDtypeStruct((1, *image_shape), dtype)
    inputs = jax.eval_shape(prepare, images)
    layouts = quantize(model, spec).layouts(variables, inputs, **call)
    weights = weight_codes(variables["params"], spec, layouts)
    student = quantize(model, without_weights(spec), impl=impl)

    def logits(images):
        flat = flax.traverse_util.flatten_dict(dict(variables["params"]))
        for module, weight in weights.items():
            path = (*filter(None, module.split("/")), "kernel")
            codes, step, zero_point = (jnp.asarray(a) for a in (weight.codes, weight.step, weight.zero_point))
            flat[path] = weight_values(codes, step, zero_point, flat[path].dtype)
        params = flax.traverse_util.unflatten_dict(flat)
        return student.apply({**variables, "params": params}, prepare(images), **call)

    (batch,) = jax.export.symbolic_shape("batch" if batch_size is None else str(batch_size))
    images = jax.ShapeDtypeStruct((batch, *image_shape), dtype)
    checks = [_TRITON] if impl == "pallas" else []
    return jax.export.export(jax.jit(logits), platforms=platforms, disabled_checks=checks)(images)
