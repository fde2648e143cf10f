"""What token ids mean: which tokenizer a checkpoint in Hugging Face's format has, and whether two have the same tokens."""

import pathlib
from typing import Any

import numpy as np

from common.errors import UserError

# Files that say what a checkpoint's tokens are, or that it has some.
UNREAD = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
PROBE = "What is the pass key? The pass key is 71432.\n"


def of_checkpoint(folder: pathlib.Path) -> str | None:
    """The tokenizer in the folder of a checkpoint, by the name that `data.tokenizers` has for it.

    None where there is none that can be read: then `unread` says whether there is another.
    """
    if (folder / "tokenizer.json").is_file():
        return f"file:{folder / 'tokenizer.json'}"
    return f"file:{folder}" if all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) else None


def unread(folder: pathlib.Path) -> pathlib.Path | None:
    """The file that shows that a checkpoint has tokens of its own, where no tokenizer can be read; else None."""
    if of_checkpoint(folder) is not None:
        return None
    return next((folder / name for name in UNREAD if (folder / name).is_file()), None)


def how_to_read(file: pathlib.Path) -> str:
    """What to do about an `unread` file."""
    return (
        f"the model's tokens are those of {file}, which cannot be read here: write them as tokenizer.json beside it "
        f"(transformers.AutoTokenizer.from_pretrained({str(file.parent)!r}).save_pretrained({str(file.parent)!r}))"
    )


def same(one: Any, other: Any) -> bool | None:
    """Whether two ways to cut texts give the same ids, and these stand for the same tokens.

    Args:
      one, other: each a task, or a tokenizer of `data.tokenizers`; None for what has no text.

    Returns:
      the answer; None where one of them has no text that it could be told by.
    """
    known = [getattr(reader, "tokenizer", reader) for reader in (one, other)]
    both = all(hasattr(tokenizer, "vocabulary") for tokenizer in known)
    files = {getattr(tokenizer, "fingerprint", None) for tokenizer in known}
    if both and len(files) == 1 and None not in files:
        return True
    # An id that one of them does not use, or that is no whole character, says nothing.
    if both and any(a != b and None not in (a, b) for a, b in zip(*_tables(*known))):
        return False
    # A tokenizer that lacks some tokens of another, or joins them in another order, cuts those.
    words = (
        [piece for tokenizer in known if hasattr(tokenizer, "pieces") for piece in tokenizer.pieces()] if both else []
    )
    cut = [encode(reader, PROBE + " ".join(words)) for reader in (one, other)]
    if any(ids is None for ids in cut):
        return True if both else None
    return np.array_equal(*cut)


def _tables(one, other):
    """What the ids of two tokenizers stand for: in the spelling of their kind, or of two kinds as text."""
    if type(one) is type(other):
        return one.vocabulary(), other.vocabulary()
    ids = range(min(one.vocab_size, other.vocab_size))
    texts = [[tokenizer.decode([i]) for i in ids] for tokenizer in (one, other)]
    return tuple([None if "\ufffd" in text else text for text in column] for column in texts)


def encode(reader: Any, text: str) -> np.ndarray | None:
    """The token ids of a text; None where a task or a tokenizer has no text, or not all of these characters."""
    try:
        return None if reader is None else reader.encode(text)
    except UserError:
        return None
