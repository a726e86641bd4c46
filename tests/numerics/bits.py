"""Equality of bits, and the bits of quantized values."""

import numpy as np

from v4jax.numerics import Quantized


def assert_same(actual, expected) -> None:
    """Same shape, dtype and bits (0 is not -0), any NaN for NaN; names the first difference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    unsigned = f"u{actual.dtype.itemsize}"
    different = actual.view(unsigned) != expected.view(unsigned)
    if actual.dtype.kind not in "iu":
        different &= ~(np.isnan(actual) & np.isnan(expected))
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{different.sum()} of {different.size} differ, first at {at}: "
            f"{actual[at]!r}, expected {expected[at]!r}"
        )


def bytes_of_values(q: Quantized) -> np.ndarray:
    """Codes of the values, one a byte."""
    return np.asarray(q.values).view(np.uint8) & ((1 << q.format.bits) - 1)
