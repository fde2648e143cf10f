"""Hugging Face checkpoints of random models: logits, and the way there and back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import import_hf
from tests.parity.oracles import load
from tests.tolerance import assert_close

pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3}
MODELS = {
    "mamba": ("Mamba", {"state_size": 8}),
    "mamba2": ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8}),
    "rwkv": ("Rwkv", {"rescale_every": 0}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 96, "attention_window_size": 6},
    ),
    "recurrent_gemma_ragged": (  # the layers are no whole number of patterns
        "RecurrentGemma",
        {"num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 64, "lru_width": 48},
    ),
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 50}),
    "qwen3": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Makes, perturbs and writes a model of the library, once: (model, directory)."""
    made = {}

    def make(name):
        if name not in made:
            torch, transformers = load("torch"), load("transformers")
            kind, options = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForCausalLM")(
                getattr(transformers, f"{kind}Config")(**SIZES | options)
            ).eval()
            with torch.no_grad():
                for parameter in model.parameters():  # zeros and ones would hide errors
                    parameter += 0.1 * torch.randn(parameter.shape)
            directory = tmp_path_factory.mktemp(name)
            model.save_pretrained(directory, safe_serialization=True)
            made[name] = model, directory
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, written):
    """The library's model, read by us, scores as it does there."""
    torch = load("torch")
    model, directory = written(name)
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 19))
    with torch.no_grad():
        expected = model(torch.tensor(ids), use_cache=False).logits.numpy()
    checkpoint = import_hf.load(directory)
    found, _ = nnx.jit(lambda model, ids: model(ids))(checkpoint.model, jnp.asarray(ids))
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, written, tmp_path):
    """What is written again has the same tensors, bit for bit, and the library reads it."""
    load("safetensors")
    from safetensors.numpy import load_file

    _, directory = written(name)
    import_hf.save(tmp_path / "copy", import_hf.load(directory))
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "copy"))
    assert set(before) == set(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype and value.tobytes() == after[key].tobytes(), key
    assert json.loads((directory / "config.json").read_text()) == json.loads(
        (tmp_path / "copy" / "config.json").read_text()
    )
