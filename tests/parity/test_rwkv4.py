"""RWKV-4 against transformers' layer, and against the paper's sums in float64."""

import pytest

from tests.parity.oracles import LENGTH, WIDTH, assert_parity, load, mixer

pytestmark = pytest.mark.parity

AGAINST = "transformers RwkvSelfAttention and the paper's sums in float64"


def test_layer():
    """The layer, token shifts and gate included."""
    torch, rwkv = load("torch"), load("transformers.models.rwkv.modeling_rwkv")
    ours, arguments = mixer("rwkv4")
    config = rwkv.RwkvConfig(hidden_size=WIDTH, num_hidden_layers=1, context_length=8)
    layer = rwkv.RwkvSelfAttention(config, layer_id=0)

    def theirs(a):
        mu_k, mu_v, mu_r = a["mu"][:, None, None]
        weights = {
            "time_decay": a["log_w"],
            "time_first": a["u"],
            "time_mix_key": mu_k,
            "time_mix_value": mu_v,
            "time_mix_receptance": mu_r,
            "key.weight": a["w_k"].T,
            "value.weight": a["w_v"].T,
            "receptance.weight": a["w_r"].T,
            "output.weight": a["w_o"].T,
        }
        return torch.func.functional_call(layer, weights, (a["x"],), strict=True)[0]

    assert_parity(ours, theirs, arguments)


def test_large_keys():
    """Keys whose exponentials float32 cannot hold, and every weight of the sums written out."""
    torch = load("torch")
    ours, arguments = mixer("rwkv4")
    arguments["w_k"] *= 50

    def theirs(a):
        x = a["x"]
        before = torch.nn.functional.pad(x, (0, 0, 1, -1))
        k, v, r = ((mu * x + (1 - mu) * before) @ a[f"w_{name}"] for mu, name in zip(a["mu"], "kvr"))
        t = torch.arange(LENGTH)
        age = (t[:, None] - t - 1)[..., None]
        exponent = torch.where(age < 0, a["u"], -age * torch.exp(a["log_w"]))
        weight = torch.exp(exponent + k[:, None]) * (age >= -1)
        wkv = (weight * v[:, None]).sum(2) / weight.sum(2)
        return (torch.sigmoid(r) * wkv) @ a["w_o"]

    assert_parity(ours, theirs, arguments, dtype="float64")
