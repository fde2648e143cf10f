"""Hugging Face checkpoints of random models: logits at once and token by token, and the way there and back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import import_hf
from models.import_hf.architecture import NEUTRAL
from models.import_hf.architectures import ARCHITECTURES
from tests.parity.oracles import load
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity

AGAINST = "transformers, whole models"
LENGTH, PREFILL = 19, 11
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3}
HALF = {"dtype": "float16"}
PIECES = {"dtype": "bfloat16", "max_shard_size": "10KB"}
MLP = {"intermediate_size": 48}
MODELS = {  # class, options beside SIZES, how it is written
    "mamba": ("Mamba", {"state_size": 8}, {}),
    "mamba_untied": ("Mamba", {"state_size": 5, "hidden_size": 20, "expand": 3, "tie_word_embeddings": False}, PIECES),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8}, {}),
    "mamba2_tied": (
        "Mamba2",
        {"state_size": 6, "num_heads": 6, "head_dim": 8, "hidden_size": 24, "n_groups": 1, "tie_word_embeddings": True},
        HALF,
    ),
    "rwkv": (
        "Rwkv",
        {"hidden_size": 22, "intermediate_size": 30, "layer_norm_epsilon": 0.1, "rescale_every": 0},
        {},
    ),
    "rwkv_pieces": ("Rwkv", {"rescale_every": 2}, PIECES),  # eps is small enough for it to be neutral
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 96,
            "attention_window_size": 6,
            "partial_rotary_factor": 0.25,
        },
        {},
    ),
    "recurrent_gemma_ragged": (  # the layers are no whole number of patterns
        "RecurrentGemma",
        {"num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 70, "lru_width": 46},
        PIECES,
    ),
    "llama": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 50},
        {},
    ),
    "llama_tied": (
        "Llama",
        {"num_attention_heads": 4, "intermediate_size": 33, "tie_word_embeddings": True, "rope_theta": 500.0},
        PIECES,
    ),
    "llama3": (
        "Llama",
        {
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {},
    ),
    "mistral": ("Mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5} | MLP, {}),
    "mistral_full": ("Mistral", {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": None} | MLP, {}),
    "ministral": (
        "Ministral",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
        | MLP,
        {},
    ),
    "gemma": ("Gemma", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12} | MLP, PIECES),
    "phi3": (
        "Phi3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 6,
            "partial_rotary_factor": 0.5,
            "pad_token_id": 0,
        }
        | MLP,
        {},
    ),
    "qwen2": (
        "Qwen2",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        }
        | MLP,
        HALF,
    ),
    "qwen3": (
        "Qwen3",
        {
            "rms_norm_eps": 1e-5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
        },
        HALF,
    ),
}
OF_OURS = [
    name for name in MODELS if name not in ("mamba", "mamba2_tied", "rwkv_pieces", "recurrent_gemma_ragged", "llama")
]
LEFT_OUT = [
    "mamba",
    "mamba2_tied",
    "rwkv_pieces",
    "recurrent_gemma",
    "llama",
    "qwen3",
    "qwen2",
    "mistral",
    "gemma",
    "phi3",
]
IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, LENGTH))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Makes, perturbs and writes a model of the library, once: (model in float32, directory)."""
    made = {}

    def make(name):
        if name not in made:
            torch, transformers = load("torch"), load("transformers")
            kind, options, how = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(
                getattr(transformers, f"{kind}Config")(**SIZES | options)
            ).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # zeros and ones would hide errors
                    parameter += 0.1 * torch.randn(parameter.shape)
            how = dict(how)
            model = model.to(getattr(torch, how.pop("dtype", "float32")))
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory, **how)
            made[name] = type(model).from_pretrained(directory, dtype=torch.float32).eval(), directory
        return made[name]

    return make


@nnx.jit
def ours(model, ids, carry=None):
    return model(ids, carry)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, written):
    """The library's model, read by us, scores as it does there: at once, and a piece and then single tokens with a carry."""
    torch = load("torch")
    model, directory = written(name)
    with torch.no_grad():
        expected = model(torch.tensor(IDS), use_cache=False).logits.numpy()
    read = import_hf.load(directory)
    assert_close(ours(read.model, jnp.asarray(IDS))[0], expected, 1e-4)
    carry = read.model.initial_carry(len(IDS), LENGTH)
    pieces = []
    for piece in np.split(IDS, range(PREFILL, LENGTH), axis=1):
        logits, carry = ours(read.model, jnp.asarray(piece), carry)
        pieces.append(logits)
    assert_close(jnp.concatenate(pieces, 1), expected, 1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "recurrent_gemma", "llama", "qwen3", "ministral", "phi3"])
