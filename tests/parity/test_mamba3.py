"""Mamba-3 against the paper's equations in float64, with its complex state and two writes a token."""

import math

import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("rank", [1, 3])
def test_layer(rank):
    """Complex channels that really turn, in place of rotated inputs; one write and read of a token, and several."""
    torch = load("torch")
    F = torch.nn.functional
    heads, size = 2, 8
    ours, arguments = mixer("mamba3", heads=heads, state=size, rank=rank)

    def theirs(a):
        x = a["x"]
        z, u = (torch.einsum("btd,dhk->bthk", x, a[name]) for name in ("w_z", "w_x"))
        dt, rate, mix = torch.einsum("btd,dgh->gbth", x, a["w_gates"])
        dt, mix = F.softplus(dt + a["dt_bias"]), torch.sigmoid(mix)
        A = -torch.where(rate >= 0, 1 + rate, 1 / (1 - rate.clamp(max=0))).clamp(min=1e-4)
        angle = torch.tanh(x @ a["w_angle"])[:, :, None] * math.pi * dt[..., None]
        to_bc = torch.einsum("btd,dgrn->gbtrn", x, a["w_bc"].reshape(-1, 2, rank, size))
        B, C = (
            F.rms_norm(y, (size,), a[f"{n}_norm.weight"], eps=1e-5)[:, :, :, None]
            + a[f"{n}_bias"].reshape(rank, heads, size)
            for n, y in zip("bc", to_bc, strict=True)
        )
        ranks = {n: a[f"rank_{n}"] if rank > 1 else torch.ones(1, 1, 1) for n in "xzo"}
        u = u[:, :, None] * ranks["x"]

        def to_complex(y):
            """Pairs of the first half as one number each, the others as real numbers."""
            pairs = torch.view_as_complex(y[..., : size // 2].unflatten(-1, (-1, 2)).contiguous())
            return torch.cat([pairs, y[..., size // 2 :].to(pairs.dtype)], -1)

        B, C = to_complex(B), to_complex(C)
        still = F.pad(angle, (0, size // 2))
        turn = torch.polar(torch.ones_like(still), -still)
        S = torch.zeros(BATCH, heads, B.shape[-1], u.shape[-1], dtype=B.dtype)
        before, o = torch.zeros_like(S), []
        keep, old, own = (g[..., None, None] for g in (torch.exp(A * dt), (1 - mix) * dt, mix * dt))
        for t in range(LENGTH):
            write = torch.einsum("brhn,brhp->bhnp", B[:, t], u[:, t].to(B.dtype))
            # The state turns by the token's angle and fades, and with it the write of the token before.
            fade = keep[:, t] * turn[:, t, :, :, None]
            S = fade * (S + old[:, t] * before) + own[:, t] * write
            o.append(torch.einsum("bhnp,brhn->brhp", S, C[:, t].conj()).real)
            before = write
        o = torch.stack(o, 1) + a["d"][:, None] * u
        o = (ranks["o"] * o * F.silu(z[:, :, None] * ranks["z"])).sum(2)
        return torch.einsum("bthp,hpd->btd", o, a["w_out"])

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"), dtype="float64")
