"""The tolerance of this project's numerical tests, stated once: errors are relative to the scale of what is expected."""

import numpy as np

FLOAT32 = 1e-5


def error(actual, expected) -> float:
    """max |actual - expected| / max |expected|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = np.abs(expected).max() if expected.size else 1.0
    return float(np.abs(actual - expected).max() / max(scale, 1e-30))


def assert_close(actual, expected, tolerance: float = FLOAT32, what: str = "value") -> None:
    """Asserts that the error is within the tolerance; NaN is never within."""
    found = error(actual, expected)
    assert found <= tolerance, f"{what}: relative error {found:.3g} exceeds {tolerance:.3g}"
