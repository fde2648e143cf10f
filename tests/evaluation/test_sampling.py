"""Text from a checkpoint: what is drawn, what is kept, and what cannot be."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from common.errors import UserError
from data.tokenizers import Subword
from evaluation import sampling
from evaluation.loading import load

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker trains the run


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """The run with a `samples/` of its own."""
    folder = tmp_path_factory.mktemp("sampling") / "run"
    folder.mkdir()
    for path in trained.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def loaded(workdir):
    return load(workdir, "latest")


class Drawn:
    """Settings in place of what a model would say, so that nothing is compiled."""

    def __init__(self, call, initial_carry, **settings):
        self.settings = settings

    def __call__(self, params, prompts, length, seeds, *, segment_ids=None, see=None):
        texts = [f"{length} {seed} {self.settings}".ljust(80).encode() for seed in seeds]
        tokens = np.array([list(text) for text in texts])
        for token in tokens.T:
            if see(token):
                break
        return tokens, {"prefill_seconds": 0.0, "tokens_per_second": 0.0}


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(sampling, "Generator", Drawn)


def sample(run, prompt, length, **settings):
    (text,) = sampling.sample(run, [prompt], length, **settings)
    return text


def test_samples_are_reproducible(loaded):
    """Alone, and beside other prompts and samples, which are padded to one length."""
    first, short = sample(loaded, "the quick", 20), sample(loaded, "fo", 20, seed=1)
    assert first.startswith("the quick") and len(first.encode(errors="replace")) >= 29
    together = sampling.sample(loaded, ["the quick", "fo"], 20, samples=2, batch_size=3)
    assert together[0] == first and together[3] == short
    assert together[1] != first and together[1].startswith("the quick") and together[2].startswith("fo")


def test_samples_are_kept_apart(loaded, workdir, drawn):
    """The same settings have the same text and the same file; any other setting has a file of its own."""
    files = lambda: {path.name: path.read_text() for path in (workdir / "samples").glob("*.txt")}
    before = len(files())
    first = sample(loaded, "the quick", 12)
    assert first in files().values() and len(files()) == before + 1
    assert sample(loaded, "the quick", 12, temperature=1) == first and len(files()) == before + 1
    others = [
        *sampling.sample(loaded, ["the quick"], 12, samples=2)[1:],
        sample(loaded, "the quick", 12, temperature=0.5),
        sample(loaded, "the quick", 12, top_k=3),
        sample(loaded, "the quick", 12, top_p=0.5),
        sample(loaded, "the quick", 12, stop=["zebra"]),
        sample(loaded, "the quick", 13),
        sample(loaded, "the lazy", 12),
    ]
    assert len(files()) == before + 8 and {first, *others} <= set(files().values())
    (path,) = [path for path in (workdir / "samples").glob("*.txt") if path.read_text() == others[-1]]
    record = json.loads(path.with_suffix(".json").read_text())
    assert path.name.startswith("step4-the_lazy-n12-t1-seed0-")
    assert record == {
        **loaded.origin,
        "prompt": "the lazy",
        "length": 12,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
    }


def test_stop_strings(loaded, drawn, capsys):
    """The text ends before the first of them; nothing of it is printed, and no row waits for another."""
    (text,) = sampling.sample(loaded, ["the "], 12, stop=["top_p", "erat", "temp"])
    assert text == "the 12 0 {'"
    assert capsys.readouterr().out.startswith(text + "\n")
    texts = sampling.sample(loaded, ["the ", "a"], 12, samples=2, stop=["1 {", "top"])
    assert texts == ["the 12 0 {'temperature': 1.0, '", "the 12 ", "a12 0 {'temperature': 1.0, '", "a12 "]


def test_continuations():
    """Pieces are whole characters, add up to the text, and hold back what may become a stop string."""
    decode = lambda ids: bytes(ids).decode(errors="replace")
    content = "naïve → 語 stop here".encode()
    part, pieces = sampling.Continuation(decode, ["stop there"]), []
    for token in content:
        part.add(token)
        pieces.append(part.piece())
    assert "".join(pieces) == content.decode()[: -len("stop there") + 1] and part.rest() == "stop here"
    assert part.text == content.decode() and not part.ended
    broken = sampling.Continuation(decode)
    for token in b"a\xe8\xaa":
        broken.add(token)
    assert broken.text == "a"
    broken.finish()
    assert broken.text == b"a\xe8\xaa".decode(errors="replace")


def test_batches():
    """Unequal prompts share a batch only where they can be padded."""
    rows, lengths = [(i, 0) for i in range(5)], [3, 1, 3, 2, 9]
    assert sampling.batches(rows, lengths, 2, True) == [[(1, 0), (3, 0)], [(0, 0), (2, 0)], [(4, 0)]]
    assert sampling.batches(rows, lengths, 2, False) == [[(1, 0)], [(3, 0)], [(0, 0), (2, 0)], [(4, 0)]]
    ids, segments = sampling.padded([np.array([5, 6, 7]), np.array([8])], several=True)
    assert ids.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]] and segments.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert sampling.padded([np.array([5, 6, 7]), np.array([8])], several=False)[0].shape == (2, 3)


def test_prompts_of_a_file(tmp_path):
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("one\n\n  two words\r\nthree")
    assert sampling.read_prompts(lines) == ["one", "  two words", "three"]
    objects.write_text('"one\\nline"\n{"prompt": "two", "id": 3}\n')
    assert sampling.read_prompts(objects) == ["one\nline", "two"]
    for path in (lines, objects):  # a mark of the byte order is no text
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sampling.read_prompts(lines)[0] == "one" and sampling.read_prompts(objects) == ["one\nline", "two"]
    for content, message in [("", "holds no prompt"), ("{]", "line 1, is no JSON"), ("[3]", "neither a string")]:
        objects.write_text(content)
        with pytest.raises(UserError, match=message):
            sampling.read_prompts(objects)
    with pytest.raises(UserError, match="cannot be read"):
        sampling.read_prompts(tmp_path / "none.txt")


def test_the_likeliest_token(loaded):
    """What the carry gives step by step is the likeliest token from the whole sequence at once."""
    greedy = sample(loaded, "the quick", 5, temperature=0.0)
    ids = loaded.config.task.encode(greedy)
    logits, _ = jax.jit(loaded.built.apply)(loaded.params, ids[None, :-1])
    assert (np.argmax(logits[0], -1)[-5:] == ids[-5:]).all()


def test_other_data_is_recorded(shorter, drawn):
    run = load(shorter, "latest", allow_other_data=True)
    sample(run, "the", 3)
    (record,) = [json.loads(path.read_text()) for path in (shorter / "samples").glob("*.json")]
    assert record["data_of_the_run"] == run.other_data and record["data"] == run.data


def test_a_text_that_cannot_be_kept(copied, capsys, drawn):
    """It is printed, and then why it is not kept."""
    workdir = copied()
    (workdir / "samples").write_text("a file where the folder should be")
    text = sample(load(workdir, "latest"), "the", 3)
    printed = capsys.readouterr().out
    assert text in printed
    assert printed.splitlines()[-1].startswith(f"not kept: cannot write to {workdir / 'samples'}: ")


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"length": 0}, "--length must be"),
        ({"temperature": float("nan")}, "--temperature must be"),
        ({"temperature": -1.0}, "--temperature must be"),
        ({"top_k": -1}, "--top_k must be"),
        ({"top_p": 0.0}, "--top_p must be"),
        ({"top_p": float("nan")}, "--top_p must be"),
        ({"samples": 0}, "--samples must be"),
        ({"batch_size": 0}, "--batch_size must be"),
        ({"stop": [""]}, "--stop is empty"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295"),
        ({"seed": 2**32}, "--seed must be from 0 to 4294967295"),
    ],
)
def test_settings_out_of_range(loaded, settings, message):
    with pytest.raises(UserError, match=message):
        sampling.sample(loaded, ["the"], **{"length": 3} | settings)


def test_prompts_that_cannot_be_continued(loaded):
    with pytest.raises(UserError, match="the prompt is empty"):
        sample(loaded, "", 3)
    with pytest.raises(UserError, match="not valid UTF-8"):
        sample(loaded, "the \udcff", 3)
    two_sided = dataclasses.replace(loaded.config.model, causal=False)
    encoder = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model=two_sided))
    with pytest.raises(UserError, match="has no model that continues a text"):
        sample(encoder, "the", 3)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        sampling.sample(loaded, ["the", ""], 3)


def test_a_checkpoint_of_hugging_face(loaded, tmp_path, drawn, capsys):
    """Its texts are cut and ended by its own tokens; nothing is written beside them."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(128)}, []))
    made.decoder = tokenizers.decoders.Fuse()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, ord("{")]}))
    theirs = dataclasses.replace(loaded.config, task=None)
    hf = dataclasses.replace(loaded, config=theirs, workdir=tmp_path, tokenizer=Subword(made))
    # What is drawn is "9 0 {'temperature..." in ASCII, with a "{" at its fifth place.
    assert sample(hf, "ab", 9) == "ab9 0 "
    assert "tokens/s" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        sample(dataclasses.replace(hf, tokenizer=None), "ab", 9)
