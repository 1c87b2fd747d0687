"""Plain Flax modules: image classifiers and the generator."""

from granq_jax.models.generator import Generator as Generator
from granq_jax.models.layers import Activation as Activation
from granq_jax.models.registry import create_model as create_model
