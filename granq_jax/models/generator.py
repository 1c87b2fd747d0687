"""The conditional generator that invents images from noise and labels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from granq_jax.errors import InputError, is_whole
from granq_jax.models.layers import batch_moments
from granq_jax.ops.convolution import convolve
from granq_jax.ops.reductions import over_pixels
from granq_jax.runtime.platforms import by_platform


def _uniform_fan_in(key, shape, dtype=jnp.float32):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for kernels (..., I, O)."""
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def _uniform_bias(fan_in: int):
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class BatchStatsNorm(nn.Module):
    """Normalises by the statistics of the batch at hand, always, and keeps running ones beside.

    The running statistics follow PyTorch's rule, momentum 0.1 and the unbiased variance, which
    ``flax.linen.BatchNorm`` does not offer; nothing is computed from them here.

    Attributes:
      epsilon: added to the variance.
      affine: whether a learnt scale and shift follow.
      classes: how many scales and shifts there are, one of each for a label (categorical conditional
        batch norm, Dumoulin et al., ICLR 2017); 0 is one for all.
      axis_name: mapped axis over which the batch is split.
    """

    epsilon: float = 1e-5
    affine: bool = True
    classes: int = 0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Normalises every channel of ``x`` (N, ..., C); ``labels`` (N,) choose scale and shift."""
        features = x.shape[-1]
        axis_name = None if self.is_initializing() else self.axis_name
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), x.dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (features,), x.dtype)
        mean, var = batch_moments(x, axis_name)
        if not self.is_initializing():
            count = x.size // features * (1 if axis_name is None else jax.lax.axis_size(axis_name))
            running_mean.value = 0.9 * running_mean.value + 0.1 * mean
            running_var.value = 0.9 * running_var.value + 0.1 * var * (count / (count - 1))

        def learnt(name, initializer):
            shape = (self.classes, features) if self.classes else (features,)
            value = self.param(name, initializer, shape, x.dtype)
            return value[labels] if self.classes else value

        def spread(number):
            if number.ndim == 1:
                return over_pixels(number, x.shape)
            return number.reshape(-1, *(1,) * (x.ndim - 2), features)

        multiplier = jax.lax.rsqrt(var + self.epsilon)
        if self.affine:
            scale = learnt("scale", nn.initializers.ones)
            multiplier = multiplier[None] * scale if self.classes else multiplier * scale
        y = (x - spread(mean)) * spread(multiplier)
        return y + spread(learnt("bias", nn.initializers.zeros)) if self.affine else y


class UpsampleConv(nn.Module):
    """Nearest-neighbour up-sampling by 2, then a 3x3 convolution: :func:`upsample_conv` with its parameters.

    Attributes:
      features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, 2H, 2W, features)."""
        channels = x.shape[-1]
        kernel = self.param("kernel", _uniform_fan_in, (3, 3, channels, self.features), x.dtype)
        bias = self.param("bias", _uniform_bias(9 * channels), (self.features,), x.dtype)
        y = upsample_conv(x, kernel)
        return y + over_pixels(bias, y.shape)


@jax.custom_vjp
def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Nearest-neighbour up-sampling by 2 and a 3x3 convolution that keeps the size.

    The large input is never built. On CPUs this is nine products of the small one instead of 36, elsewhere sixteen,
    which move less memory: compiled for an H100, ResNet-18's step moved 17.4 GB with sixteen and 22.3 with nine.

    Args:
      x: (N, H, W, C).
      kernel: (3, 3, C, features).

    Returns:
      (N, 2H, 2W, features).

    Examples:
      >>> import jax.numpy as jnp
      >>> upsample_conv(jnp.ones((1, 2, 1, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0].tolist()
      [[4.0, 4.0], [6.0, 6.0], [6.0, 6.0], [4.0, 4.0]]
    """
    return by_platform(x, kernel, cpu=nine_products, default=four_phases)


def _forward(x, kernel):
    return upsample_conv(x, kernel), (x, kernel)


def _backward(residuals, cotangent):
    def gradients(form):
        return lambda x, kernel, cotangent: jax.vjp(form, x, kernel)[1](cotangent)

    return by_platform(*residuals, cotangent, cpu=gradients(nine_products), default=gradients(four_phases))


upsample_conv.defvjp(_forward, _backward)


def nine_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """:func:`upsample_conv` as products of the image and of its differences.

    In one dimension, with the taps (a, b, c) and d[i] = x[i - 1] - x[i], the two outputs at a pixel are

    - y[2i] = a x[i - 1] + (b + c) x[i] = (a + b + c) x[i] + a d[i]
    - y[2i + 1] = (a + b) x[i] + c x[i + 1] = (a + b + c) x[i] - c d[i + 1]

    which is three products for the six of the formula, and nine for 36 in two dimensions. Outside of ``x`` is zero.
    """
    _, height, width, channels = x.shape
    features = kernel.shape[-1]
    taps = _sum_and_ends(_sum_and_ends(kernel).swapaxes(0, 1)).swapaxes(0, 1)

    def products(x, *kernels):
        """With all kernels, side by side."""
        return (x.reshape(-1, channels) @ jnp.concatenate(kernels, axis=1)).reshape(*x.shape[:-1], -1)

    down, right = _differences(x, 1), _differences(x, 2)
    pixels = products(x, taps[0, 0])
    rows, columns = products(down, *taps[1:, 0]), products(right, *taps[0, 1:])
    corners = products(_differences(down, 2), *taps[1, 1:], *taps[2, 1:])

    def phase(a, b):
        i, j = slice(a, a + height), slice(b, b + width)
        of_row, of_column, of_both = (slice(k * features, (k + 1) * features) for k in (a, b, 2 * a + b))
        return pixels + rows[:, i, :, of_row] + columns[:, :, j, of_column] + corners[:, i, j, of_both]

    return _interleaved(phase)


