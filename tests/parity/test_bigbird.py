"""BigBird against transformers' block-sparse attention, which is given the same random blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import mixer as mixers
from models.mixers.bigbird import random_blocks
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers BigBirdBlockSparseAttention"
BLOCK, RANDOM, HEADS = 5, 3, 4  # the library wants a block that divides the length


def test_layer(monkeypatch):
    torch, bigbird = load("torch"), load("transformers.models.big_bird.modeling_big_bird")
    options = {"block": BLOCK, "random_blocks": RANDOM}
    ours, arguments = mixer("bigbird", causal=False, **options)
    config = bigbird.BigBirdConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, block_size=BLOCK, num_random_blocks=RANDOM, use_bias=False
    )
    layer = bigbird.BigBirdBlockSparseAttention(config)

    # In evaluation the library's own choice is block 0 for all.
    last = LENGTH // BLOCK - 1
    alone = mixers.create("bigbird", WIDTH, rngs=nnx.Rngs(0), causal=False, **options)
    chosen = np.asarray(random_blocks(alone.bits(last + 1, 0)[:, 1:last], jnp.arange(1, last), last))
    assert chosen.shape == (HEADS, last - 1, RANDOM) and chosen.min() > 0
    monkeypatch.setattr(layer, "_bigbird_block_rand_mask_with_head", lambda **_: list(chosen))
    masks = bigbird.BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(BATCH, LENGTH), BLOCK)
    blocked, band, rows, columns = masks
    inputs = {
        "band_mask": band,
        "from_mask": rows,
        "to_mask": columns,
        "from_blocked_mask": blocked,
        "to_blocked_mask": blocked,
    }

    def theirs(a):
        weights = {f"{n}.weight": a[f"w_{n[0]}"].flatten(1).T for n in ("query", "key", "value")}
        y = torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]
        return y @ a["w_o"].flatten(0, 1)

    assert_parity(ours, theirs, arguments)
