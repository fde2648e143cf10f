"""The six MAD tasks against plain dictionaries, and what their source gets wrong."""

import numpy as np
import pytest

from data import task
from data.tasks.mad import BASELINES
from tests.data.generated_rows import check_rows, digest, scored

GOLDEN = {
    "in_context_recall": "920a130a82e461e5",
    "fuzzy_in_context_recall": "f0fa7eee7a6f7056",
    "noisy_in_context_recall": "e01a9ccd948b7339",
    "selective_copying": "16e9cd66253e2632",
    "compression": "200600a14ddc8fdb",
    "memorization": "8433d967aeb794cc",
}


@pytest.mark.parametrize("kind", BASELINES)
def test_rows(kind):
    mad = task.create("mad", kind=kind)
    check_rows(mad, new_each_epoch=False)
    assert digest(mad) == GOLDEN[kind]
    assert mad.num_examples("train") == (256 if kind == "memorization" else 12_800)
    assert task.create("mad", kind=kind, train_examples=800).num_examples("train") == 800
    # Train is a finite set: two epochs hold the same rows.
    small = task.create("mad", kind=kind, train_examples=5)
    epochs = [{small.example("train", i)["inputs"].tobytes() for i in range(e, e + 5)} for e in (0, 5, 10)]
    assert epochs[0] == epochs[1] == epochs[2] and len(epochs[0]) == 5