def four_phases(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """:func:`upsample_conv` as four 2x2 convolutions.

    An output pixel of even row sees the rows (r - 1, r, r) of the small image, one of odd row (r, r, r + 1), columns
    likewise; adding up the taps that meet the same pixel leaves a 2x2 kernel for each of the four phases.
    """

    def halves(taps, odd):
        first, second, third = taps
        return jnp.stack([first + second, third] if odd else [first, second + third])

    def phase(a, b):
        taps = halves(halves(kernel, a).swapaxes(0, 1), b).swapaxes(0, 1)
        return convolve(x, taps, (1, 1), [(1 - a, a), (1 - b, b)])

    return _interleaved(phase)


def _interleaved(phase):
    """(N, 2H, 2W, features) of ``phase(a, b)``, the pixels (2i + a, 2j + b)."""
    y = jnp.stack([jnp.stack([phase(a, b) for b in (0, 1)], axis=3) for a in (0, 1)], axis=2)
    n, height, _, width, _, features = y.shape
    return y.reshape(n, 2 * height, 2 * width, features)


def _sum_and_ends(taps):
    """Of three taps (a, b, c) on the first axis a + b + c, a and -c."""
    first, second, third = taps
    return jnp.stack([first + second + third, first, -third])


def _differences(x, axis):
    """Every pixel before minus the one after, one more of them along ``axis``, with zeros around."""
    before, after = ([(int(i == axis and side), int(i == axis and not side)) for i in range(4)] for side in (1, 0))
    return jnp.pad(x, before) - jnp.pad(x, after)


class Generator(nn.Module):
    """Images from noise and labels, by the network of ACGAN-style zero-shot quantization (GDFQ).

    The label's embedding times the noise, a dense layer to (size/4, size/4, 128), and two rounds of
    up-sampling and convolution; tanh and a batch norm without scale give roughly normalised images.
    Batch norms are always in training mode.

    Attributes:
      classes: number of labels.
      image_size: height and width, a multiple of 4.
      channels: 1 or 3.
      conditional: whether labels choose the scale and shift of every batch norm but the last, as for
        ImageNet, instead of an embedding that multiplies the noise.
      axis_name: mapped axis over which the batch is split; its statistics are then those of the
        whole batch.

    Raises:
      InputError: for an ``image_size`` or ``channels`` that is not allowed.

    Examples:
      >>> import jax
      >>> z, labels = jax.numpy.ones((2, 100)), jax.numpy.array([0, 7])
      >>> generator = Generator(classes=10, image_size=8, channels=1)
      >>> variables = jax.jit(generator.init)(jax.random.key(0), z, labels)
      >>> apply = jax.jit(generator.apply, static_argnames="mutable")
      >>> images, updates = apply(variables, z, labels, mutable="batch_stats")
      >>> images.shape
      (2, 8, 8, 1)
    """

    classes: int
    image_size: int = 32
    channels: int = 3
    conditional: bool = False
    axis_name: str | None = None

    def __post_init__(self) -> None:
        size = self.image_size
        if not is_whole(size) or size < 4 or size % 4:
            raise InputError(f"Generator.image_size: got {size!r}, allowed are positive multiples of 4")
        if not is_whole(self.classes) or self.classes < 1:
            raise InputError(f"Generator.classes: got {self.classes!r}, allowed are whole numbers from 1")
        if self.channels not in (1, 3):
            raise InputError(f"Generator.channels: got {self.channels!r}, allowed are 1 and 3")
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, labels: jax.Array) -> jax.Array:
        """Images (N, size, size, channels) of noise ``z`` (N, latent) and ``labels`` (N,)."""
        latent, small = z.shape[-1], self.image_size // 4
        normal = nn.initializers.normal(1.0)
        x = z
        if not self.conditional:
            embed = nn.Embed(self.classes, latent, embedding_init=normal, param_dtype=z.dtype, name="embed")
            x = z * embed(labels)
        x = nn.Dense(
            small * small * 128,
            kernel_init=_uniform_fan_in,
            bias_init=_uniform_bias(latent),
            param_dtype=z.dtype,
            name="dense",
        )(x)
        x = self._norm("norm0", 1e-5)(x.reshape(-1, small, small, 128), labels)
        x = nn.leaky_relu(self._norm("norm1", 0.8)(UpsampleConv(128, name="conv1")(x), labels), 0.2)
        x = nn.leaky_relu(self._norm("norm2", 0.8)(UpsampleConv(64, name="conv2")(x), labels), 0.2)
        x = nn.Conv(
            self.channels,
            (3, 3),
            padding=1,
            kernel_init=_uniform_fan_in,
            bias_init=_uniform_bias(9 * 64),
            param_dtype=z.dtype,
            conv_general_dilated=convolve,
            name="conv3",
        )(x)
        return BatchStatsNorm(1e-5, affine=False, axis_name=self.axis_name, name="norm3")(jnp.tanh(x), labels)

    def _norm(self, name: str, epsilon: float) -> BatchStatsNorm:
        classes = self.classes if self.conditional else 0
        return BatchStatsNorm(epsilon, classes=classes, axis_name=self.axis_name, name=name)
