"""Hugging Face checkpoints of random models: logits at once and token by token, and the way there and back."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import import_hf
from models.config import ModelConfig
from models.import_hf.architecture import NEUTRAL, Options
from models.import_hf.architectures import ARCHITECTURES
from models.sequence_model import SequenceModel
from tests.parity.hf_models import MODELS, SIZES
from tests.parity.oracles import load
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity

AGAINST = "transformers, whole models"
LENGTH, PREFILL = 19, 11
OF_OURS = [
    name for name in MODELS if name not in ("mamba", "mamba2_tied", "rwkv_pieces", "recurrent_gemma_ragged", "llama")
]
STEPPED = [
    *("mamba", "mamba2", "rwkv", "recurrent_gemma", "llama", "qwen3", "ministral", "phi3"),
    *("gemma3", "lfm2", "qwen3_next", "gpt_oss", "falcon_h1"),
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
    "lfm2",
    "qwen3_next",
    "gpt_oss",
    "jamba",
    "nemotron_h",
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
            # "eager" has the caps of scores and the sinks.
            config = transformers.CONFIG_MAPPING[kind](**SIZES | options)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                biases = [a for key, a in model.named_buffers() if key.endswith("e_score_correction_bias")]
                for parameter in (*model.parameters(), *biases):  # zeros and ones would hide errors
                    parameter += 0.1 * torch.randn(parameter.shape)
            how = dict(how)
            model = model.to(getattr(torch, how.pop("dtype", "float32")))
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory, **how)
            read = type(model).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
            made[name] = read.eval(), directory
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


@pytest.mark.parametrize("name", STEPPED)
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


def test_four_bits(tmp_path):
    """Experts in MXFP4, as gpt-oss's release has them, are what the library makes of them, and are written in bfloat16."""
    torch, transformers = load("torch"), load("transformers")
    module, save_file = load("transformers.integrations.mxfp4"), load("safetensors.torch").save_file
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 3}
    options |= {"num_hidden_layers": 1, "num_experts_per_tok": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING["gpt_oss"](**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stored = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    unpacked = dict(stored)
    for name, groups in (("gate_up_proj", 1), ("down_proj", 2)):
        name = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(0, 256, (3, stored.pop(name).shape[2], groups, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, blocks.shape[:-1], dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked[name] = module.convert_moe_packed_tensors(blocks, scales)
    model.load_state_dict(unpacked)
    with torch.no_grad():
        expected = model(torch.tensor(IDS), use_cache=False).logits.numpy()
    save_file(stored, tmp_path / "model.safetensors")
    described = json.loads(config.to_json_string()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    read = import_hf.load(tmp_path)
    assert_close(ours(read.model, jnp.asarray(IDS))[0], expected, 1e-4)
    import_hf.save(tmp_path / "copy", read)
    copy = load("safetensors.torch").load_file(tmp_path / "copy" / "model.safetensors")
    assert copy.keys() == unpacked.keys()
    assert all(torch.equal(copy[name], tensor) for name, tensor in unpacked.items())
    assert import_hf.load(tmp_path / "copy").config == read.config


def tensors(directory):
    load("safetensors")
    from safetensors.numpy import load_file

    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, written, tmp_path):
    """What is written again has the same tensors, bit for bit, and the same config.json."""
    _, directory = written(name)
    import_hf.save(tmp_path / "copy", import_hf.load(directory))
    buffers = ARCHITECTURES[MODELS[name][0]].buffers
    before, after = tensors(directory), tensors(tmp_path / "copy")
    before = {key: value for key, value in before.items() if value.size and not key.endswith(buffers)}
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
    read_again = transformers.AutoModelForCausalLM.from_pretrained
    theirs = read_again(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), use_cache=False).logits.numpy()
    assert_close(ours(read.model, jnp.asarray(IDS))[0], expected, 1e-4)


@pytest.mark.parametrize("name", ["kimi_linear", "nemotron_h"])
def test_a_tied_model_of_ours(name, written, tmp_path):
    """A class that does not tie finds the embedding where it has the head."""
    torch, transformers = load("torch"), load("transformers")
    config = dataclasses.replace(import_hf.load(written(name)[1]).config, tie_embeddings=True)
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    import_hf.save(tmp_path / "ours", import_hf.from_ours(model, config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), use_cache=False).logits.numpy()
    assert_close(ours(model, jnp.asarray(IDS))[0], expected, 1e-4)
    assert_close(ours(import_hf.load(tmp_path / "ours").model, jnp.asarray(IDS))[0], expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "width", "mixer", "more"),
    [
        ("bamba", 48, {"rotary_fraction": 0.5, "heads": 4}, {}),
        ("granitemoehybrid", 48, {"positions": "nope", "heads": 4}, {"branch_scale": 0.5}),
        ("ministral", 30, {"heads": 4, "head_channels": 8}, {}),
    ],
)
def test_attention_alone_is_written_as_what_the_library_takes(name, width, mixer, more, tmp_path):
    """Bamba and Granite check sizes of a Mamba-2 that is not there, and Llama refuses heads that do not divide the width."""
    torch, transformers = load("torch"), load("transformers")
    mixer = {"qk_norm": False, "qkv_bias": False, "bias": False} | mixer
    config = ModelConfig(
        SIZES["vocab_size"],
        SIZES["vocab_size"],
        width=width,
        depth=2,
        mixer={"attention": mixer},
        position_embedding="none",
        **more,
    )
    model = SequenceModel(config, rngs=nnx.Rngs(0))
    checkpoint = import_hf.from_ours(model, config)
    assert checkpoint.hf_config["model_type"] == name
    import_hf.save(tmp_path / "ours", checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), use_cache=False).logits.numpy()
    assert_close(ours(model, jnp.asarray(IDS))[0], expected, 1e-4)


def plain(value):
    """As JSON has it, with what is written for infinity."""
    return json.loads(json.dumps(value).replace('{"__float__": "Infinity"}', "Infinity"))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults(kind):
    """Every default is the class's own, and every option of the class is known."""
    transformers = load("transformers")
    architecture = ARCHITECTURES[kind]
    config = transformers.CONFIG_MAPPING[kind]()
    options = json.loads(config.to_json_string(use_diff=False))
    rope = options.pop("rope_parameters", None) or {}
    if "full_attention" in rope:  # and other frequencies where layers see a window
        options |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]} if kind == "gemma3_text" else {}
        rope = rope["full_attention"]
    options |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor") if key in architecture.defaults}
    older = {  # which the class does not have, or only as another name
        *("rms_norm", "ssm_cfg", "embeddings_scale_by_sqrt_dim", "sliding_window_pattern", "full_attention_interval"),
        *("use_sliding_window", "block_ff_dim", "tie_embedding", "mamba_inner_layernorms", "normalization_function"),
        *("sliding_window", "hybrid_override_pattern", "linear_attn_config", "first_k_dense_replace", "mla_use_nope"),
        *("moe_layer_freq", "moe_router_activation_func", "num_nextn_predict_layers", "head_dim"),
    }
    older -= set(options)
    derived = {  # which the class fills in from others
        "intermediate_size": {"mamba": config.hidden_size * 2, "rwkv": config.hidden_size * 4},
        "attention_hidden_size": {"rwkv": config.hidden_size},
        "lru_width": {"recurrent_gemma": config.hidden_size},
        "num_key_value_heads": {
            "recurrent_gemma": 10,
            "llama": 32,
            "phi3": 32,
            "olmo2": 32,
            "olmo3": 32,
            "granitemoehybrid": 32,
            "olmo_hybrid": 30,
        },
        "head_dim": {"recurrent_gemma": 256, "llama": 128, "mistral": 128},
        "time_step_rank": {"mamba": 48},
        "mamba_d_head": {"bamba": 64, "granitemoehybrid": 64, "falcon_h1": 8},
        "mlp_layer_types": {"kimi_linear": ["dense"] + ["sparse"] * 26},
        "linear_num_key_heads": {"olmo_hybrid": 30},
        "linear_num_value_heads": {"olmo_hybrid": 30},
        "linear_key_head_dim": {"olmo_hybrid": 96},
        "linear_value_head_dim": {"olmo_hybrid": 192},
        "mlp_multipliers": {"falcon_h1": [1.0] * 2},
        "ssm_multipliers": {"falcon_h1": [1.0] * 5},
        "mamba_dt_rank": {"jamba": 256},
        "mlp_only_layers": {"qwen3_next": []},
        "full_attn_idxs": {"lfm2": list(range(32))},
    }
    for key, default in architecture.defaults.items():
        expected = derived.get(key, {}).get(kind, default)
        if key not in older and (key != "layer_types" or default is not None):
            assert plain(options[key]) == plain(expected), key
    known = {*architecture.defaults, *NEUTRAL, *architecture.neutral, "is_decoder", "is_encoder_decoder"}
    assert set(options) <= known
    ours = [item.mixers for item in architecture.config(Options({}, pathlib.Path(kind), architecture)).items]
    theirs = getattr(config, "layer_types", None) or [None] * len(ours)
    if kind == "nemotron_h":  # whose MLPs are layers
        theirs = [layer for layer in theirs if layer not in ("mlp", "moe")]
    assert len(ours) == len(theirs) and len(set(ours)) == len(set(zip(ours, theirs, strict=True)))


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
    standard = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
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
