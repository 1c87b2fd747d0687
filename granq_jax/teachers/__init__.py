"""Where a teacher comes from: a file, the web, PyTorch, or its own training."""

from granq_jax.distill.settings import PretrainSettings as PretrainSettings
from granq_jax.teachers.training import pretrain as pretrain
