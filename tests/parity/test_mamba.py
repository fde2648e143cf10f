"""Mamba against transformers' layers, of Mamba and of those who normalise its parameters."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers MambaMixer, JambaMambaMixer, FalconMambaMixer"


def test_layer():
    """The layer, short convolution and gate included."""
    torch, mamba = load("torch"), load("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(
        hidden_size=WIDTH,
        state_size=4,
        expand=2,
        conv_kernel=4,
        time_step_rank=3,
        use_bias=False,
        use_conv_bias=True,
        num_hidden_layers=1,
    )
    assert_layer(torch, mamba.MambaMixer(config, layer_idx=0), "none", forms=("sequential", "chunked"))


def test_jamba():
    """Norms with weights of the step's map, B and C."""
    torch, jamba = load("torch"), load("transformers.models.jamba.modeling_jamba")
    config = jamba.JambaConfig(
        hidden_size=WIDTH, mamba_d_state=4, mamba_dt_rank=3, num_hidden_layers=2, rms_norm_eps=1e-6
    )
    assert_layer(torch, jamba.JambaMambaMixer(config, layer_idx=0), "rms")


def test_falcon_mamba():
    """The same norms without weights."""
    torch, falcon = load("torch"), load("transformers.models.falcon_mamba.modeling_falcon_mamba")
    config = falcon.FalconMambaConfig(
        hidden_size=WIDTH, state_size=4, expand=2, conv_kernel=4, time_step_rank=3, num_hidden_layers=1
    )
    assert_layer(torch, falcon.FalconMambaMixer(config, 0, initialize_mixer_weights=False), "weightless")


def assert_layer(torch, layer, norm, forms=("auto",)):
    """Our layer against one of the library's, whose parameters have the same names in all of them."""
    ours, arguments = mixer("mamba", state=4, dt_rank=3, norm=norm)
    # The library keeps weights of norms without weights for its kernels: ones.
    ones = {name: value for name, value in layer.named_buffers() if norm == "weightless" and "layernorm" in name}
    names = {"dt": "r", "b": "b", "c": "c"} if norm == "rms" else {}

    def theirs(a):
        weights = {
            "in_proj.weight": a["w_in"].flatten(1).T,
            "conv1d.weight": a["conv"].T[:, None],
            "conv1d.bias": a["conv_bias"],
            "x_proj.weight": a["w_x"].T,
            "dt_proj.weight": a["w_dt"].T,
            "dt_proj.bias": a["dt_bias"],
            "A_log": a["a_log"],
            "D": a["d"],
            "out_proj.weight": a["w_out"].T,
        }
        weights |= ones | {f"{theirs}_layernorm.weight": a[f"{ours}_norm.weight"] for theirs, ours in names.items()}
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments, forms=forms)
