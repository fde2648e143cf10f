"""Stick-breaking attention against fla's naive attention."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = "fla naive_stickbreaking_attn"


@pytest.mark.parametrize("remainder, current, qk_norm", [(True, False, False), (False, True, True)])
def test_layer(remainder, current, qk_norm):
    """Grouped heads; what is left of the stick goes to the token's own value, or that is one of the keys."""
    torch, fla = load("torch"), load_fla("stickbreaking_attn")
    options = {"remainder": remainder, "attend_current": current, "qk_norm": qk_norm}
    ours, arguments = mixer("stick_breaking_attention", kv_heads=2, **options)

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
        if qk_norm:
            rms = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            q, k = rms(q) * a["q_norm.weight"], rms(k) * a["k_norm.weight"]
        y, rest = fla.naive_stickbreaking_attn(q, k, v, attend_current=current)
        if remainder:
            y = y + rest[..., None] * v.repeat_interleave(2, 2)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments)
