"""Softmax attention against transformers (Llama, Qwen3, gpt-oss, Qwen3-Next, Gemma 2 and 3, Bloom, GPT-J) and PyTorch."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from ops.rotary import alibi_slopes, rotary
from ops.rotary_scaling import frequencies
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, mixer, normal
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity
AGAINST = (
    "transformers LlamaAttention, Qwen3Attention, GptOssAttention, Qwen3NextAttention, Gemma2Attention, Bloom slopes"
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}


def transformers_attention(family: str, causal: bool, *, rope=None, **options):
    """A library's attention layer with rotary positions, as a function of our parameters.

    Args:
      family: prefix of the class, such as "Llama"; lower-case, with "_" before capitals, it names the module.
      causal: which mask the layer is given.
      rope: parameters of the rotary embedding.
      **options: of the configuration.
    """
    torch = load("torch")
    modeling = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", family).lower()
    module = load(f"transformers.models.{modeling}.modeling_{modeling}")
    config = getattr(module, f"{family}Config")(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"head_dim": WIDTH // 4} | options,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0} | (rope or {}),
    )
    config._attn_implementation = "eager"
    layer = getattr(module, f"{family}Attention")(config, layer_idx=0)
    positions = torch.arange(LENGTH)[None]
    mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None] if causal else None

    def function(a):
        angles = getattr(module, f"{family}RotaryEmbedding")(config)(a["x"], positions)
        weights = {f"{name}_proj.weight": a[f"w_{name}"].flatten(1).T for name in "qkv"}
        if "w_g" in a:  # beside the queries of each head
            weights["q_proj.weight"] = torch.cat([a["w_q"], a["w_g"]], 2).flatten(1).T
        weights["o_proj.weight"] = a["w_o"].flatten(0, 1).T
        weights |= {f"{name}_proj.bias": a[f"b_{name}"].flatten() for name in "qkvo" if f"b_{name}" in a}
        weights |= {name: a[name] for name in ("q_norm.weight", "k_norm.weight", "sinks") if name in a}
        inputs = {"position_embeddings": angles, "attention_mask": mask}
        return torch.func.functional_call(layer, weights, (a["x"],), inputs, strict=True)[0]

    return function


@pytest.mark.parametrize("causal", [True, False])
def test_llama(causal):
    """Grouped queries and rotary positions in the half layout."""
    ours, arguments = mixer("attention", causal=causal, kv_heads=2, rotary_base=500.0)
    assert_parity(ours, transformers_attention("Llama", causal), arguments)


def test_qwen3():
    """Normalised queries and keys."""
    ours, arguments = mixer("attention", kv_heads=2, rotary_base=500.0, qk_norm=True)
    theirs = transformers_attention("Qwen3", True, rms_norm_eps=1e-6)
    assert_parity(ours, theirs, arguments)


def test_gpt_oss():
    """Sinks, biases everywhere, and YaRN without rounded ends."""
    scaling = "yarn:factor=4,original_length=16,beta_fast=4,truncate=0"
    ours, arguments = mixer(
        "attention", kv_heads=2, rotary_base=500.0, rotary_scaling=scaling, qkv_bias=True, bias=True, sinks=True
    )
    rope = {"rope_type": "yarn", "truncate": False, **YARN}
    assert_parity(ours, transformers_attention("GptOss", True, rope=rope), arguments)


def test_qwen3_next():
    """A gate on the output, norms whose weights are stored as their difference from 1, a quarter of 16 channels rotated."""
    ours, arguments = mixer(
        "attention", kv_heads=2, head_channels=16, rotary_base=500.0, rotary_fraction=0.25, qk_norm=True,
        qk_norm_offset=1.0, qk_norm_eps=1e-5, output_gate="full",
    )  # fmt: skip
    options = {"head_dim": 16, "rms_norm_eps": 1e-5}
    theirs = transformers_attention("Qwen3Next", True, rope={"partial_rotary_factor": 0.25}, **options)
    assert_parity(ours, theirs, arguments)


def test_gemma2():
    """A cap of the scores, which has effect here, and a scale of their own."""
    ours, arguments = mixer("attention", kv_heads=2, rotary_base=500.0, score_cap=0.5, scale=0.25)
    options = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16}
    assert_parity(ours, transformers_attention("Gemma2", True, **options), arguments)


@pytest.mark.parametrize(
    "scaling,options",
    [
        ("linear:factor=4", {"rope_type": "linear", "factor": 4.0}),
        ("yarn:factor=4,original_length=16,beta_fast=4", {"rope_type": "yarn", **YARN}),
        ("yarn:factor=32,original_length=4096", {"rope_type": "yarn", **YARN, "factor": 32.0, "beta_fast": 32.0,
                                                 "original_max_position_embeddings": 4096}),
        ("yarn:factor=4,original_length=4,beta_fast=8,beta_slow=2", {  # the ramp's ends are crossed
            "rope_type": "yarn", **YARN, "beta_fast": 8.0, "beta_slow": 2.0, "original_max_position_embeddings": 4}),
        ("llama3:factor=8,original_length=64", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        ("dynamic:factor=2,original_length=64,length=100", {"rope_type": "dynamic", "factor": 2.0}),
        ("longrope:factors=1 2 3 4 5 6 7 8,factor=4,original_length=16", {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
            "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8], "short_factor": [1.0] * 8}),
    ],
)  # fmt: skip
def test_rotary_scaling(scaling, options):
    """Frequencies and magnitudes of every rule."""
    rules, transformers = load("transformers.modeling_rope_utils"), load("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=64,
        rope_parameters={"rope_theta": 500.0, **options},
    )  # fmt: skip
    found, magnitude = frequencies(16, 500.0, scaling)
    expected, factor = rules.ROPE_INIT_FUNCTIONS[options["rope_type"]](config, seq_len=100)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert abs(magnitude - factor) < 1e-6


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
