"""Mixed chunk attention against FLASH-pytorch, and against the paper's equation with its bias."""

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "FLASH-pytorch FLASH"

CHUNK, KEY = 16, 8


@pytest.mark.parametrize("causal", [True, False])
def test_flash_pytorch(causal):
    """With rotations, whose pairs the library interleaves, and without a bias, for which it has another form."""
    torch, flash = load("torch"), load("flash_pytorch")
    ours, arguments = mixer("flash", causal=causal, chunk=CHUNK, key_size=KEY, zeroed=("bias",))
    layer = flash.FLASH(
        dim=WIDTH,
        group_size=CHUNK,
        query_key_dim=KEY,
        causal=causal,
        rotary_pos_emb=load("rotary_embedding_torch").RotaryEmbedding(dim=KEY),
        norm_klass=lambda dim: torch.nn.Identity(),
    )
    interleaved = torch.arange(KEY).reshape(2, -1).T.flatten()

    def theirs(a):
        zero = a["x"].new_zeros
        hidden = torch.cat([a["w_v"], a["w_u"]], 1).T
        # Two-sided, the library divides the linear part by the length, here filled up to whole chunks.
        size = torch.tensor([1, 1, 1, 1 if causal else LENGTH / CHUNK])[:, None]
        order = lambda p: (p * size)[[0, 2, 1, 3]][:, interleaved]
        weights = {
            "to_hidden.0.weight": hidden,
            "to_hidden.0.bias": zero(hidden.shape[0]),
            "to_qk.0.weight": a["w_z"].T[interleaved],
            "to_qk.0.bias": zero(KEY),
            "qk_offset_scale.gamma": order(a["gamma"]),
            "qk_offset_scale.beta": order(a["beta"]),
            "to_out.weight": a["w_o"].T,
            "to_out.bias": zero(WIDTH),
            "rel_pos_bias.relative_attention_bias.weight": zero(32, 1),
        }
        return torch.func.functional_call(layer, weights, (a["x"],)) - a["x"]

    assert_parity(ours, theirs, arguments, constant=("bias",))


@pytest.mark.parametrize("causal", [True, False])
def test_equation(causal):
    """Arxiv 2202.10447, section 4, as masked scores, with the bias of two rotated vectors; whole sequences and packed rows."""
    torch = load("torch")
    both, arguments = mixer("flash", causal=causal, chunk=CHUNK, key_size=KEY)
    ids = (arguments["x"][..., 0] * 0 + 1).astype("int32")
    ours = lambda a: (both(a), both(a, segment_ids=ids))

    def rope(z):
        half = KEY // 2
        angle = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(half, dtype=z.dtype) / half)
        z = torch.complex(z[..., :half], z[..., half:]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], -1)

    def theirs(a):
        u, v, z = (torch.nn.functional.silu(a["x"] @ a[f"w_{name}"]) for name in "uvz")
        q, k, q_lin, k_lin = (rope(z * a["gamma"][i] + a["beta"][i]) for i in range(4))
        bias = rope(a["bias"][0].expand(LENGTH, KEY)) @ rope(a["bias"][1].expand(LENGTH, KEY)).T
        chunk = torch.arange(LENGTH) // CHUNK
        same = chunk[:, None] == chunk
        near, far = (same.tril(), chunk[:, None] > chunk) if causal else (same, torch.ones_like(same))
        weights = near * torch.relu(q @ k.mT / CHUNK + bias) ** 2 + far * (q_lin @ k_lin.mT) / CHUNK
        y = (u * (weights @ v)) @ a["w_o"]
        return y, y

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked") if causal else ("auto",), dtype="float64")
