"""Differential attention: version 1 against transformers' DiffLlama, version 2 against its equation in float64."""

import numpy as np
import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers DiffLlamaAttention; version 2: its equation in float64"


def test_diff_llama():
    """The library pairs the halves of the heads, and of the channels that it rotates; here these are neighbours."""
    torch, module = load("torch"), load("transformers.models.diffllama.modeling_diffllama")
    ours, arguments = mixer("differential_attention", heads=2, kv_heads=1)
    config = module.DiffLlamaConfig(hidden_size=WIDTH, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5)
    config._attn_implementation = "eager"
    layer = module.DiffLlamaAttention(config, layer_idx=0)
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
    halves = lambda w, axis: torch.cat([w.index_select(axis, torch.arange(i, w.shape[axis], 2)) for i in (0, 1)], axis)

    def theirs(a):
        flat = lambda w: w.flatten(1).T
        weights = {f"{n}_proj.weight": flat(halves(halves(a[f"w_{n}"], 1), 2)) for n in "qk"}
        weights["v_proj.weight"] = flat(torch.cat(a["w_v"].chunk(2, 2), 1))
        weights["o_proj.weight"] = a["w_o"].flatten(0, 1).T
        for i, j, name in ((0, 0, "q1"), (0, 1, "q2"), (1, 0, "k1"), (1, 1, "k2")):
            weights[f"lambda_{name}"] = a["lambdas"][i, j]
        angles = module.DiffLlamaRotaryEmbedding(config)(a["x"], torch.arange(LENGTH)[None])
        inputs = {"position_embeddings": angles, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    assert_parity(ours, theirs, arguments)


def test_version_2():
    """Two queries for each key, and a share of the second attention for each token and head."""
    torch = load("torch")
    ours, arguments = mixer("differential_attention", heads=4, kv_heads=2, version=2)
    theta = torch.tensor(10000.0 ** (-np.arange(0, 8, 2) / 8))
    turn = torch.polar(torch.ones(LENGTH, 4, dtype=torch.float64), torch.arange(LENGTH)[:, None] * theta)[:, None]

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
        pairs = lambda z: torch.view_as_complex(z.unflatten(-1, (4, 2)).contiguous())
        q, k = (torch.view_as_real(pairs(z) * turn).flatten(-2) for z in (q, k))
        q = q.unflatten(2, (2, 2, 2))  # [B, T, key head, head, attention, K]
        s = torch.einsum("btgrck,bsgk->bgrcts", q, k) / 8**0.5
        p = torch.softmax(s.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf), -1)
        y = torch.einsum("bgrcts,bsgv->btgrcv", p, v)
        share = torch.sigmoid(torch.einsum("btd,dh->bth", a["x"], a["w_lambda"])).unflatten(2, (2, 2))[..., None]
        y = (y[..., 0, :] - share * y[..., 1, :]).flatten(2, 3)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments, dtype="float64")
