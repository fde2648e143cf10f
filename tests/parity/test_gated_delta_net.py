"""Gated DeltaNet against transformers' layers of Qwen3-Next and OLMo Hybrid, and the rule against flash-linear-attention."""

import numpy as np
import pytest

from ops.delta_rule import delta_rule
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity
AGAINST = "transformers Qwen3NextGatedDeltaNet, OlmoHybridGatedDeltaNet; fla naive"

FORMS = ("sequential", "chunked")


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_operation(strength):
    """beta up to 2, weak and strong decays, states included."""
    load("torch")
    fla = load_fla("gated_delta_rule")
    arguments = {name: normal(BATCH, LENGTH, 3, size, seed=i) for i, (name, size) in enumerate(zip("qkv", (8, 8, 12)))}
    arguments["k"] /= np.linalg.norm(arguments["k"], axis=-1, keepdims=True)
    arguments["beta"] = np.random.default_rng(6).uniform(0, 2, (BATCH, LENGTH, 3)).astype(np.float32)
    arguments["g"] = -strength * np.abs(normal(BATCH, LENGTH, 3, seed=5))
    arguments["state"] = normal(BATCH, 3, 8, 12, seed=4)

    def ours(a):
        return delta_rule(a["q"], a["k"], a["v"], a["beta"], a["g"], scale=8**-0.5, initial_state=a["state"])

    def theirs(a):
        given = [a[name] for name in ("q", "k", "v", "beta", "g")]
        return fla.naive_recurrent_gated_delta_rule(*given, initial_state=a["state"], output_final_state=True)

    assert_parity(ours, theirs, arguments, forms=FORMS)


@pytest.mark.parametrize("groups,form", [(1, "sequential"), (1, "chunked"), (2, "auto")])
def test_qwen3_next(groups, form):
    """The layer, short convolutions and gates included; with two value heads for each key head, too."""
    torch, qwen = load("torch"), load("transformers.models.qwen3_next.modeling_qwen3_next")
    heads, value_heads = 4 // groups, 4
    ours, arguments = mixer("gated_delta_net", heads=heads, value_heads=value_heads)
    # Inputs for which no head's output nearly vanishes: there the head norm would blow up float32's rounding, also theirs.
    arguments["x"] = normal(BATCH, LENGTH, WIDTH, seed=20)
    _, values, _ = arguments["w_o"].shape
    keys = arguments["q.weight"].shape[1] // heads
    config = qwen.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=keys,
        linear_value_head_dim=values,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    layer = qwen.Qwen3NextGatedDeltaNet(config, layer_idx=0)

    def theirs(a):
        # The library interleaves its projections by key head: q, k, v and the gate; beta and the decay.
        of_heads = [a[f"{name}.weight"].unflatten(1, (heads, -1)) for name in "qkv"]
        gate = a["w_g"].unflatten(1, (heads, groups)).flatten(2)
        of_gates = [a[name].unflatten(1, (heads, groups)) for name in ("w_b", "w_a")]
        weights = {
            "in_proj_qkvz.weight": torch.cat([*of_heads, gate], 2).flatten(1).T,
            "in_proj_ba.weight": torch.cat(of_gates, 2).flatten(1).T,
            "conv1d.weight": torch.cat([a[f"{name}.taps"] for name in "qkv"], 1).T[:, None],
            "A_log": a["a_log"],
            "dt_bias": a["dt_bias"],
            "norm.weight": a["norm.weight"],
            "out_proj.weight": a["w_o"].flatten(0, 1).T,
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments, forms=(form,))


def test_olmo_hybrid():
    """The layer of OLMo Hybrid: beta up to 2 and another eps."""
    torch, olmo = load("torch"), load("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    heads, value_heads = 2, 4
    ours, arguments = mixer(
        "gated_delta_net", heads=heads, value_heads=value_heads, negative_eigenvalues=True, eps=1e-5
    )
    arguments["x"] = normal(BATCH, LENGTH, WIDTH, seed=20)
    config = olmo.OlmoHybridConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        linear_num_key_heads=heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=arguments["q.weight"].shape[1] // heads,
        linear_value_head_dim=arguments["w_o"].shape[1],
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=True,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = olmo.OlmoHybridGatedDeltaNet(config, layer_idx=0)

    def theirs(a):
        weights = {f"{name}_proj.weight": a[f"{name}.weight"].T for name in "qkv"} | {
            "a_proj.weight": a["w_a"].T,
            "b_proj.weight": a["w_b"].T,
            "g_proj.weight": a["w_g"].flatten(1).T,
            "conv1d.weight": torch.cat([a[f"{name}.taps"] for name in "qkv"], 1).T[:, None],
            "A_log": a["a_log"],
            "dt_bias": a["dt_bias"],
            "o_norm.weight": a["norm.weight"],
            "o_proj.weight": a["w_o"].flatten(0, 1).T,
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments)
