"""Integer codes of 2 to 8 bits, packed without gaps."""

from __future__ import annotations

import math

import numpy as np

from granq_jax.errors import InputError, InputTypeError
from granq_jax.quant.spec import check_bits
from granq_jax.quant.storage import packed_bytes


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes into a stream of bits, the first code and the lowest bit of each first.

    Args:
      codes: int8 array of any shape, from -2^(bits - 1) to 2^(bits - 1) - 1, read in C order.
      bits: 2 to 8.

    Returns:
      ``packed_bytes(codes.size, bits)`` bytes, (B,) uint8. The stream holds ``code + 2^(bits - 1)``;
      bits left over in the last byte are 0.

    Raises:
      InputTypeError: if ``codes`` are not int8 or ``bits`` not an integer.
      InputError: if ``bits`` or a code is outside its range.

    Examples:
      >>> pack(np.array([-4, -3, 3], np.int8), 3).tolist()  # 0 + 1 << 3 + 7 << 6
      [200, 1]
    """
    check_bits("bits", bits)
    codes, half = np.asarray(codes), 2 ** (bits - 1)
    if codes.dtype != np.int8:
        raise InputTypeError(f"codes: got dtype {codes.dtype}, allowed is int8")
    if codes.size and not -half <= codes.min() <= codes.max() < half:
        raise InputError(f"codes: got {codes.min()} to {codes.max()}, allowed are {-half} to {half - 1}")
    unsigned = (codes.astype(np.int16).ravel() + half).astype(np.uint8)
    return np.packbits(np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """The codes, int8 of ``shape``, of which :func:`pack` made ``packed``.

    Raises:
      InputTypeError: if ``bits`` is not an integer.
      InputError: if ``bits`` is outside its range, or ``packed`` is not what such codes take.

    Examples:
      >>> unpack(np.array([200, 1], np.uint8), 3, (3,)).tolist()
      [-4, -3, 3]
    """
    check_bits("bits", bits)
    count = math.prod(shape)
    if packed.dtype != np.uint8 or packed.shape != (packed_bytes(count, bits),):
        raise InputError(
            f"packed: got {packed.dtype}{list(packed.shape)}, allowed for {count} codes of {bits} bits are "
            f"uint8[{packed_bytes(count, bits)}]"
        )
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    unsigned = np.packbits(stream, axis=1, bitorder="little").ravel()
    return (unsigned.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8).reshape(shape)
