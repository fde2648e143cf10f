"""Mamba-2 against transformers' layer."""

import pytest

from tests.parity.oracles import WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers Mamba2Mixer"


@pytest.mark.parametrize("groups", [1, 2])
def test_layer(groups):
    """The layer, short convolution, gate and norm included; B and C of one group of heads and of two."""
    torch, mamba = load("torch"), load("transformers.models.mamba2.modeling_mamba2")
    ours, arguments = mixer("mamba2", state=8, heads=4, groups=groups)
    config = mamba.Mamba2Config(
        hidden_size=WIDTH,
        state_size=8,
        num_heads=4,
        head_dim=2 * WIDTH // 4,
        n_groups=groups,
        expand=2,
        conv_kernel=4,
        chunk_size=16,
        use_bias=False,
        use_conv_bias=True,
        num_hidden_layers=1,
    )
    layer = mamba.Mamba2Mixer(config, layer_idx=0)

    def theirs(a):
        weights = {
            "in_proj.weight": torch.cat([a["w_z"], a["w_u"], a["w_bc"], a["w_dt"]], 1).T,
            "conv1d.weight": torch.cat([a["conv_u"], a["conv_bc"]], 1).T[:, None],
            "conv1d.bias": torch.cat([a["conv_u_bias"], a["conv_bc_bias"]]),
            "dt_bias": a["dt_bias"],
            "A_log": a["a_log"],
            "D": a["d"],
            "norm.weight": a["norm"],
            "out_proj.weight": a["w_out"].T,
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)

    assert_parity(ours, theirs, arguments, forms=("sequential", "chunked"))
