"""PaTH attention against fla's naive attention."""

import pytest

from tests.parity.oracles import assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = "fla naive_path_attn"


@pytest.mark.parametrize("kv_heads, rank, gate", [(4, 32, False), (2, None, True)])
def test_layer(kv_heads, rank, gate):
    """The paper's layer, and the one with grouped heads, norms and the forget gate."""
    torch, fla = load("torch"), load_fla("path_attn")
    functional = torch.nn.functional
    ours, arguments = mixer("path_attention", kv_heads=kv_heads, rank=rank, forget_gate=gate, qk_norm=gate)

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in "qkv")
        if gate:
            rms = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            q, k = rms(q) * a["q_norm.weight"], rms(k) * a["k_norm.weight"]
        u = a["x"] @ a["w_2"] if rank is None else a["x"] @ a["w_1"] @ a["w_2"]
        u = functional.conv1d(functional.pad(u.mT, (2, 0)), a["taps"].T[:, None], groups=u.shape[2]).mT
        w = functional.silu(u).unflatten(2, (kv_heads, -1))
        w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        beta = 2 * torch.sigmoid(a["x"] @ a["w_beta"] + a["b_beta"])
        decay = functional.logsigmoid(a["x"] @ a["w_f"] + a["b_f"]) if gate else torch.zeros(q.shape[:3])
        y = fla.naive_path_attn(q, k, v, w, beta, decay, q.shape[-1] ** -0.5)
        return torch.einsum("bthk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments)
