"""The gated attention unit against FLASH-pytorch, and against the paper's equation with its rotations and its bias."""

import math

import jax.numpy as jnp
import pytest

from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "FLASH-pytorch GAU; equations in float64"

KEY = 16


@pytest.mark.parametrize("causal", [True, False])
def test_flash_pytorch(causal):
    """Without positions: the library's unit has no rotation and another bias, so ours is given position 0 throughout."""
    torch, flash = load("torch"), load("flash_pytorch")
    unit, arguments = mixer("gau", causal=causal, key_size=KEY, length=LENGTH, zeroed=("bias",))
    ours = lambda a: unit(a, positions=jnp.zeros((BATCH, LENGTH), jnp.int32))
    layer = flash.GAU(
        dim=WIDTH,
        query_key_dim=KEY,
        causal=causal,
        add_residual=False,
        norm_klass=lambda dim: torch.nn.Identity(),
    )

    def theirs(a):
        zero = a["x"].new_zeros
        hidden = torch.cat([a["w_v"], a["w_u"]], 1).T
        weights = {
            "to_hidden.0.weight": hidden,
            "to_hidden.0.bias": zero(hidden.shape[0]),
            "to_qk.0.weight": a["w_z"].T,
            "to_qk.0.bias": zero(KEY),
            "offsetscale.gamma": a["gamma"],
            "offsetscale.beta": a["beta"],
            "to_out.0.weight": a["w_o"].T,
            "to_out.0.bias": zero(WIDTH),
            "rel_pos_bias.relative_attention_bias.weight": zero(32, 1),
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments, constant=("bias",))


@pytest.mark.parametrize("normalizer", ["length", "count"])
@pytest.mark.parametrize("causal", [True, False])
def test_equation(causal, normalizer):
    """Arxiv 2202.10447, section 3 and code 1 to 3 of its appendix, with the bias of two rotated vectors."""
    torch = load("torch")
    silu = torch.nn.functional.silu
    ours, arguments = mixer("gau", causal=causal, key_size=KEY, normalizer=normalizer, length=LENGTH)

    def theirs(a):
        u, v, z = (silu(a["x"] @ a[f"w_{name}"]) for name in "uvz")
        q, k = (rope(torch, z * a["gamma"][i] + a["beta"][i]) for i in (0, 1))
        bias = rope(torch, a["bias"][0].expand(LENGTH, KEY)) @ rope(torch, a["bias"][1].expand(LENGTH, KEY)).T
        scale = LENGTH if normalizer == "length" else KEY**0.5
        weights = torch.relu(q @ k.mT / scale + bias) ** 2
        weights = weights.tril() if causal else weights
        if normalizer == "count":
            seen = torch.ones(LENGTH, LENGTH, dtype=z.dtype)
            weights = weights / (seen.tril() if causal else seen).sum(-1, keepdim=True)
        return (u * (weights @ v)) @ a["w_o"]

    assert_parity(ours, theirs, arguments, dtype="float64")


@pytest.mark.parametrize("causal", [True, False])
def test_gau_alpha(causal):
    """ZhuiyiTechnology/GAU-alpha: the softmax whose scores grow with the logarithm of the number of keys, here for n = 30."""
    torch = load("torch")
    silu = torch.nn.functional.silu
    ours, arguments = mixer("gau", causal=causal, key_size=KEY, normalizer="softmax", length=30)

    def theirs(a):
        u, v, z = (silu(a["x"] @ a[f"w_{name}"]) for name in "uvz")
        q, k = (rope(torch, z * a["gamma"][i]) for i in (0, 1))
        seen = torch.ones(LENGTH, LENGTH, dtype=z.dtype)
        seen = seen.tril() if causal else seen
        scale = seen.sum(-1, keepdim=True).clamp(min=16).log() / math.log(30)
        weights = (scale * (q @ k.mT) / KEY**0.5).masked_fill(seen == 0, -torch.inf).softmax(-1)
        return (u * (weights @ v)) @ a["w_o"]

    assert_parity(ours, theirs, arguments, dtype="float64")


def rope(torch, z):
    """Pairs (i, i + s/2) as complex numbers, turned by t * 10000^(-2i/s)."""
    half = KEY // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=z.dtype) / half)
    turn = torch.polar(torch.ones(LENGTH, half, dtype=z.dtype), torch.arange(LENGTH)[:, None] * frequency)
    z = torch.complex(z[..., :half], z[..., half:]) * turn
    return torch.cat([z.real, z.imag], -1)
