"""RWKV-6 against flash-linear-attention's plain recurrence, and its layer against the paper's equations in float64."""

import importlib.util
import pathlib

import numpy as np
import pytest

from ops.linear_attention import linear_attention
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "fla rwkv6 and the paper's equations in float64"

FORMS = ("sequential", "chunked")


def test_operation():
    """The read before the write, the bonus, and decays between weak and strong."""
    load("torch")
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("fla-core is not installed: run `make parity`")
    path = pathlib.Path(package.submodule_search_locations[0], "ops", "rwkv6", "recurrent_naive.py")
    spec = importlib.util.spec_from_file_location("fla_naive_rwkv6", path)
    fla = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fla)
    arguments = {
        name: normal(BATCH, LENGTH, 3, size, seed=i) for i, (name, size) in enumerate(zip("rkvw", (8, 8, 12, 8)))
    }
    arguments["w"] = -np.exp(arguments["w"])
    arguments["u"] = normal(3, 8, seed=5)

    def ours(a):
        return linear_attention(a["r"], a["k"], a["v"], a["w"], bonus=a["u"])[0]

    def theirs(a):
        r, k, v, w = (a[name].transpose(1, 2) for name in "rkvw")
        o = fla.naive_recurrent_rwkv6(r, k, v, w, a["u"], scale=1.0)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    assert_parity(ours, theirs, arguments, forms=FORMS)


def test_layer():
    """Arxiv 2404.05892, section 4, token by token."""
    torch = load("torch")
    F = torch.nn.functional
    ours, arguments = mixer("rwkv6", heads=2, mix_rank=4, decay_rank=4)

    def theirs(a):
        x = a["x"]
        before = F.pad(x, (0, 0, 1, -1))
        lerp = lambda a, b, amount: a + (b - a) * amount
        inputs = {}
        for c, name in enumerate("wkvrg"):
            low = torch.tanh(lerp(x, before, a["mu_x"]) @ a["mix_in"][:, c]) @ a["mix_out"][c]
            inputs[name] = lerp(x, before, a["mu"][c] + low)
        k, v, r, g = (torch.einsum("btd,dhk->bthk", inputs[name], a[f"w_{name}"]) for name in "kvrg")
        low = torch.einsum("btr,rhk->bthk", torch.tanh(inputs["w"] @ a["decay_in"]), a["decay_out"])
        w = torch.exp(-torch.exp(a["w_0"] + low))
        S, o = torch.zeros(BATCH, 2, WIDTH // 2, WIDTH // 2, dtype=x.dtype), []
        for t in range(x.shape[1]):
            kv = k[:, t, :, :, None] * v[:, t, :, None]
            o.append(torch.einsum("bhkv,bhk->bhv", S + a["u"][:, :, None] * kv, r[:, t]))
            S = w[:, t, :, :, None] * S + kv
        o = torch.stack(o, 1)
        o = F.layer_norm(o, o.shape[-1:], eps=64e-5) * a["norm_weight"] + a["norm_bias"]
        return torch.einsum("bthk,hkd->btd", o * F.silu(g), a["w_o"])

    assert_parity(ours, theirs, arguments, forms=("chunked",), dtype="float64")
