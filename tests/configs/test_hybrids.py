"""Hybrids by name: the released sizes have the released numbers of parameters, in the released order of layers."""

import pytest
from flax import nnx

from configs import hybrids
from models import accounting
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from training.config import section

# Of the checkpoints. Jamba's have norms of dt, B and C that ours lack: 256 + 16 + 16 weights in each of 28 layers.
RELEASED = {"griffin": (256000, 2_682_862_080), "jamba": (65536, 51_570_323_328 - 28 * (256 + 16 + 16))}


def model(name: str, vocab_size: int) -> ModelConfig:
    raw = hybrids.get_config(f"name={name},size=paper").model.to_dict()
    given = {"causal": True, "length": 4096} | ({"tie_embeddings": True} if raw["tie_embeddings"] is None else {})
    sizes = {"vocab_size": vocab_size, "targets": vocab_size, "channels": None, "head": "token"}
    return section(ModelConfig, raw | given, "config.model", sizes)


@pytest.mark.parametrize("name", RELEASED)
def test_released_parameters(name):
    vocab_size, parameters = RELEASED[name]
    config = model(name, vocab_size)
    abstract = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    assert accounting.parameter_count(abstract) == parameters
    if name == "jamba":  # "12B active, 52B in all"
        assert round(accounting.active_parameter_count(abstract) / 1e9) == 12


def test_nemotron_h_has_its_layers_in_order():
    """As single sublayers, M for Mamba-2, * for attention and - for an MLP, they are those of the 8B model's configuration."""
    config = model("nemotron_h", 131072)
    kinds = {("mamba2",): "M", ("attention",): "*"}
    found = "".join(kinds[item.mixers] + ("-" if item.channel == "relu2" else "") for item in config.items)
    assert found == "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    abstract = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    assert round(accounting.parameter_count(abstract) / 1e8) == 81


def test_a_size_that_is_not_known_is_refused():
    with pytest.raises(
        ValueError, match="a name with size=paper must be one of griffin, jamba, nemotron_h, got 'samba'"
    ):
        hybrids.get_config("name=samba,size=paper")
