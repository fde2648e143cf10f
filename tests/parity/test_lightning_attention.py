"""Lightning attention against MiniMax-01 in transformers, and TransNormerLLM's form against its equation."""

import jax.numpy as jnp
import pytest

from models.mixer import Context
from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers MiniMaxLightningAttention"

LAYERS, HEADS = 5, 4


@pytest.mark.parametrize(("layer", "head_channels"), [(0, WIDTH // HEADS), (3, 12)])
def test_minimax(layer, head_channels):
    """The layer, its decays at two depths included; the library's blocks of 16 do not divide the length."""
    torch, minimax = load("torch"), load("transformers.models.minimax.modeling_minimax")
    alone, arguments = mixer("lightning_attention", heads=HEADS, layers=LAYERS, head_channels=head_channels)
    ours = lambda a: alone(a, context=Context(layer=jnp.int32(layer)))
    config = minimax.MiniMaxConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=head_channels,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
        block_size=16,
        hidden_act="silu",
        rms_norm_eps=1e-6,
    )
    layer_module = minimax.MiniMaxLightningAttention(config, layer_idx=layer)

    def theirs(a):
        weights = {
            "qkv_proj.weight": a["w_qkv"].transpose(1, 2).flatten(1).T,
            "output_gate.weight": a["w_g"].T,
            "norm.weight": a["norm.weight"],
            "out_proj.weight": a["w_o"].T,
        }
        inputs = {"position_embeddings": None, "attention_mask": None}
        return torch.func.functional_call(layer_module, weights, (a["x"],), inputs)[0]

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"))


def test_transnormer():
    """Arxiv 2307.14995: (Q K^T * lambda^(i-j)) V normalised over the width, times a linear gate."""
    torch = load("torch")
    alone, arguments = mixer("lightning_attention", heads=HEADS, layers=LAYERS, form="transnormer")
    ours = lambda a: alone(a, context=Context(layer=jnp.int32(2)))

    def theirs(a):
        q, k, v = torch.einsum("btd,dshk->sbhtk", a["x"], a["w_qkv"])
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
        slope = torch.tensor([2.0 ** (-8 * h / HEADS) for h in range(1, HEADS + 1)], dtype=q.dtype)
        distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).to(q.dtype)
        decay = torch.exp(-slope[:, None, None] * (1 - 2 / (LAYERS - 1 + 1e-5) + 1e-5) * distance.clamp(min=0)).tril()
        o = ((q @ k.mT * decay) @ v).transpose(1, 2).flatten(2)
        o = o / torch.sqrt(o.square().mean(-1, keepdim=True) + 1e-6)
        return (a["x"] @ a["w_g"] * o) @ a["w_o"]

    assert_parity(ours, theirs, arguments, dtype="float64")
