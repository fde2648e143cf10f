"""Rules for long sequences; `tests/parity/test_attention.py` compares them with transformers."""

import numpy as np
import pytest

from common.errors import UserError
from ops.rotary_scaling import frequencies

PLAIN = 1000.0 ** (-np.arange(0, 16, 2) / 16)


def test_what_a_rule_leaves_and_what_it_divides():
    """The fastest frequencies stay and the slowest are divided; dynamic starts at the original length."""
    for rule in ("yarn:factor=4,original_length=64,beta_fast=4", "llama3:factor=4, original_length=64"):
        ratio = frequencies(16, 1000.0, rule)[0] / PLAIN
        np.testing.assert_allclose([ratio[0], ratio[-1]], [1, 0.25], rtol=1e-12)
        assert np.all(np.diff(ratio) <= 0) and len(set(ratio.round(6))) > 2
    np.testing.assert_allclose(frequencies(16, 1000.0, "linear:factor=2")[0], PLAIN / 2, rtol=1e-12)
    dynamic = "dynamic:factor=2,original_length=64,length="
    np.testing.assert_array_equal(frequencies(16, 1000.0, dynamic + "40")[0], PLAIN)
    # Three times the base^(16/14): the slowest frequency, base^(-14/16), is 3 times as slow.
    np.testing.assert_allclose(frequencies(16, 1000.0, dynamic + "128")[0][-1], PLAIN[-1] / 3, rtol=1e-12)
    found, magnitude = frequencies(4, 1000.0, "longrope:factors=1 2.5,factor=4,original_length=16")
    np.testing.assert_allclose(found, [1, 1000**-0.5 / 2.5], rtol=1e-12)
    assert abs(magnitude - 1.5**0.5) < 1e-12


@pytest.mark.parametrize(
    "scaling,message",
    [
        ("yarm:factor=2", "yarn"),
        ("none:factor=2", "takes no arguments"),
        ("linear", "linear needs factor"),
        ("linear:factor=2,beta=1", "linear has no 'beta', it takes factor"),
        ("linear:factor=two", "factor must be a number"),
        ("linear:factor=0", "factor must be positive"),
        ("longrope:factors=1 2 3", "needs 8 factors"),
        ("longrope:factors=1 1 1 1 1 1 1 1,factor=2,original_length=1", "original_length of more than 1, got 1"),
        ("yarn:factor=2,original_length=64,beta_fast=0", "beta_fast must be positive"),
        ("llama3:factor=2,original_length=64,high_factor=1", "low_factor < high_factor, got 1.0 and 1.0"),
    ],
)
def test_errors(scaling, message):
    with pytest.raises(UserError, match=message):
        frequencies(16, 1000.0, scaling)


def test_smallest_sizes():
    """Of two channels the base has no part in the frequency; a base of 1 has no index where yarn's ramp could begin."""
    np.testing.assert_array_equal(frequencies(2, 1000.0, "dynamic:factor=2,original_length=64,length=128")[0], [1.0])
    with pytest.raises(UserError, match=r"base of more than 1, got 1\.0"):
        frequencies(16, 1.0, "yarn:factor=2,original_length=64")
