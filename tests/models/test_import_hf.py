"""Checkpoints in Hugging Face's format that do not fit. (That those which do compute the same is a test of parity.)"""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from models import import_hf

CONFIG = {
    "model_type": "mamba",
    "vocab_size": 10,
    "hidden_size": 8,
    "state_size": 4,
    "num_hidden_layers": 2,
    "time_step_rank": 2,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
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


def test_an_existing_directory_is_left_alone(directory):
    with pytest.raises(FileExistsError, match="exists"):
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
        ({"model_type": "gpt2"}, "'gpt2'; supported are mamba"),
        ({"use_bias": True}, "use_bias=True is not supported"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
    ],
)
def test_options_that_we_lack(directory, options, message):
    (directory / "config.json").write_text(json.dumps(CONFIG | options))
    with pytest.raises(ValueError, match=message):
        import_hf.load(directory)


def test_files_that_are_not_there(directory):
    """Pickles are never read; a damaged file is named."""
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is no safetensors file"):
        import_hf.load(directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model.bin are pickles"):
        import_hf.load(directory)
