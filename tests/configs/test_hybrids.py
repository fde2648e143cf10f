"""Hybrids by name: the released sizes have the released numbers of parameters, in the released order of layers."""

import pathlib

import pytest
from flax import nnx

from configs import hybrids
from models import accounting, import_hf
from models.config import ModelConfig
from models.sequence_model import SequenceModel
from training.config import section

# Size of the vocabulary, and number of parameters of the checkpoint: of griffin and jamba as published, of the others as
# transformers' class has them when it is given the released sizes, see tests/parity/test_hybrids.py. The vocabularies of
# bamba, granite4h and minimax01 were not read from a released configuration.
RELEASED = {
    "griffin": (256000, 2_682_862_080),
    "jamba": (65536, 51_570_323_328),
    "qwen3_next": (151936, 79_674_391_296),
    "kimi_linear": (163840, 49_122_675_072),
    "lfm2": (65536, 1_170_340_608),
    "gemma3": (262144, 999_885_952),
    "gpt_oss": (201088, 20_914_757_184),
    "olmo_hybrid": (100352, 7_430_870_688),
    "minimax01": (200064, 456_089_655_296),
    "granite4h": (100352, 6_939_037_248),
    "bamba": (128256, 9_780_235_392),
}
# What ours has more, where it differs, as the comments in configs/hybrids.py say.
MORE = {
    "kimi_linear": 26 * 256,  # the bias of each router's choice, which there is no parameter
}
# Places of the layers with full attention, or MLA.
FULL = {
    "jamba": range(4, 32, 8),
    "qwen3_next": range(3, 48, 4),
    "kimi_linear": [3, 7, 11, 15, 19, 23, 26],
    "lfm2": [2, 5, 8, 10, 12, 14],
    "gemma3": range(5, 26, 6),
    "gpt_oss": range(1, 24, 2),
    "olmo_hybrid": range(3, 32, 4),
    "minimax01": range(7, 80, 8),
    "granite4h": range(5, 40, 10),
    "bamba": [9, 18, 27],
}
# Billions of active parameters as published, where it is said, and the parameters that are not counted: of embedding and head.
ACTIVE = {"jamba": (12, 0), "qwen3_next": (3, 2 * 151936 * 2048), "minimax01": (46, 2 * 200064 * 6144)}

# Their architecture in transformers.
LIBRARY = {
    **{
        name: name
        for name in ("jamba", "nemotron_h", "qwen3_next", "kimi_linear", "lfm2", "gpt_oss", "olmo_hybrid", "bamba")
    },
    "gemma3": "gemma3_text",
    "granite4h": "granitemoehybrid",
}


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
    assert accounting.parameter_count(abstract) == parameters + MORE.get(name, 0)
    if name in ACTIVE:
        billions, outside = ACTIVE[name]
        assert round((accounting.active_parameter_count(abstract) - outside) / 1e9) == billions


@pytest.mark.parametrize("name", FULL)
def test_attention_is_where_it_was_released(name):
    items = model(name, 1024).items
    assert [i for i, item in enumerate(items) if {"attention", "mla"} & set(item.mixers)] == list(FULL[name])


def test_nemotron_h_has_its_layers_in_order():
    """As single sublayers, M for Mamba-2, * for attention and - for an MLP, they are those of the 8B model's configuration."""
    config = model("nemotron_h", 131072)
    kinds = {("mamba2",): "M", ("attention",): "*"}
    found = "".join(kinds[item.mixers] + ("-" if item.channel == "relu2" else "") for item in config.items)
    assert found == "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    abstract = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    assert round(accounting.parameter_count(abstract) / 1e8) == 81


@pytest.mark.parametrize(
    "name",
    [name if name in ("lfm2", "granite4h") else pytest.param(name, marks=pytest.mark.thorough) for name in LIBRARY],
)
def test_the_library_has_the_architecture(name):
    """What is trained from a recipe can be written in Hugging Face's format."""
    config = model(name, 1024)
    abstract = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    assert import_hf.from_ours(abstract, config).hf_config["model_type"] == LIBRARY[name]


@pytest.mark.parametrize("name", hybrids.HYBRIDS)
def test_heads_of_the_smaller_sizes(name):
    """Every mixer that has heads has them of 64 channels, whatever the mixer's own defaults are."""
    small = hybrids.get_config(f"name={name},size=small").model
    for mixer in small.mixer.values():
        assert mixer.get("heads") in (None, small.width // 64)
        assert mixer.get("kv_heads") in (None, 1, small.width // 256)


def test_a_size_that_is_not_known_is_refused():
    with pytest.raises(
        ValueError, match=r"a name with size=paper must be one of griffin, jamba, .*, bamba, got 'samba'"
    ):
        hybrids.get_config("name=samba,size=paper")


def test_the_table_has_all():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "mixers.md").read_text()
    table = text.partition("| name | layers |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == list(hybrids.HYBRIDS)
    assert [row[0].strip("`") for row in rows if row[-1] != "–"] == list(hybrids.PAPER)
