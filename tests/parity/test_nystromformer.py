"""Nystromformer against transformers' layer."""

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers Nystromformer"


def test_layer():
    """Whole sequences, and rows that are told their segments."""
    torch, nystrom = load("torch"), load("transformers.models.nystromformer.modeling_nystromformer")
    both, arguments = mixer("nystromformer", causal=False, landmarks=10, kernel=5)
    ours = lambda a: (both(a), both(a, segment_ids=jnp.ones((BATCH, LENGTH), jnp.int32)))
    config = nystrom.NystromformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_landmarks=10,
        segment_means_seq_len=LENGTH,
        conv_kernel_size=5,
        attention_probs_dropout_prob=0.0,
    )
    layer = nystrom.NystromformerSelfAttention(config)
    layer.init_option = "exact"  # not "original", which scales by the maximum over all rows and heads

    def theirs(a):
        q, k, v = a["w_qkv"].flatten(2).permute(1, 2, 0)
        zero = torch.zeros(WIDTH)
        weights = {"query.weight": q, "key.weight": k, "value.weight": v, "conv.weight": a["conv"].T[:, None, :, None]}
        weights |= {f"{name}.bias": zero for name in ("query", "key", "value")}
        y = torch.func.functional_call(layer, weights, (a["x"],), strict=True)[0] @ a["w_o"].flatten(0, 1)
        return y, y

    assert_parity(ours, theirs, arguments)