def test_steps(name, written):
    """What the library's own decoding scores, token by token with its cache, is what we score."""
    torch, transformers = load("torch"), load("transformers")
    model, directory = written(name)
    key = {"mamba": "cache_params", "mamba2": "cache_params", "rwkv": "state"}.get(name, "past_key_values")
    cache = {key: transformers.DynamicCache(config=model.config)} if key == "past_key_values" else {}
    expected = []
    with torch.no_grad():  # a single row: with more, the library's RWKV mixes them
        for piece in np.split(IDS[:1], range(PREFILL, LENGTH), axis=1):
            out = model(torch.tensor(piece), use_cache=True, **cache)
            cache = cache if key == "past_key_values" else {key: out[key]}
            expected.append(out.logits.numpy())
    found, _ = ours(import_hf.load(directory).model, jnp.asarray(IDS))
    assert_close(found[:1], np.concatenate(expected, 1), 1e-4)


def tensors(directory):
    load("safetensors")
    from safetensors.numpy import load_file

    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, written, tmp_path):
    """What is written again has the same tensors, bit for bit, and the same config.json."""
    _, directory = written(name)
    import_hf.save(tmp_path / "copy", import_hf.load(directory))
    before, after = tensors(directory), tensors(tmp_path / "copy")
    assert set(before) == set(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype and value.tobytes() == after[key].tobytes(), key
    assert json.loads((directory / "config.json").read_text()) == json.loads(
        (tmp_path / "copy" / "config.json").read_text()
    )


@pytest.mark.parametrize(
    "name",
    OF_OURS,
)
def test_a_model_of_ours(name, written, tmp_path):
    """A model of our configuration, without the library's config.json, is written so that the library computes the same."""
    torch, transformers = load("torch"), load("transformers")
    read = import_hf.load(written(name)[1])
    import_hf.save(tmp_path / "ours", import_hf.from_ours(read.model, read.config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), use_cache=False).logits.numpy()
    assert_close(ours(read.model, jnp.asarray(IDS))[0], expected, 1e-4)


def plain(value):
    """As JSON has it, with what is written for infinity."""
    return json.loads(json.dumps(value).replace('{"__float__": "Infinity"}', "Infinity"))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults(kind):
    """Every default is the class's own, and every option of the class is known."""
    transformers = load("transformers")
    architecture = ARCHITECTURES[kind]
    config = getattr(transformers, architecture.name.replace("ForCausalLM", "Config"))()
    options = json.loads(config.to_json_string(use_diff=False))
    rope = options.pop("rope_parameters", {})
    options |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor") if key in architecture.defaults}
    older = {"rms_norm", "ssm_cfg", "embeddings_scale_by_sqrt_dim"}  # which the class does not read
    derived = {  # which the class fills in from others
        "intermediate_size": {"mamba": config.hidden_size * 2, "rwkv": config.hidden_size * 4},
        "attention_hidden_size": {"rwkv": config.hidden_size},
        "lru_width": {"recurrent_gemma": config.hidden_size},
        "num_key_value_heads": {"recurrent_gemma": 10, "llama": 32, "phi3": 32},
        "head_dim": {"recurrent_gemma": 256, "llama": 128, "mistral": 128},
        "time_step_rank": {"mamba": 48},
        "layer_types": {
            "qwen2": ["full_attention"] * 32,
            "qwen3": ["full_attention"] * 32,
            "ministral": ["sliding_attention"] * 32,
        },
    }
    for key, default in architecture.defaults.items():
        expected = derived.get(key, {}).get(kind, default)
        if key not in older:
            assert plain(options[key]) == plain(expected), key
    known = {*architecture.defaults, *NEUTRAL, *architecture.neutral, "is_decoder", "is_encoder_decoder"}
    assert set(options) <= known


@pytest.mark.parametrize(
    "name",
    LEFT_OUT,
)
def test_what_is_left_out(name, written, tmp_path):
    """A config.json as it is published, without what equals the class's defaults, is the same model; so is one with the names
    of older versions."""
    transformers = load("transformers")
    _, directory = written(name)
    path = directory / "config.json"
    options = json.loads(path.read_text())
    kind = options["model_type"]
    expected = import_hf.read_config(directory)
    standard = json.loads(getattr(transformers, f"{MODELS[name][0]}Config")().to_json_string(use_diff=False))
    short = {k: v for k, v in options.items() if v != standard.get(k, "absent")} | {"model_type": kind}
    older = dict(options)
    rope = dict(older.pop("rope_parameters", {}))
    older |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    older |= (
        {"rope_scaling": {"type": rope.pop("rope_type"), **rope}}
        if rope.get("rope_type", "default") != "default"
        else {}
    )
    older["torch_dtype"] = older.pop("dtype")
    older |= {"rope_scaling": None} if kind == "llama" else {}
    try:
        for changed in (short, older):
            path.write_text(json.dumps(changed))
            assert import_hf.read_config(directory) == expected
    finally:
        path.write_text(json.dumps(options, indent=2))
