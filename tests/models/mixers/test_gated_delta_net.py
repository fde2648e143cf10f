"""Heads of keys and heads of values."""

import pytest
from flax import nnx

from models import mixer as mixers


@pytest.mark.parametrize("name", ["gated_delta_net", "gated_delta_net_2", "comba"])
def test_value_heads(name):
    """They are a multiple of the heads of keys, or the message says so."""
    mixer = mixers.sketch(name, 64, heads=2, value_heads=8, expand_key=0.5, expand_value=2.0)
    assert mixer.sizes == (8, 16, 16) and mixer.k.weight.shape == (64, 32) and mixer.w_o.shape == (8, 16, 64)
    with pytest.raises(ValueError, match="`value_heads` 4 cannot be divided into 3 heads"):
        mixers.create(name, 48, rngs=nnx.Rngs(0), heads=3, value_heads=4, expand_key=1.0, expand_value=1.0)
