import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from granq_jax.export.bits import pack, unpack
from tests.conftest import one_line_error


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(2, 8))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=7) | st.just((0, 3)))
    return draw(hnp.arrays(np.int8, shape, elements=st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))), bits


@given(codes_and_bits())
def test_codes_come_back_from_as_few_bytes_as_they_need(drawn):
    codes, bits = drawn
    packed = pack(codes, bits)
    assert packed.nbytes == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, codes.shape), codes)


@given(codes_and_bits())
def test_the_stream_is_a_number_whose_digits_are_the_codes(drawn):
    codes, bits = drawn
    number = sum((int(code) + 2 ** (bits - 1)) << (bits * i) for i, code in enumerate(codes.ravel()))
    assert int.from_bytes(pack(codes, bits).tobytes(), "little") == number


def test_what_does_not_fit_is_refused():
    with one_line_error(ValueError, "codes", "-5 to 0", "-4 to 3"):
        pack(np.array([0, -5], np.int8), 3)
    with one_line_error(TypeError, "codes", "int64", "int8"):
        pack(np.array([0]), 3)
    with one_line_error(ValueError, "packed", "uint8[2]", "uint8[1]"):
        unpack(np.zeros(2, np.uint8), 3, (2,))
    with pytest.raises(ValueError, match="bits: got 9"):
        unpack(np.zeros(2, np.uint8), 9, (2,))
