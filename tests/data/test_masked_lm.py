"""Masked language modelling: what is hidden, how, and what guessing scores."""

import hashlib

import numpy as np
import pytest

from data import task

KEYS = ("inputs", "positions", "segment_ids", "targets", "weights")


@pytest.fixture
def masked(tmp_path):
    """A task over 40,000 letters of very different frequencies."""
    rng = np.random.default_rng(0)
    text = rng.choice(np.frombuffer(b"abcdefgh", np.uint8), p=0.5 ** np.array([1, 2, 3, 4, 5, 6, 7, 7]), size=40_000)
    (tmp_path / "text.txt").write_bytes(text.tobytes())
    return lambda **kwargs: task.create(
        "masked_lm", corpus=f"file:{tmp_path / 'text.txt'}", cache_dir=str(tmp_path), **kwargs
    )


def test_rows_hide_tokens_of_the_text(masked):
    mlm = masked(length=100)
    assert mlm.spec.vocab_size == 257 and mlm.spec.targets == 256 and mlm.spec.causal is False
    assert mlm.spec.objective == "token_labels" and mlm.spec.metric.name == "bits_per_byte" and not mlm.spec.segmented
    for split in mlm.splits:
        text = mlm.corpus.splits[split].data.tobytes()
        for i in range(min(mlm.num_examples(split), 50)):
            row = mlm.example(split, i)
            for key in KEYS:
                assert row[key].shape == (100,) and row[key].dtype == (np.float32 if key == "weights" else np.int32)
            hidden = row["weights"] == 1
            assert hidden.sum() == 15 and not row["weights"][~hidden].any() and not row["targets"][~hidden].any()
            original = bytes(np.where(hidden, row["targets"], row["inputs"]).astype(np.uint8))
            assert original in text if split == "train" else original == text[100 * i : 100 * i + 100]
            assert (row["segment_ids"] == 1).all() and (row["positions"] == np.arange(100)).all()
    assert [mlm.num_examples(split) for split in mlm.splits] == [359, 20, 20]


def test_masks_are_80_10_10_and_new_each_epoch(masked):
    mlm = masked(length=100)
    rows = [mlm.example("train", i) for i in range(5 * mlm.num_examples("train"))]
    hidden = np.stack([row["weights"] for row in rows]) > 0
    inputs, targets = (np.stack([row[key] for row in rows]) for key in ("inputs", "targets"))
    assert hidden.mean(0).min() > 0.1 and hidden.mean(0).max() < 0.2  # 15 % at every place
    kinds = np.array([(inputs == 256)[hidden].mean(), (inputs == targets)[hidden].mean()])
    np.testing.assert_allclose(kinds, [0.8, 0.1], atol=0.01)
    drawn = inputs[hidden & (inputs != 256) & (inputs != targets)]
    assert np.unique(drawn).size == 256 and abs(drawn.mean() - 127.5) < 5
    # The same window at the same offset in another epoch has another mask; the same example twice has the same.
    assert not np.array_equal(mlm.row("train", 3, 0, 0)["weights"], mlm.row("train", 3, 1, 0)["weights"])
    assert not np.array_equal(mlm.row("train", 3, 0, 0)["weights"], mlm.row("train", 3, 0, 1)["weights"])
    np.testing.assert_array_equal(mlm.example("valid", 3, 5)["inputs"], mlm.example("valid", 3, 9)["inputs"])


def test_examples_are_the_same_for_ever(masked):
    digest = hashlib.sha256()
    for split, index, seed in (("train", 0, 0), ("train", 1000003, 7), ("valid", 1, 0), ("test", 2, 0)):
        row = masked(length=40).example(split, index, seed)
        for key in KEYS:
            digest.update(key.encode() + row[key].astype("<f4").tobytes())
    assert digest.hexdigest() == "a4186e9cc2fbb561677b7c59b32b1f7979b20817da0bc5a8705d2979b2ebbaf9"


def test_floors_against_sums_over_the_vocabulary(masked):
    mlm = masked(length=50)
    counts = {byte: 1 for byte in range(256)}
    for byte in mlm.corpus.splits["train"].data.tobytes():
        counts[byte] += 1
    p = np.array([counts[byte] for byte in range(256)]) / sum(counts.values())
    bits = {"uniform": [], "unigram": [], "unigram and input": []}
    for i in range(mlm.num_examples("test")):
        row = mlm.example("test", i)
        for x, y in zip(row["inputs"][row["weights"] > 0], row["targets"][row["weights"] > 0]):
            joint = p * 0.8 if x == 256 else p * (0.1 * (np.arange(256) == x) + 0.1 / 256)
            for name, q in zip(bits, (np.full(256, 1 / 256), p, joint / joint.sum()), strict=True):
                bits[name].append(-np.log2(q[y]))
    floors = mlm.floors("test")
    assert floors == pytest.approx({name: np.mean(values) for name, values in bits.items()}, rel=1e-9)
    assert floors["unigram and input"] < floors["unigram"] < 2.1 < floors["uniform"] == 8


def test_subwords_are_masked_like_bytes(masked):
    mlm = masked(length=40, tokenizer="bpe:300")
    assert mlm.spec.targets == 300 and mlm.mask == 300 and mlm.spec.metric.name == "bits_per_token"
    row = mlm.example("test", 0)
    original = np.where(row["weights"] > 0, row["targets"], row["inputs"])
    assert mlm.corpus.splits["test"].data.tobytes().decode().startswith(mlm.decode(original))
    assert mlm.decode(row["inputs"]).count("_") == (row["inputs"] == 300).sum() > 0
    assert set(mlm.floors()) == {"uniform", "unigram", "unigram and input"}
    assert mlm.fingerprint() != masked(length=40).fingerprint()


def test_bad_input_says_what_to_change(masked):
    with pytest.raises(ValueError, match=r"valid split .* has 2000 bytes and length=2001 needs 2001"):
        masked(length=2001)
    with pytest.raises(ValueError, match="split='train'"):
        masked(length=20).floors("train")
