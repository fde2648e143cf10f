"""RWKV-7 against flash-linear-attention's plain recurrence, and its layers against the paper's equations in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.mixer import Context
from ops.delta_rule import delta_rule
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla dplr and the paper's equations in float64"

FORMS = ("sequential", "chunked")


def test_operation():
    """A transition of diagonal plus rank one, which acts on the undecayed state."""
    load("torch")
    fla = load_fla("generalized_delta_rule/dplr")
    arguments = {name: normal(BATCH, LENGTH, 3, 8, seed=i) for i, name in enumerate("rkvnag")}
    arguments["n"] /= np.linalg.norm(arguments["n"], axis=-1, keepdims=True)
    arguments["a"] = 1 / (1 + np.exp(-arguments["a"]))
    arguments["g"] = -0.6 / (1 + np.exp(-arguments["g"]))

    def ours(a):
        return delta_rule(a["r"], a["k"], a["v"], log_decay=a["g"], a=a["a"] * a["n"], b=-a["n"])[0]

    def theirs(a):
        r, k, v, n, rate, g = (a[name].transpose(1, 2) for name in "rkvnag")
        # The library scales its queries.
        o = fla.dplr_recurrence(r * 8**0.5, k, v, -n, n * rate, g)
        return o[0].transpose(1, 2)

    assert_parity(ours, theirs, arguments, forms=FORMS)


@pytest.mark.parametrize("layer", [0, 1])
def test_layer(layer):
    """Arxiv 2503.14456, section 4, value-first and token by token; the second layer is given the first one's values."""
    torch = load("torch")
    F = torch.nn.functional
    function, arguments = mixer("rwkv7", heads=2, decay_rank=4, rate_rank=4, value_rank=4, gate_rank=4)
    arguments["first"] = normal(BATCH, LENGTH, WIDTH, seed=50)
    size = WIDTH // 2

    def ours(a):
        context = Context(layer=jnp.asarray(layer), stream=a["first"])
        return function(a, context=context)

    def theirs(a):
        x, heads = a["x"], lambda y: y.unflatten(-1, (2, size))
        before = F.pad(x, (0, 0, 1, -1))
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (before - x) * mu for mu in a["mu"])
        low = lambda x, name: torch.einsum("btr,rhk->bthk", x, a[f"{name}_out"])
        r, k, v = (torch.einsum("btd,dhk->bthk", x, a[f"w_{c}"]) for x, c in ((x_r, "r"), (x_k, "k"), (x_v, "v")))
        # The authors' form of the decay: exp(-exp(-softplus(-w) - 1/2)).
        w = torch.exp(-torch.exp(-F.softplus(-(a["w_0"] + low(torch.tanh(x_w @ a["decay_in"]), "decay"))) - 0.5))
        rate = torch.sigmoid(a["a_0"] + low(x_a @ a["rate_in"], "rate"))
        gate = low(torch.sigmoid(x_g @ a["gate_in"]), "gate")
        stays = 0 * a["first"].sum() + 0 * (a["v_0"].sum() + a["value_in"].sum() + a["value_out"].sum())
        if layer > 0:
            v = v + (heads(a["first"]) - v) * torch.sigmoid(a["v_0"] + low(x_v @ a["value_in"], "value"))
        removal = F.normalize(k * a["k_k"], dim=-1)
        k = k * (1 + (rate - 1) * a["k_a"])
        S, o = torch.zeros(BATCH, 2, size, size, dtype=x.dtype), []
        for t in range(LENGTH):
            held = S @ removal[:, t, :, :, None]
            S = S * w[:, t, :, None] - held @ (removal * rate)[:, t, :, None]
            S = S + v[:, t, :, :, None] @ k[:, t, :, None]
            o.append((S @ r[:, t, :, :, None])[..., 0])
        o = F.group_norm(torch.stack(o, 1).flatten(0, 1).flatten(1), 2, eps=64e-5).unflatten(0, (BATCH, -1))
        o = heads(o) * a["norm_weight"] + a["norm_bias"] + (r * k * a["r_k"]).sum(-1, keepdim=True) * v
        return torch.einsum("bthk,hkd->btd", o * gate, a["w_o"]) + stays

    assert_parity(ours, theirs, arguments, forms=FORMS[layer : layer + 1], dtype="float64")
