"""Real images, to evaluate on and to train teachers: data sets, their readers, splits."""

from granq_jax.data.datasets import load_split as load_split
