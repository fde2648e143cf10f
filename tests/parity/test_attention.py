"""Softmax attention against transformers (Llama, Qwen3, Bloom, GPT-J) and PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest

from ops.rotary import alibi_slopes, rotary
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer, normal
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity
AGAINST = "transformers LlamaAttention, Qwen3Attention, Bloom slopes"


def transformers_attention(family: str, modeling: str, causal: bool, **options):
    """A library's attention layer with rotary positions, as a function of our parameters."""
    torch = load("torch")
    module = load(f"transformers.models.{modeling}.modeling_{modeling}")
    config = getattr(module, f"{family}Config")(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **options,
    )
    config._attn_implementation = "eager"
    layer = getattr(module, f"{family}Attention")(config, layer_idx=0)
    positions = torch.arange(LENGTH)[None]
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None] if causal else None

    def function(a):
        angles = getattr(module, f"{family}RotaryEmbedding")(config)(a["x"], positions)
        weights = {f"{name}_proj.weight": a[f"w_{name}"].flatten(1).T for name in "qkv"}
        weights["o_proj.weight"] = a["w_o"].flatten(0, 1).T
        weights |= {f"{name}.weight": a[f"{name}.weight"] for name in ("q_norm", "k_norm") if f"{name}.weight" in a}
        inputs = {"position_embeddings": angles, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    return function


@pytest.mark.parametrize("causal", [True, False])
def test_llama(causal):
    """Grouped queries and rotary positions in the half layout."""
    ours, arguments = mixer("attention", causal=causal, kv_heads=2, rotary_base=500.0)
    assert_parity(ours, transformers_attention("Llama", "llama", causal), arguments)


def test_qwen3():
    """Normalised queries and keys."""
    ours, arguments = mixer("attention", kv_heads=2, rotary_base=500.0, qk_norm=True)
    theirs = transformers_attention("Qwen3", "qwen3", True, rms_norm_eps=1e-6)
    assert_parity(ours, theirs, arguments)


@pytest.mark.parametrize("positions", ["alibi", "none"])
def test_alibi(positions):
    """PyTorch's attention with Bloom's bias, and without any positions."""
    torch, bloom = load("torch"), load("transformers.models.bloom.modeling_bloom")
    ours, arguments = mixer("attention", positions=positions, kv_heads=1)
    everything = torch.ones(1, LENGTH, dtype=torch.long)
    bias = bloom.build_alibi_tensor(everything, 4, torch.float32) * (positions == "alibi")
    bias = bias + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)

    def theirs(a):
        q, k, v = (torch.einsum("btd,dhk->bhtk", a["x"], a[f"w_{name}"]) for name in "qkv")
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], enable_gqa=True)
        return torch.einsum("bhtk,hkd->btd", y, a["w_o"])

    assert_parity(ours, theirs, arguments)


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 20])
def test_alibi_slopes(heads):
    """Bloom's slopes, for powers of two and other numbers of heads."""
    torch, bloom = load("torch"), load("transformers.models.bloom.modeling_bloom")
    bias = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)
    assert_close(alibi_slopes(heads), bias[:, 0, 1])


def test_rotary_interleaved():
    """The interleaved layout, against GPT-J."""
    torch, gptj = load("torch"), load("transformers.models.gptj.modeling_gptj")
    x = normal(BATCH, LENGTH, 3, 8)
    positions = np.random.default_rng(1).integers(0, 200, (BATCH, LENGTH))
    sin, cos = torch.chunk(gptj.create_sinusoidal_positions(200, 8)[torch.tensor(positions)], 2, dim=-1)
    expected = gptj.apply_rotary_pos_emb(torch.tensor(x), sin, cos)
    assert_close(rotary(jnp.asarray(x), jnp.asarray(positions), layout="interleaved"), expected)
