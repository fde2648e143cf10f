"""Mixtures against their parts."""

import collections

import numpy as np
import pytest

from common.errors import UserError
from data import mixture, task


@pytest.fixture
def texts(tmp_path):
    """Three texts of different letters, of 1,200, 400 and 220 bytes."""
    rng = np.random.default_rng(0)
    for name, letters, size in (("a", b"abcdef", 1200), ("b+2", b"ghijkl", 400), ("c", b"mnopqr", 220)):
        (tmp_path / name).write_bytes(bytes(rng.choice(list(letters), size).astype(np.uint8)))
    return lambda name, kind="language_model", **options: task.create(
        kind,
        corpus=name.replace("file:", f"file:{tmp_path}/"),
        length=10,
        cache_dir=str(tmp_path / ".cache"),
        **options,
    )


def test_names_hold_what_files_do():
    assert mixture.parse("mix:file:a+b*0.7+jsonl:x/*.jsonl,field=a*3") == [
        ("file:a+b", 0.7),
        ("jsonl:x/*.jsonl,field=a", 3.0),
    ]
    huge = "9" * 400  # as a number it is infinite
    for name in (
        "mix:",
        "mix:a*1",
        "mix:a+b",
        "mix:a*1+b",
        "mix:a*0+b*1",
        "mix:a*1+b*1x",
        f"mix:a*{huge}+b*1",
        "mix:a*1e308+b*1e308",
    ):
        with pytest.raises(UserError, match="is no mixture: give two corpora or more"):
            mixture.parse(name)


@pytest.mark.parametrize("power", range(-12, 23))
def test_weights_are_spelled_as_they_are_read(power):
    """Python spells numbers below 1e-4 and from 1e16 on with an exponent, whose sign may be the + that joins corpora."""
    weight = 4.1 * 10.0**power
    found = [("file:a", weight), ("file:b+2*x", weight / 3), ("c", 1.0)]
    assert mixture.parse(mixture.spell(found)) == found
    plain = mixture.parse(f"mix:file:a*{weight:.40f}+file:b*4E{power}+c*1.5e{power:+}")
    assert plain == [("file:a", weight), ("file:b", float(f"4e{power}")), ("c", float(f"1.5e{power}"))]


@pytest.mark.parametrize("kind", ["language_model", pytest.param("masked_lm", marks=pytest.mark.thorough)])
def test_each_text_gets_its_share_and_shows_all_its_rows_before_any_again(texts, kind):
    mix = texts("mix:file:a*1+file:b+2*2+file:c*1", kind)
    parts = [texts(name, kind) for name in ("file:a", "file:b+2", "file:c")]
    sizes = [part.num_examples("train") for part in parts]
    rows = mix.num_examples("train")
    assert rows == sum(sizes)
    which = lambda row: next(
        i for i, start in enumerate(b"mga"[::-1]) if start <= np.median(row["targets"][row["weights"] > 0]) < start + 6
    )
    seen = collections.defaultdict(list)
    for epoch in range(2):
        order = []
        for index in range(epoch * rows, (epoch + 1) * rows):
            row = mix.example("train", index, 5)
            order.append(which(row))
            seen[order[-1]].append(row)
        counts = collections.Counter(order)
        assert [abs(counts[i] - share * rows) < 1 for i, share in enumerate((0.25, 0.5, 0.25))] == [True] * 3
        assert order != sorted(order)
    for i, part in enumerate(parts):
        expected = sorted(str(part.example("train", n, 5)["targets"].tolist()) for n in range(len(seen[i])))
        assert sorted(str(row["targets"].tolist()) for row in seen[i]) == expected
    again = texts("mix:file:a*1+file:b+2*2+file:c*1", kind)
    assert again.fingerprint() == mix.fingerprint() != texts("mix:file:a*1+file:b+2*1+file:c*1", kind).fingerprint()
    for split in ("valid", "test"):
        expected = [part.example(split, i) for part in parts for i in range(part.num_examples(split))]
        assert len(expected) == mix.num_examples(split)
        for index, row in enumerate(expected):
            np.testing.assert_array_equal(mix.example(split, index)["inputs"], row["inputs"])


