"""Mamba against transformers' layer."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity
AGAINST = "transformers MambaMixer"


def test_layer():
    """The layer, short convolution and gate included."""
    torch, mamba = load("torch"), load("transformers.models.mamba.modeling_mamba")
    ours, arguments = mixer("mamba", state=4, dt_rank=3)
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
    layer = mamba.MambaMixer(config, layer_idx=0)

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
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"))
