"""Runs in Hugging Face's format. (That transformers computes the same is a test of parity.)"""

import json

import pytest
import tokenizers

from common.errors import UserError
from configs import lm
from data.tokenizers import Subword
from evaluation import export
from tests import texts
from training import loop
from training.config import resolve


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """The tests have prepared JAX in their own way."""
    monkeypatch.setattr(export.command, "start", lambda: None)


def test_a_run_that_transformers_lacks(run, tmp_path):
    with pytest.raises(UserError, match="no model of the mixers min_gru"):
        export.export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_tokenizer_travels_along(run, tmp_path):
    """Bytes have no files; a trained tokenizer is written; one from a folder is copied with what lies beside it."""
    assert export.tokenizer_files(run) == {}
    made = tokenizers.Tokenizer(tokenizers.models.BPE())

    tokenizer = Subword.__new__(Subword)
    tokenizer._tokenizer = made

    class Run:
        class config:
            class task:
                resolved = {"tokenizer": "bpe:300"}

    Run.config.task.tokenizer = tokenizer
    assert export.tokenizer_files(Run) == {"tokenizer.json": made.to_str().encode()}
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    Run.config.task.resolved = {"tokenizer": f"file:{tmp_path}/tokenizer.json"}
    expected = {name: name.encode() for name in ("tokenizer.json", "tokenizer_config.json")}
    assert export.tokenizer_files(Run) == expected
    (tmp_path / "gpt2").mkdir()
    for name in ("encoder.json", "vocab.bpe"):  # names that transformers does not read
        (tmp_path / "gpt2" / name).write_text(name)
    Run.config.task.resolved = {"tokenizer": f"file:{tmp_path}/gpt2"}
    assert export.tokenizer_files(Run) == {"tokenizer.json": made.to_str().encode()}


def test_another_tokenizer_is_not_written_beside_the_weights(tmp_path, capsys):
    """One that was trained anew on a changed text, or whose file was replaced; one that is the same goes with the weights."""
    text, file = texts.words(tmp_path / "text.txt"), tmp_path / "tokenizer.json"
    original, arguments = text.read_text(), [str(tmp_path / "run")]
    config = lm.get_config("mixer=mamba")
    config.task.update({"corpus": f"file:{text}", "length": 24, "tokenizer": "bpe:270"})
    config.model.update({"width": 8, "depth": 1, "tie_embeddings": False})
    config.train.update({"steps": 1, "batch_size": 8, "eval_batches": 1})
    config.optimizer.update({"name": "adamw", "warmup_steps": 0})
    loop.train(resolve(config), tmp_path / "run")
    export.main([*arguments, str(tmp_path / "first")])
    trained = (tmp_path / "first" / "tokenizer.json").read_bytes()
    text.write_text(original.upper())
    with pytest.raises(UserError, match=r"the tokenizer that is here is another than .*--allow_other_data"):
        export.main([*arguments, str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
    export.main([*arguments, str(tmp_path / "knowingly"), "--allow_other_data"])
    assert (tmp_path / "knowingly" / "tokenizer.json").read_bytes() != trained
    # A run of older code has no record of its tokenizer: the same data has the same one, and of other data nobody knows.
    environment = tmp_path / "run" / "environment.json"
    (launch,) = json.loads(environment.read_text())
    assert launch.pop("tokenizer")
    environment.write_text(json.dumps([launch]))
    with pytest.raises(UserError, match="may be another"):
        export.main([*arguments, str(tmp_path / "refused")])
    text.write_text(original)
    export.main([*arguments, str(tmp_path / "again")])
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == trained
    # Where the file is the same, the text may have changed.
    file.write_bytes(trained)
    config.task.tokenizer = f"file:{file}"
    loop.train(resolve(config), tmp_path / "other")
    text.write_text(original.upper())
    export.main([str(tmp_path / "other"), str(tmp_path / "kept")])
    assert (tmp_path / "kept" / "tokenizer.json").read_bytes() == trained
    assert "going on with it" in capsys.readouterr().out
