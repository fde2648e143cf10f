"""Retention against flash-linear-attention's plain form, and the layer against the paper's parallel form."""

import numpy as np
import pytest

from ops.linear_attention import linear_attention
from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity
AGAINST = "fla naive retention; equations in float64"

FORMS = ("sequential", "chunked")


def test_retention():
    """The decays gamma_h = 1 - 2^(-5-h) and the scale 1/sqrt(K)."""
    load("torch")
    fla = load_fla("retention")
    log_decay = np.log1p(-(2.0 ** (-5 - np.arange(3)))).astype(np.float32)
    arguments = {name: normal(BATCH, LENGTH, 3, size, seed=i) for i, (name, size) in enumerate(zip("qkv", (8, 8, 12)))}

    def theirs(a):
        return fla.naive_retention(*(a[name].transpose(1, 2) for name in "qkv")).transpose(1, 2)

    ours = lambda a: linear_attention(a["q"], a["k"], a["v"], log_decay, scale=8**-0.5)[0]
    assert_parity(ours, theirs, arguments, forms=FORMS)


def test_equation():
    """Arxiv 2307.08621, equations 3, 5 and 8: (Q K^T * D) V with Q and K turned by exp(i n theta), head norm and gate."""
    torch = load("torch")
    ours, arguments = mixer("retnet")

    def theirs(a):
        q, k, v, g = (torch.einsum("btd,dhk->bhtk", a["x"], a[f"w_{name}"]) for name in "qkvg")
        heads, key = q.shape[1], q.shape[3]
        n = torch.arange(LENGTH, dtype=q.dtype)
        theta = 10000.0 ** -torch.linspace(0, 1, key // 2, dtype=q.dtype)
        turn = torch.polar(torch.ones(LENGTH, key // 2, dtype=q.dtype), n[:, None] * theta)
        q, k = (torch.view_as_complex(z.reshape(*z.shape[:-1], key // 2, 2)) * turn for z in (q, k))
        gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=n.dtype))
        distance = n[:, None] - n
        decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0)
        # The real part of q . conj(k) is the product of the rotated real vectors.
        o = ((q @ k.mH).real * decay / key**0.5) @ v
        o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + 1e-6)
        return torch.einsum("bhtk,hkd->btd", torch.nn.functional.silu(g) * o, a["w_o"])

    assert_parity(ours, theirs, arguments, forms=FORMS, dtype="float64")
