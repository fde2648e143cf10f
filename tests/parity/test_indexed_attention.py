"""Indexed attention: fla's naive DSA with the maps around it; the indexer's loss: the paper's equations in float64."""

import jax
import pytest

from models.mixer import Context
from tests.parity.oracles import LENGTH, assert_parity, load, load_fla, mixer

pytestmark = pytest.mark.parity
AGAINST = "fla naive_dsa; the indexer's loss: its equation in float64"
INDEXER = ("w_qi", "w_ki", "ki_norm.weight", "ki_norm.bias", "w_w")
MAIN = ("w_q", "w_k", "w_v", "w_o")
OPTIONS = {"top_k": 12, "kv_heads": 2, "index_heads": 3, "index_channels": 6, "index_rotated": 4, "rotary_base": 100.0}


def turned(torch, z, rotated):
    """z [B, T, heads, channels] with its first channels rotated, in halves."""
    angles = torch.arange(LENGTH, dtype=z.dtype)[:, None] * 100.0 ** (-torch.arange(0, rotated, 2) / rotated)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second, rest = z.split([rotated // 2, rotated // 2, z.shape[-1] - rotated], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def projected(torch, a):
    """Queries, keys and values; index queries, keys and weights."""
    q, k, v, qi = (torch.einsum("btd,dhk->bthk", a["x"], a[f"w_{n}"]) for n in ("q", "k", "v", "qi"))
    ki = torch.nn.functional.layer_norm(a["x"] @ a["w_ki"], (6,), a["ki_norm.weight"], a["ki_norm.bias"], 1e-6)
    turn = lambda z: turned(torch, z, 4)
    return (turned(torch, q, 8), turned(torch, k, 8), v), (
        turn(qi),
        turn(ki[:, :, None])[:, :, 0],
        a["x"] @ a["w_w"] / a["w_w"].shape[1] ** 0.5,
    )


def test_fla():
    """The output. Of so many heads relu leaves some, so that no scores are equal, among which PyTorch chooses as it likes."""
    torch, fla = load("torch"), load_fla("dsa")
    ours, arguments = mixer("indexed_attention", **OPTIONS | {"index_heads": 12})

    def theirs(a):
        main, index = projected(torch, a)
        return torch.einsum("bthk,hkd->btd", fla.naive_dsa(*main, *index, topk=12), a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("auto", "gathered"), constant=INDEXER)


def test_loss():
    """The divergence over the chosen keys, of equal scores the earlier ones, and its gradients to the indexer."""
    torch = load("torch")
    ours, arguments = mixer("indexed_attention", **OPTIONS)

    def theirs(a):
        (q, k, _), (qi, ki, w) = projected(torch, a)
        ahead = torch.ones(LENGTH, LENGTH).triu(1).bool()
        scores = torch.einsum("bti,btis->bts", w, torch.relu(torch.einsum("btid,bsd->btis", qi, ki) / 6**0.5))
        scores = scores.masked_fill(ahead, -torch.inf)
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., :12]
        hidden = torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False) | ahead
        s = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / 8**0.5
        p = torch.softmax(s.masked_fill(hidden[:, None], -torch.inf), -1).mean(1)
        log_i = torch.log_softmax(scores.masked_fill(hidden, -torch.inf), -1).masked_fill(hidden, 0)
        return (torch.xlogy(p, p) - p * log_i).sum(-1).mean()

    of_loss = lambda a: ours(a, result=3, context=Context(key=jax.random.key(0)))["index_kl"]
    assert_parity(of_loss, theirs, arguments, dtype="float64", constant=("x", *MAIN))
