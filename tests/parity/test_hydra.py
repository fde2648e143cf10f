"""Hydra against the product with its quasiseparable matrix, in float64."""

import pytest

from tests.parity.oracles import BATCH, LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"


@pytest.mark.parametrize("groups,form", [(1, "sequential"), (2, "chunked")])
def test_layer(groups, form):
    """The matrix of each head written out: what is below the diagonal, what is above it, and the diagonal."""
    torch = load("torch")
    F = torch.nn.functional
    heads, size = 4, 6
    ours, arguments = mixer("hydra", causal=False, heads=heads, state=size, groups=groups)

    def theirs(a):
        x = a["x"]

        def convolved(name):
            u = (x @ a[f"w_{name}"]).mT
            return F.silu(
                F.conv1d(u, a[f"conv_{name}"].T[:, None], a[f"conv_{name}_bias"], padding=3, groups=u.shape[1])
            ).mT

        u = convolved("u")
        # direction, B or C, group
        bc = convolved("bc").reshape(BATCH, LENGTH, 2, 2, groups, size).repeat_interleave(heads // groups, 4)
        dt = F.softplus(torch.einsum("btd,dgh->btgh", x, a["w_dt"]) + a["dt_bias"])
        A = -torch.exp(a["a_log"])[:, None]

        def below_diagonal(step, B, C):
            """What each token says to the later ones [B, H, T, T]: the row of the token before, of Mamba-2's matrix."""
            c = torch.cumsum(A * step, 2)
            decay = torch.tril(torch.exp(torch.tril(c[..., :, None] - c[..., None, :])))
            M = decay * torch.einsum("bihn,bjhn->bhij", C, B) * step[..., None, :]
            return F.pad(M[..., :-1, :], (0, 0, 1, 0))

        of = lambda i: (dt[:, :, i].mT, *bc[:, :, i].unbind(2))
        forth = below_diagonal(*of(0))
        step, B, C = of(1)
        back = below_diagonal(step.flip(2), B.flip(1), C.flip(1)).flip(2, 3)
        M = forth + back + torch.diag_embed((a["d"] + u @ a["w_d"]).mT)
        o = torch.einsum("bhij,bjhp->bihp", M, u.unflatten(2, (heads, -1))).flatten(2)
        o = F.rms_norm(o, o.shape[-1:], a["norm.weight"], eps=1e-5)
        return (o * F.silu(x @ a["w_z"])) @ a["w_out"]

    assert_parity(ours, theirs, arguments, forms=(form,), dtype="float64")
