"""Runs in Hugging Face's format. (That transformers computes the same is a test of parity.)"""

import pytest
import tokenizers

from common.errors import UserError
from data.tokenizers import Subword
from evaluation import export


def test_a_run_that_transformers_lacks(run, tmp_path):
    with pytest.raises(UserError, match="no model of the mixers min_gru"):
        export.export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_tokenizer_travels_along(run, tmp_path):
    """Bytes have no files; a trained tokenizer is written; one from a folder is copied with what lies beside it."""
    assert export.tokenizer_files(run) == {}
    made = tokenizers.Tokenizer(tokenizers.models.BPE())

    class Tokens:
        name, tokenizer = "bpe:300", Subword.__new__(Subword)

    class Run:
        class config:
            class task:
                tokens = Tokens

    Tokens.tokenizer._tokenizer = made
    assert export.tokenizer_files(Run) == {"tokenizer.json": made.to_str().encode()}
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / name).write_text(name)
    Tokens.name = f"file:{tmp_path}/tokenizer.json"
    expected = {name: name.encode() for name in ("tokenizer.json", "tokenizer_config.json")}
    assert export.tokenizer_files(Run) == expected
