"""The quantizer: specification, arithmetic, gradient, and the transform of a Flax model."""

from granq_jax.quant.affine import QuantizedArray as QuantizedArray
from granq_jax.quant.affine import dequantize as dequantize
from granq_jax.quant.affine import quantize_codes as quantize_codes
from granq_jax.quant.fake_quant import fake_quant as fake_quant
from granq_jax.quant.layers import Layout as Layout
from granq_jax.quant.quantized_model import QuantizedModel as QuantizedModel
from granq_jax.quant.quantized_model import quantize as quantize
from granq_jax.quant.ranges import RANGES as RANGES
from granq_jax.quant.sites import Observation as Observation
from granq_jax.quant.sites import Shares as Shares
from granq_jax.quant.sites import Site as Site
from granq_jax.quant.spec import QuantSpec as QuantSpec
from granq_jax.quant.spec import in_full_precision as in_full_precision
from granq_jax.quant.spec import without_weights as without_weights
from granq_jax.quant.storage import ActivationStorage as ActivationStorage
from granq_jax.quant.storage import activation_storage as activation_storage
from granq_jax.quant.storage import effective_bits as effective_bits
from granq_jax.quant.storage import effective_weight_bits as effective_weight_bits
from granq_jax.quant.storage import storage_bytes as storage_bytes
from granq_jax.quant.weights import quantize_params as quantize_params
from granq_jax.quant.weights import weight_paths as weight_paths
