"""Zero-shot quantization in JAX: a low-bit image classifier from a trained one, without data."""

from granq_jax.config import load_config as load_config
from granq_jax.joint_run import zero_shot_quantize as zero_shot_quantize
from granq_jax.models import Activation as Activation
from granq_jax.models import Generator as Generator
from granq_jax.models import create_model as create_model
from granq_jax.quant import QuantSpec as QuantSpec
from granq_jax.quant import dequantize as dequantize
from granq_jax.quant import fake_quant as fake_quant
from granq_jax.quant import quantize as quantize
from granq_jax.quant import quantize_codes as quantize_codes
from granq_jax.torch_import import load_torch as load_torch
from granq_jax.train import train_and_evaluate as train_and_evaluate
from granq_jax.trainer import LossSettings as LossSettings
from granq_jax.trainer import OptimizerSettings as OptimizerSettings
from granq_jax.trainer import Trainer as Trainer
