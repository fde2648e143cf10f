"""Checkpoints in Hugging Face's format that do not fit. (That those which do compute the same is a test of parity.)"""

import dataclasses
import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from common import marks
from common.errors import UserError
from models import import_hf
from models.checks import scaled
from models.config import ModelConfig
from models.import_hf import catalogue, mxfp4
from models.import_hf.architecture import arranged
from models.sequence_model import SequenceModel

CONFIG = {
    "model_type": "mamba",
    "vocab_size": 10,
    "hidden_size": 8,
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 2,
    "layer_norm_epsilon": 1e-5,
}


@pytest.fixture
def directory(tmp_path):
    """A Mamba of two layers, written by hand in the library's names and shapes."""
    shapes = {
        "norm.weight": (8,),
        "mixer.in_proj.weight": (32, 8),
        "mixer.conv1d.weight": (16, 1, 4),
        "mixer.conv1d.bias": (16,),
        "mixer.x_proj.weight": (10, 16),
        "mixer.dt_proj.weight": (16, 2),
        "mixer.dt_proj.bias": (16,),
        "mixer.A_log": (16, 4),
        "mixer.D": (16,),
        "mixer.out_proj.weight": (8, 16),
    }
    shapes = {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    shapes |= {"backbone.embeddings.weight": (10, 8), "backbone.norm_f.weight": (8,)}
    numbers = np.random.default_rng(0)
    tensors = {name: numbers.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, source / "model.safetensors")
    return source


def change(directory, **changes):
    """Replaces tensors (None removes one) and returns all of them."""
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


def test_bfloat16_and_pieces(directory, tmp_path):
    """Tensors in several files and in bfloat16 are read, and written back in bfloat16, exactly."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, directory / f"part-{i}.safetensors")
        weight_map |= {name: f"part-{i}.safetensors" for name in names[i::2]}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_hf.save(tmp_path / "copy", import_hf.load(directory))
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    for name, tensor in tensors.items():
        assert copy[name].dtype == tensor.dtype and copy[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize(
    "name, content",
    [("config.json", "[]"), ("config.json", "{"), ("model.safetensors.index.json", '{"weight_map": [1]}')],
)
def test_damaged_files(directory, name, content):
    (directory / name).write_text(content)
    if name.endswith(".index.json"):  # which the library, too, reads where there is no file for all
        import_hf.load(directory)
        (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=re.escape(str(directory / name))):
        import_hf.load(directory)


def test_types_that_are_not_read(directory):
    """float8 has no type in NumPy; empty tensors are of experts that are not there."""
    torch = pytest.importorskip("torch", reason="writes a type that NumPy lacks")
    from safetensors.torch import load_file as load_tensors
    from safetensors.torch import save_file as save_tensors

    tensors = load_tensors(directory / "model.safetensors")
    save_tensors(tensors | {"empty": torch.zeros(0, 3)}, directory / "model.safetensors")
    import_hf.load(directory)
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"].to(torch.float8_e4m3fn)
    save_tensors(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"'backbone\.norm_f\.weight' in .* is of type F8_E4M3, which is not read"):
        import_hf.load(directory)


def test_an_existing_directory_is_left_alone(directory):
    with pytest.raises(UserError, match="exists"):
        import_hf.save(directory, import_hf.load(directory))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"backbone__norm_f__weight": None}, "1 missing: backbone.norm_f.weight"),
        ({"extra": np.ones(2)}, "1 left over: extra"),
        ({"backbone__norm_f__weight": np.ones(9)}, r"'backbone.norm_f.weight' .* shape \(9,\); expected \(8,\)"),
    ],
)
def test_tensors_that_do_not_fit(directory, changes, message):
    change(directory, **changes)
    with pytest.raises(ValueError, match=message):
        import_hf.load(directory)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"model_type": "gpt2"}, "'gpt2'; supported are bamba, falcon_h1, gemma"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config says .* convert them to bfloat16"),
        ({"use_bias": True}, "use_bias=True is not supported"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"num_attention_heads": 4, "gated": 1}, "nobody reads gated, num_attention_heads"),
        ({"hidden_size": 9}, r"has the shape .* expected"),
    ],
)
def test_options_that_we_lack(directory, options, message):
    (directory / "config.json").write_text(json.dumps(CONFIG | options))
    with pytest.raises(ValueError, match=message):
        import_hf.load(directory)


def test_four_bits():
    """A byte is two numbers, the lower half first; a scale of 127 is 1, and every 32 numbers have their own."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 2, 8, 16)
    scales = np.full((1, 2, 8), 127, np.uint8)
    scales[0, 1, 7] = 120
    found = mxfp4.dequantised(blocks, scales, "x")
    assert found.shape == (1, 256, 2) and found.dtype == ml_dtypes.bfloat16
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    of = lambda half: (-1) ** (half >> 3) * magnitudes[half & 7]
    expected = np.array([[of(byte & 15), of(byte >> 4)] for byte in range(256)], np.float32).reshape(2, 256)
    expected[1, -32:] /= 128
    np.testing.assert_array_equal(found[0].T.astype(np.float32), expected)
    assert mxfp4.joined(["a_blocks", "a_scales", "b_blocks", "c"]) == {"a", "b_blocks", "c"}
    with pytest.raises(UserError, match=r"x: blocks .* are not those of a tensor in MXFP4"):
        mxfp4.dequantised(blocks, scales[:, :1], "x")


def test_files_that_are_not_there(directory):
    """Pickles are never read; a damaged file is named."""
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is no safetensors file"):
        import_hf.load(directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model.bin are pickles"):
        import_hf.load(directory)


def test_the_page_has_all():
    """Run `python -m models.import_hf.catalogue docs/weights.md` after adding an architecture."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    assert marks.insert(page, catalogue.NAME, catalogue.table()) == page


def test_arrangement():
    """As many blocks as possible are repeats, and together they are the blocks."""
    cases = {
        "aaaa": ("", "a", ""),
        "aabaabaab": ("", "aab", ""),
        "aabaabaa": ("", "aab", "aa"),
        "caabaabd": ("c", "aab", "d"),
        "abcd": ("", "abcd", ""),
    }
    for blocks, expected in cases.items():
        found = arranged(list(blocks))
        assert tuple("".join(found[key]) for key in ("prefix", "pattern", "suffix")) == expected


def test_which_architecture_a_model_is_written_as():
    """A Llama stays one, though others that have more mixers compute the same without them."""
    config = ModelConfig(
        **{
            "vocab_size": 9,
            "targets": 9,
            "width": 8,
            "depth": 2,
            "norm_eps": 1e-5,
            "mixer": {"attention": {"heads": 2}},
        }
    )
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    assert import_hf.from_ours(model, config).hf_config["model_type"] == "llama"
    odd = dataclasses.replace(config, norm_position="post")
    with pytest.raises(UserError, match=r"llama is another model: model\.norm_position='post' where it has 'pre'"):
        import_hf.from_ours(model, odd)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {}, "x": 1}},
            r"nobody reads rope_parameters\.x",
        ),
        ({"model_type": "olmo3", "layer_types": ["chunked"], "num_hidden_layers": 1}, "layer_types has 'chunked'"),
        ({"model_type": "kimi_linear", "layer_types": ["full_attention"]}, "layer_types has 1 entries for the 27"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "only 'default'"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.262}, "a head's 96 channels pairs to rotate"),
        ({"model_type": "bamba", "hidden_size": 192}, "a head's 6 channels pairs to rotate"),
        (
            {"model_type": "minimax", "rope_parameters": {"partial_rotary_factor": 0.5}},
            r"rope_parameters\.partial_rotary_factor=0\.5",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            r"nobody reads rope_parameters\.factor",
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"full_attention": {"rope_type": "yarn", "truncate": False}}},
            r"nobody reads rope_parameters\.full_attention\.truncate",
        ),
        ({"model_type": "gemma2", "num_attention_heads": 7}, "hidden_size=2304 must be a multiple"),
        ({"model_type": "nemotron_h", "time_step_limit": [0.1, 1.0]}, "time_step_limit"),
        (
            {"model_type": "lfm2", "full_attn_idxs": [0], "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"model_type": "qwen3_next", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        ({"model_type": "jamba", "mamba_proj_bias": True}, "mamba_proj_bias=True"),
        ({"model_type": "jamba", "rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ({"model_type": "bamba", "time_step_limit": [1.0, 0.01]}, "the least step size and the largest"),
        ({"model_type": "mamba2", "time_step_limit": [0.0]}, "the least step size and the largest"),
        ({"model_type": "bamba", "mamba_d_head": 32}, "mamba_n_heads=128 times mamba_d_head=32"),
        ({"model_type": "granitemoehybrid", "position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
        ({"model_type": "falcon_h1", "projectors_bias": True}, "projectors_bias=True"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M--"}, "an MLP or experts behind each mixer"),
        ({"model_type": "nemotron_h", "moe_latent_size": 64}, "moe_latent_size=64"),
        ({"model_type": "olmo_hybrid", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "minimax", "mlp_beta_factor": 2.0}, "mlp_beta_factor=2.0"),
        ({"model_type": "kimi_linear", "mla_use_nope": False}, "mla_use_nope=False"),
        ({"model_type": "kimi_linear", "linear_attn_config": {"gate_lower_bound": -5.0}}, "linear_attn_config="),
    ],
)
def test_options_of_hybrids_that_we_lack(tmp_path, options, message):
    (tmp_path / "config.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match=message):
        import_hf.read_config(tmp_path)


LLAMA = {"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
            r"rope_scaling\.rope_type='dynamic' is not supported",
        ),
        ({"rope_scaling": {"type": "longrope"}}, r"rope_scaling\.type='longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: .*yarn needs original_length"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"nobody reads rope_parameters\.factor"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ({"rope_parameters": {"rope_theta": None}}, r"rope_parameters\.rope_theta is null"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "in two ways"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' must be an object"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be more than 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be more than 0"),
        ({"hidden_size": "8"}, "hidden_size='8' must be such as 4096"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be such as 1e-06"),
        ({"attention_bias": 1}, "attention_bias=1 must be such as False"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be such as 32"),
        ({"hidden_act": None}, "hidden_act is null"),
        ({"hidden_size": 9, "head_dim": 4}, "hidden_size=9 must be a multiple of num_attention_heads=2"),
    ],
)
def test_rotary_options_that_we_lack(tmp_path, options, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | options))
    with pytest.raises(UserError, match=message):
        import_hf.read_config(tmp_path)


def test_a_stored_head_is_the_head(directory):
    """One that repeats the embedding is tied, another is used, whatever config.json says."""
    embedding = load_file(directory / "model.safetensors")["backbone.embeddings.weight"]
    change(directory, lm_head__weight=embedding)
    assert import_hf.load(directory).config.tie_embeddings
    change(directory, lm_head__weight=-embedding)
    checkpoint = import_hf.load(directory)
    assert not checkpoint.config.tie_embeddings and not import_hf.read_config(directory).tie_embeddings
    np.testing.assert_array_equal(checkpoint.model.head[...], -embedding.astype(np.float32).T)


def test_what_travels_along_and_what_is_ignored(directory, tmp_path):
    """The tokenizer's files are copied; buffers that some writers store are no tensors of the model."""
    change(directory, **{"backbone__layers__0__rotary_emb__inv_freq": np.ones(2, np.float32)})
    (directory / "tokenizer.json").write_text("{}")
    (directory / "weights.bin").write_text("")
    import_hf.save(tmp_path / "copy", import_hf.load(directory))
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_models_that_transformers_lacks():
    """What differs is named; what says nothing about a trained model may differ."""
    config = ModelConfig(vocab_size=9, targets=9, width=8, depth=2, pattern=("mamba",), length=7, dropout=0.1)

    def write(**changes):
        changed = dataclasses.replace(config, **changes)
        return import_hf.from_ours(nnx.eval_shape(lambda: SequenceModel(changed, rngs=nnx.Rngs(0))), changed)

    options = write(mixer={"mamba": {"dt_min": 0.01, "expand": 1.5}}).hf_config
    assert options["intermediate_size"] == 12 and options["time_step_min"] == 0.01
    with pytest.raises(UserError, match=r"mamba is another model: model\.norm='layernorm' where it has 'rmsnorm'"):
        write(norm="layernorm", norm_eps=1e-6)
    with pytest.raises(UserError, match="no model of the mixers gla"):
        write(pattern=("gla",))
    language = "architectures that we know are language models, and this is a model"
    with pytest.raises(UserError, match=f"{language} whose inputs are real numbers$"):
        write(vocab_size=None, channels=2, tie_embeddings=False)
    for changes in ({"head": "pooled"}, {"loss": "squared"}):
        with pytest.raises(UserError, match=f"{language} that gives no scores of tokens$"):
            write(tie_embeddings=False, **changes)


def test_every_size_has_a_ratio():
    """A ratio of two sizes gives back the size, and a product that is no whole number is rounded down as before."""
    for width in range(1, 60):
        for size in range(1, 3 * width):
            assert scaled(width, expand=size / width) == size
    assert scaled(85, expand=1.1) == 93 and scaled(10, expand=0.99) == 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json is no JSON"),
        ("config.json", "[1]", r"config\.json is no JSON object but '\[1\]'"),
        (
            "config.json",
            '{"task": {}, "model": {}, "train": {}}',
            r"but a run: .*--init_from=/.* without hf:.*--workdir=/",
        ),
        ("model.safetensors.index.json", "{", r"index\.json is no JSON"),
        ("model.safetensors.index.json", "{}", r"index\.json has no 'weight_map'"),
    ],
)
def test_files_that_are_damaged(name, content, message, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "mamba", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1}'
    )
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        import_hf.load(tmp_path)
