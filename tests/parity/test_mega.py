"""MEGA against the paper's equations, token by token and with all scores at once, in float64."""

import pytest

from tests.parity.oracles import LENGTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "the paper's equations in float64"

KEY, EMA = 8, 4


@pytest.mark.parametrize(
    "causal,activation,chunk", [(True, "softmax", None), (True, "laplace", 16), (False, "laplace", 16)]
)
def test_equations(causal, activation, chunk):
    """Arxiv 2209.10655, equations 5 to 16; whole sequences (convolution) and segments (recurrence)."""
    torch = load("torch")
    silu = torch.nn.functional.silu
    options = {"causal": causal, "activation": activation, "key_size": KEY, "ema_size": EMA, "chunk": chunk}
    both, arguments = mixer("mega", **options)
    ids = (arguments["x"][..., 0] * 0 + 1).astype("int32")
    ours = lambda a: (both(a), both(a, segment_ids=ids))

    def ema(a, i, x):
        p, damping = torch.sigmoid(a["delta"][i]), torch.sigmoid(a["alpha"][i])
        h, y = torch.zeros(len(x), *p.shape, dtype=x.dtype), []
        for t in range(LENGTH):
            h = p * a["ema_in"][i] * x[:, t, :, None] + (1 - p * damping) * h
            y.append((a["ema_out"][i] * h).sum(-1) / EMA**0.5)
        return torch.stack(y, 1)

    def rope(z):
        half = KEY // 2
        angle = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(half, dtype=z.dtype) / half)
        z = torch.complex(z[..., :half], z[..., half:]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], -1)

    def theirs(a):
        x = a["x"]
        average = ema(a, 0, x) if causal else ema(a, 0, x) + ema(a, 1, x.flip(1)).flip(1)
        m = silu(average + a["omega"] * x)
        u, h, z = (m @ a["w_m"] + a["b_m"]).split([x.shape[-1], x.shape[-1], KEY], -1)
        r, v = silu(m @ a["w_r"] + a["b_r"]), silu(x @ a["w_v"] + a["b_v"])
        q, k = (silu(z) * a["gamma"][i] + a["beta"][i] for i in (0, 1))
        bias = rope(a["bias"][0].expand(LENGTH, KEY)) @ rope(a["bias"][1].expand(LENGTH, KEY)).T
        place = torch.arange(LENGTH) // (chunk or LENGTH)
        mask = place[:, None] == place
        mask = mask.tril() if causal else mask
        if activation == "softmax":
            weights = (q @ k.mT / KEY**0.5 + bias).masked_fill(~mask, -torch.inf).softmax(-1)
        else:
            s = q @ k.mT / mask.sum(-1, keepdim=True) + bias
            weights = mask * torch.special.ndtr((s - 0.5**0.5) / (0.25 / torch.pi) ** 0.5)
        y = torch.sigmoid(u) * (silu(h + (r * (weights @ v)) @ a["u_h"]) - x)
        return y, y

    assert_parity(ours, theirs, arguments, dtype="float64")
