"""Reformer against the paper's equations with the same hashes, and against transformers' layer where all share a bucket."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64, and transformers LSHSelfAttention"
WINDOW, BUCKETS, ROUNDS, HEADS = 10, 4, 3, 4


def visible(buckets, causal):
    """The union over rounds of the paper's sets, token by token; buckets [B, T, H, rounds]."""
    B, T, H, R = buckets.shape
    seen = np.zeros((B, H, T, T), bool)
    for b, h, r in np.ndindex(B, H, R):
        for bucket in range(BUCKETS):
            members = np.flatnonzero(buckets[b, :, h, r] == bucket)
            for a, i in enumerate(members):
                low, high = (a - WINDOW + 1, a) if causal else (a - WINDOW // 2, a + WINDOW // 2 + 1)
                seen[b, h, i, members[max(low, 0) : high]] = True
    seen[:, :, np.arange(T), np.arange(T)] = False
    return seen


@pytest.mark.parametrize("causal", [True, False])
def test_equations(causal):
    torch = load("torch")
    options = {"buckets": BUCKETS, "rounds": ROUNDS, "window": WINDOW}
    ours, arguments = mixer("reformer", causal=causal, **options)
    alone = mixers.create("reformer", WIDTH, rngs=nnx.Rngs(0), causal=causal, **options)
    q = np.einsum("btd,dhk->bthk", arguments["x"], arguments["w_qk"])
    buckets = np.asarray(jax.jit(lambda q: alone.hashes(q, 0, None))(q))
    assert set(buckets.ravel()) == set(range(BUCKETS))
    seen = torch.tensor(visible(buckets, causal))
    seen |= torch.eye(LENGTH, dtype=torch.bool) & ~seen.any(-1, keepdim=True)

    def theirs(a):
        q, v = (torch.einsum("btd,dhk->bhtk", a["x"], a[name]) for name in ("w_qk", "w_v"))
        k = q / torch.sqrt((q * q).sum(-1, keepdim=True) + q.shape[-1] * 1e-6)
        p = torch.softmax((q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf), -1)
        return torch.einsum("bhtk,hkd->btd", p @ v, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")


@pytest.mark.parametrize("causal", [True, False])
def test_one_bucket(causal):
    """The library's layer leaves out the hashing where the sequence is one chunk."""
    torch, reformer = load("torch"), load("transformers.models.reformer.modeling_reformer")
    ours, arguments = mixer("reformer", causal=causal, buckets=1, rounds=1, window=2 * LENGTH)
    config = reformer.ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH // HEADS,
        lsh_attn_chunk_length=LENGTH,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=causal,
        num_hashes=1,
        num_buckets=2,
    )
    layer = reformer.LSHSelfAttention(config).eval()

    def theirs(a):
        weights = {"query_key.weight": a["w_qk"].flatten(1).T, "value.weight": a["w_v"].flatten(1).T}
        y = torch.func.functional_call(layer, weights, (a["x"],)).hidden_states
        return y @ a["w_o"].flatten(0, 1)

    assert_parity(ours, theirs, arguments)