@pytest.mark.parametrize(
    ("kind", "noise", "length", "vocab"),
    [
        ("in_context_recall", None, 128, 16),
        ("in_context_recall", None, 4, 5),
        ("noisy_in_context_recall", 0.2, 128, 32),
        ("noisy_in_context_recall", 0.8, 30, 48),
        ("noisy_in_context_recall", 0.99, 4, 20),
    ],
)
def test_recall_asks_for_every_key_seen_before(kind, noise, length, vocab):
    mad = task.create("mad", kind=kind, noise=noise, length=length, vocab_size=vocab)
    real = vocab - 16 if noise else vocab
    shares = []
    for split in mad.splits:
        for i in range(40):
            row = mad.example(split, i)
            inputs = row["inputs"].tolist()
            known, expected, noisy = {}, {}, 0
            for t in range(0, length, 2):
                key, value = inputs[t : t + 2]
                if key >= real:
                    assert value >= real and t < length - 2
                    noisy += 1
                    continue
                assert key < real // 2 <= value < real
                if key in known:
                    expected[t] = value
                    assert known[key] == value
                known[key] = value
            assert scored(row) == expected and length - 2 in expected
            shares.append(noisy / (length // 2))
    if noise is None:
        assert not any(shares)
    elif length > 4:
        assert np.mean(shares) == pytest.approx(noise * (1 - 2 / (length // 2)), abs=0.03)


@pytest.mark.parametrize(("length", "vocab"), [(128, 16), (12, 7), (61, 32)])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_fuzzy_recall(length, vocab, split):
    mad = task.create("mad", kind="fuzzy_in_context_recall", length=length, vocab_size=vocab)
    half, key_sizes, value_sizes = (vocab - 1) // 2, set(), set()
    for i in range(40):
        row = mad.example(split, i)
        # The last target ends the sequence; runs of keys' and of values' tokens take turns.
        sequence = row["inputs"].tolist() + [int(row["targets"][-1])]
        begin = next(t for t, token in enumerate(sequence) if token != vocab - 1)
        assert begin < 2 * 6 + 1 or length == 12
        motifs, start = [], begin
        for t in range(begin + 1, length + 2):
            if t == length + 1 or (sequence[t] < half) != (sequence[start] < half):
                motifs.append((start, tuple(sequence[start:t])))
                start = t
        known, expected = {}, {}
        for (_, key), (at, value) in zip(motifs[::2], motifs[1::2], strict=True):
            assert max(key) < half <= min(value) and max(value) < vocab - 1
            assert 1 <= len(set(key)) == len(key) <= 3 and 1 <= len(set(value)) == len(value) <= 3
            if key in known:
                expected |= {at - 1 + j: token for j, token in enumerate(value)}
                assert known[key] == value
            known[key] = value
            key_sizes.add(len(key))
            value_sizes.add(len(value))
        assert scored(row) == expected and length - 1 in expected
    assert key_sizes == ({1, 2, 3} if split == "train" else {3}) and value_sizes == {1, 2, 3}


@pytest.mark.parametrize(("length", "tokens", "vocab"), [(256, 16, 16), (9, 4, 4), (40, 3, 128)])
def test_selective_copying(length, tokens, vocab):
    mad = task.create("mad", kind="selective_copying", length=length, tokens=tokens, vocab_size=vocab)
    behind = 0
    for i in range(100):
        row = mad.example("train", i)
        body = row["inputs"][: length - tokens - 1].tolist()
        data = [token for token in body if token != vocab - 2]
        assert len(data) == tokens and max(data) < vocab - 2
        assert row["inputs"][length - tokens - 1 :].tolist() == [vocab - 1] + [vocab - 2] * tokens
        assert scored(row) == {length - tokens + j: token for j, token in enumerate(data)}
        behind += body[-1] == vocab - 2
    assert behind > 0 or length == 9


def test_compression():
    row = task.create("mad", kind="compression", length=20).example("train", 0)
    data = row["inputs"][:10].tolist()
    assert max(data) < 15 and row["inputs"][10:].tolist() == [15] * 10
    assert scored(row) == {10 + j: token for j, token in enumerate(data)}


def test_memorization_has_one_map():
    maps, mad = [], task.create("mad", kind="memorization", vocab_size=32)
    for seed in (0, 1):
        known = {}
        for split in mad.splits:
            for i in range(40):
                row = mad.example(split, i, seed)
                keys = row["inputs"][::2].tolist()
                assert max(keys) < 15 and (row["inputs"][1::2] == 31).all()
                for (t, value), key in zip(scored(row).items(), keys, strict=True):
                    assert t % 2 and known.setdefault(key, value) == value
        maps.append(known)
        assert len(known) == len(set(known.values())) == 15 and set(known.values()) <= set(range(15, 31))
    assert maps[0] == maps[1] and sorted(maps[0]) != sorted(maps[0].values())


def test_floors():
    mad = task.create("mad", length=16, vocab_size=8)
    floors = mad.floors("valid")
    right, answers = [], []
    for row in mad.rows("valid"):
        for t, answer in scored(row).items():
            counts = [row["inputs"][: t + 1].tolist().count(value) for value in range(4, 8)]
            right.append((counts[answer - 4] == max(counts)) / counts.count(max(counts)))
            answers.append(answer)
    assert floors == {
        "chance": 0.25,
        "majority": max(map(answers.count, range(4, 8))) / len(answers),
        "most frequent of the row": pytest.approx(np.mean(right)),
    }
    assert task.create("mad", kind="memorization", vocab_size=32).floors()["chance"] == 1 / 15


def test_bad_settings_say_what_to_change():
    with pytest.raises(ValueError, match="kind='recall' is unknown; did you mean"):
        task.create("mad", kind="recall")
    with pytest.raises(ValueError, match=r"noise=0\.2 belongs to kind='noisy_in_context_recall'"):
        task.create("mad", noise=0.2)
    with pytest.raises(ValueError, match="tokens=4 belongs to kind='selective_copying'"):
        task.create("mad", kind="compression", tokens=4)
    for kind, bad in {
        "in_context_recall": {"length": 7},
        "fuzzy_in_context_recall": {"length": 11},
        "selective_copying": {"length": 32},
        "memorization": {"length": 0},
    }.items():
        with pytest.raises(ValueError, match=r"length=\d+ must be at least"):
            task.create("mad", kind=kind, **bad)
    for kind, vocab in {"noisy_in_context_recall": 19, "fuzzy_in_context_recall": 6, "compression": 2}.items():
        with pytest.raises(ValueError, match=rf"vocab_size={vocab} must be at least"):
            task.create("mad", kind=kind, vocab_size=vocab)
    with pytest.raises(ValueError, match=r"noise=1\.0 must be at least 0 and less than 1"):
        task.create("mad", kind="noisy_in_context_recall", noise=1.0)
    with pytest.raises(ValueError, match="train_examples must be from 1"):
        task.create("mad", train_examples=0)