def test_a_text_without_a_row_is_refused(texts):
    with pytest.raises(UserError, match=r"c' gets none of the 160 rows of an epoch; give it more weight"):
        texts("mix:file:a*1+file:b+2*1+file:c*0.001").fingerprint()


def test_other_splits_are_scored_at_a_length_that_leaves_no_row_of_training(texts, tmp_path):
    """A text of 220 bytes has 198 in train, and none of them in rows of 100 and their last target, wherever they begin."""
    options = texts("mix:file:a*1+file:c*1").hyperparameters
    long = task.create("language_model", **options | {"length": 100})
    assert long.num_examples("test") == 2 and long.example("test", 1)["weights"].sum() == 10
    with pytest.raises(UserError, match=r"train split of .*c' has 198 bytes and length=100 needs 200"):
        long.fingerprint()


def test_a_text_that_is_given_twice_is_one_text(texts, tmp_path, monkeypatch):
    """Also in other words: its weights are added, and no row of it is shown or scored twice."""
    monkeypatch.chdir(tmp_path)
    alone = texts("file:a")
    assert texts("mix:file:a*1+file:a*3").fingerprint() == alone.fingerprint()
    twice = task.create("language_model", corpus="mix:file:a*1+file:c*2+file:./a*2", length=10, cache_dir=".cache")
    once = texts("mix:file:a*3+file:c*2")
    assert twice.fingerprint() == once.fingerprint() and twice.hyperparameters == once.hyperparameters


def test_what_is_learned_is_not_scored(texts, tmp_path):
    """A file of two corpora that cut it in different ways; one text to score all is no harm."""
    for name in (
        f"mix:file:a,valid={tmp_path}/b+2,test={tmp_path}/b+2*1+file:b+2*1",
        f"mix:file:b+2*1+file:a,valid={tmp_path}/b+2,test={tmp_path}/b+2*1",
        "mix:file:a*1+file:a,valid=0.2*1",
    ):
        with pytest.raises(UserError, match=r"is of train of 'file:.*' and of 'file:.*give it in one of the two"):
            texts(name)
    scored = f"valid={tmp_path}/c,test={tmp_path}/c"
    texts(f"mix:file:a,{scored}*1+file:b+2,{scored}*1")


def test_a_mixture_is_named_so_that_it_can_be_made_again(texts, tmp_path):
    small = texts("mix:file:a*0.00004+file:b+2*0.00005")
    assert task.create("language_model", **small.hyperparameters).fingerprint() == small.fingerprint()
    mix = texts("mix:file:a*0.1+file:b+2*0.2", tokenizer="bpe:260")
    assert mix.hyperparameters["corpus"] == f"mix:file:{tmp_path}/a*0.1+file:{tmp_path}/b+2*0.2"
    again = task.create("language_model", **mix.hyperparameters)
    assert again.fingerprint() == mix.fingerprint() and again.name == mix.name
    assert mix.spec.vocab_size == 260 and mix.decode(mix.encode("abc ghi")) == "abc ghi"
    parts = [part.text_sizes("test") for part in mix.parts]
    assert mix.text_sizes("test") == {key: parts[0][key] + parts[1][key] for key in ("tokens", "bytes", "words")}
    floors = [part.floors("test") for part in mix.parts]
    tokens = [sizes["tokens"] for sizes in parts]
    assert mix.floors("test")["5-gram"] == pytest.approx(np.dot([f["5-gram"] for f in floors], tokens) / sum(tokens))
    with pytest.raises(UserError, match="tokenizer='character' is made of one text"):
        texts("mix:file:a*1+file:c*1", tokenizer="character")
    with pytest.raises(UserError, match="a mixture holds no mixtures"):
        texts("mix:mix:file:a*1+file:c*1")
    with pytest.raises(UserError, match="is a mixture, which only language_model and masked_lm read"):
        task.create("passkey", corpus="mix:file:a*1+file:c*1")
