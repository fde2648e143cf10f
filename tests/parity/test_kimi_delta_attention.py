"""Kimi Delta Attention against transformers' KimiLinear layer, and its delta rule against flash-linear-attention."""

import numpy as np
import pytest

from ops.delta_rule import delta_rule
from tests.parity.oracles import BATCH, LENGTH, WIDTH, assert_parity, load, load_fla, mixer, normal

pytestmark = pytest.mark.parity

AGAINST = "transformers KimiLinearDeltaAttention"


@pytest.mark.parametrize("strength,form", [(0.05, "sequential"), (3.0, "chunked")])
def test_operation(strength, form):
    """A decay for each channel, weak and strong; states included."""
    load("torch")
    fla = load_fla("kda")
    arguments = {name: normal(BATCH, LENGTH, 3, size, seed=i) for i, (name, size) in enumerate(zip("qkv", (8, 8, 12)))}
    arguments["k"] /= np.linalg.norm(arguments["k"], axis=-1, keepdims=True)
    arguments["beta"] = np.random.default_rng(6).uniform(0, 1, (BATCH, LENGTH, 3)).astype(np.float32)
    arguments["g"] = -strength * np.abs(normal(BATCH, LENGTH, 3, 8, seed=5))
    arguments["state"] = normal(BATCH, 3, 8, 12, seed=4)

    def ours(a):
        return delta_rule(a["q"], a["k"], a["v"], a["beta"], a["g"], scale=8**-0.5, initial_state=a["state"])

    def theirs(a):
        given = [a[name] for name in ("q", "k", "v", "g", "beta")]
        return fla.naive_recurrent_kda(*given, initial_state=a["state"], output_final_state=True)

    assert_parity(ours, theirs, arguments, forms=(form,))


@pytest.mark.parametrize("lower_bound,form", [(None, "chunked"), (-5.0, "sequential")])
def test_layer(lower_bound, form, monkeypatch):
    """The layer, with the library's recurrence token by token, which rounds less than its chunks.

    The library has the paper's decay only; the bounded one is put in its place.
    """
    torch, kimi = load("torch"), load("transformers.models.kimi_linear.modeling_kimi_linear")
    monkeypatch.setattr(kimi, "chunk_kimi_delta_attention", kimi.recurrent_kimi_delta_attention)
    ours, arguments = mixer("kimi_delta_attention", lower_bound=lower_bound)
    # Inputs for which no head's output nearly vanishes: there the head norm would blow up float32's rounding, also theirs.
    arguments["x"] = normal(BATCH, LENGTH, WIDTH, seed=21)
    heads, size, _ = arguments["w_o"].shape
    config = kimi.KimiLinearConfig(
        hidden_size=WIDTH,
        linear_num_heads=heads,
        linear_head_dim=size,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    layer = kimi.KimiLinearDeltaAttention(config, layer_idx=0)

    def bounded(a):
        f = (a["x"] @ a["w_f1"] @ a["w_f2"].flatten(1)).unflatten(2, (heads, size)) + a["dt_bias"]
        return lower_bound * torch.sigmoid(torch.exp(a["a_log"])[:, None] * f)

    def theirs(a):
        weights = {
            "q_proj.weight": a["q.weight"].T,
            "k_proj.weight": a["k.weight"].T,
            "v_proj.weight": a["v.weight"].T,
            "conv1d.weight": torch.cat([a[f"{name}.taps"] for name in "qkv"], 1).T[:, None],
            "forget_gate.f_a_proj.weight": a["w_f1"].T,
            "forget_gate.f_b_proj.weight": a["w_f2"].flatten(1).T,
            "forget_gate.dt_bias": a["dt_bias"].flatten(),
            "forget_gate.A_log": a["a_log"][None, None, :, None],
            "b_proj.weight": a["w_b"].T,
            "g_a_proj.weight": a["w_g1"].T,
            "g_b_proj.weight": a["w_g2"].flatten(1).T,
            "o_norm.weight": a["norm.weight"],
            "o_proj.weight": a["w_o"].flatten(0, 1).T,
        }
        if lower_bound is not None:
            layer.forget_gate.forward = lambda x: bounded(a)
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments, forms=(form,))
