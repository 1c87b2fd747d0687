"""A quantized model as files that one ships: packed variables, and programs that JAX alone can run."""

from granq_jax.export.packed import PackedModel as PackedModel
from granq_jax.export.packed import load_packed as load_packed
from granq_jax.export.packed import save_packed as save_packed
from granq_jax.export.program import export_program as export_program
