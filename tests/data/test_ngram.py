"""The n-gram floor against a dictionary implementation of the same equations."""

import collections
import contextlib
import io
import json
import math

import numpy as np
import pytest

from common.errors import UserError
from data import corpora, ngram
from data.corpora import Corpus, Stream


def stream(documents):
    return Stream(
        np.frombuffer(b"".join(documents), np.uint8),
        np.cumsum([len(document) for document in documents]).astype(np.int64),
    )


def brute_force(documents, order):
    """p(byte, context) of interpolated modified Kneser-Ney, one n-gram at a time."""
    counts = []
    for n in range(1, order + 1):
        seen, left = collections.Counter(), collections.defaultdict(set)
        for document in documents:
            for i in range(len(document) - n + 1):
                gram = document[i : i + n]
                seen[gram] += 1
                left[gram].add(document[i - 1] if i else None)
        counts.append(seen if n == order else {gram: len(kinds) for gram, kinds in left.items()})
    discounts = []
    for table in counts:
        n1, n2, n3, n4 = (sum(count == k for count in table.values()) for k in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 else 0
        estimates = [
            1 - 2 * y * n2 / n1 if n1 else 1,
            2 - 3 * y * n3 / n2 if n2 else 2 - 3 * y * n3,
            3 - 4 * y * n4 / n3 if n3 else 3 - 4 * y * n4,
        ]
        discounts.append([d if d > 0 else fallback for d, fallback in zip(estimates, (0.5, 1, 1.5), strict=True)])

    def p(byte, context, n=order):
        if n == 0:
            return 1 / 256
        shorter = p(byte, context, n - 1)
        if len(context) < n - 1:
            return shorter
        context = context[len(context) - n + 1 :]
        following = {gram: count for gram, count in counts[n - 1].items() if gram[:-1] == context}
        if not following:
            return shorter
        discount = lambda count: discounts[n - 1][min(count, 3) - 1]
        count = following.get(context + bytes([byte]), 0)
        gamma = sum(map(discount, following.values()))
        return (count - discount(count) if count else 0) / sum(following.values()) + gamma / sum(
            following.values()
        ) * shorter

    return p


def random_documents(seed, sizes, letters):
    rng = np.random.default_rng(seed)
    # Skewed letters, so that counts of 1, 2, 3, 4 and more all occur.
    return [bytes(rng.choice(list(letters), p=[0.5, 0.25, 0.15, 0.1], size=size).astype(np.uint8)) for size in sizes]


@pytest.mark.parametrize(("seed", "sizes"), [(0, [160]), (1, [40, 1, 2, 90, 3, 25]), (2, [5, 4, 3]), (3, [2, 2, 1])])
def test_equals_brute_force(seed, sizes):
    train = random_documents(seed, sizes, b"abcd")
    held_out = random_documents(seed + 10, [30, 1, 12], b"abcz")
    model = ngram.KneserNey(stream(train), 4)
    held = stream(held_out)
    expected = np.array(
        [
            [p(document[i], document[:i]) for document in held_out for i in range(len(document))]
            for p in (brute_force(train, order) for order in range(1, 5))
        ]
    )
    np.testing.assert_allclose(model.probabilities(held, 0, 43), expected, rtol=1e-12)
    np.testing.assert_allclose(model.probabilities(held, 7, 33), expected[:, 7:33], rtol=1e-12)


def test_probabilities_of_the_256_bytes_sum_to_one():
    train = random_documents(4, [300, 20, 1], b"abcd")
    model = ngram.KneserNey(stream(train))
    assert model.orders == 63 // 3  # four letters and the unseen symbol
    for context in (b"", b"a", b"abca", b"zzz", b"abzcd", train[0][40:75]):
        texts = stream([context + bytes([byte]) for byte in range(256)])
        p = model.probabilities(texts, 0, len(texts.data))[:, texts.ends - 1]
        assert (p > 0).all()
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)


def test_all_256_bytes_pack_into_eight_bits():
    model = ngram.KneserNey(stream([bytes(range(256)) * 8]))
    assert model.orders == 7
    p = model.probabilities(stream([bytes(range(256))]), 0, 256)
    assert (p[-1, 8:] > 0.5).all() and p.max() <= 1
    with pytest.raises(ValueError, match="orders=8 must be 1 to 7"):
        ngram.KneserNey(stream([bytes(range(256))]), 8)


@pytest.mark.parametrize("documents", [True, False])
def test_bits_per_byte_scores_what_a_model_is_scored_on(tmp_path, monkeypatch, documents):
    texts = {
        "train": random_documents(5, [60, 1, 50, 30], b"abcd"),
        "valid": random_documents(6, [1, 20, 3], b"abcd"),
        "test": random_documents(7, [17, 1, 6], b"abcz"),
    }
    corpus = Corpus("made", {split: stream(text) for split, text in texts.items()}, f"{documents:064}")
    monkeypatch.setattr(ngram, "_BLOCK", 10)
    table = ngram.bits_per_byte(corpus, documents, tmp_path)
    for split in ("valid", "test"):
        whole = lambda split: texts[split] if documents else [b"".join(texts[split])]
        for order in (1, 3, 5):
            p = brute_force(whole("train"), order)
            bits = [-math.log2(p(text[i], text[:i])) for text in whole(split) for i in range(1, len(text))]
            assert table[split][order - 1] == pytest.approx(sum(bits) / len(bits), rel=1e-12)
    best = ngram.best_order(table)
    assert table["valid"][best - 1] == min(table["valid"])
    monkeypatch.setattr(ngram, "KneserNey", None)  # what is in the cache is not fitted again
    assert ngram.bits_per_byte(corpus, documents, tmp_path) == table
    (kept,) = tmp_path.rglob("*.json")
    few = {split: bits[:4] for split, bits in table.items()}
    for wrong in (few, table | {"test": table["test"][:-1]}, table | {"valid": dict.fromkeys("abcdefg", 1.0)}, [], {}):
        kept.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="is damaged: delete it"):
            ngram.bits_per_byte(corpus, documents, tmp_path)


def test_a_long_training_text_is_used_up_to_the_bound(monkeypatch):
    train = random_documents(8, [50, 50], b"abcd")
    monkeypatch.setattr(ngram, "FIT_BYTES", 70)
    held = stream(random_documents(9, [40], b"abcd"))
    short = ngram.KneserNey(stream([train[0], train[1][:20]]), 3).probabilities(held, 0, 40)
    np.testing.assert_array_equal(ngram.KneserNey(stream(train), 3).probabilities(held, 0, 40), short)


@pytest.mark.slow
def test_shakespeare_floors(tmp_path):
    """The pinned text's bits per byte as another program has them, whose base is 1/84 instead of 1/256."""
    try:
        corpus = corpora.load("shakespeare")
    except corpora.FetchError as error:
        pytest.skip(f"the text is not in the cache and cannot be fetched here: {error}")
    table = ngram.bits_per_byte(corpus, False, tmp_path)
    orders = np.array([1, 3, 5, 6, 7, 8, 9]) - 1
    expected = {
        "valid": [4.856, 2.994, 2.234, 2.136, 2.118, 2.118, 2.123],
        "test": [4.750, 2.849, 2.187, 2.101, 2.081, 2.082, 2.086],
    }
    for split, values in expected.items():
        np.testing.assert_allclose(np.array(table[split])[orders], values, atol=1.2e-3)


@pytest.mark.parametrize("order", [1, 3])
def test_a_saved_model_scores_sentences_as_brute_force_does(tmp_path, monkeypatch, order):
    pad = lambda texts: [b"\n" * (order - 1) + text + b"\n" for text in texts]
    train = random_documents(11, [50, 3, 40, 20], b"abcd")
    ngram.fit_sentences(train, order).save(tmp_path / "model.npz")
    sentences = [*random_documents(12, [9, 1, 30], b"abcz"), b""]
    p = brute_force(pad(train), order)
    expected = [-sum(math.log2(p(text[i], text[:i])) for i in range(order - 1, len(text))) for text in pad(sentences)]
    loaded = ngram.KneserNey.load(tmp_path / "model.npz")
    np.testing.assert_allclose(ngram.sentence_bits(loaded, sentences), expected, rtol=1e-12)
    monkeypatch.setattr(ngram, "_BLOCK", 7)
    np.testing.assert_allclose(ngram.sentence_bits(loaded, sentences), expected, rtol=1e-12)


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """A model of lines that repeat a few sentences, and what fitting it printed."""
    monkeypatch.setenv("MIXOLOGY_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    lines = [f"the {('cat', 'dog')[i]} {('sleeps', 'eats', 'runs')[j]}" for i, j in rng.integers([2, 3], size=(300, 2))]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    path = str(tmp_path / "model.npz")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ngram.main(["fit", f"file:{tmp_path / 'train.txt'}", f"--model={path}"])
    return path, printed.getvalue()


def test_fit_tries_orders_until_valid_gets_worse(fitted):
    path, printed = fitted
    rows = [line.split() for line in printed.splitlines()[1:-1]]
    valid = [float(row[1]) for row in rows]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    model, best = ngram.KneserNey.load(path), int(np.argmin(valid))
    assert model.orders == best + 1 and valid[: best + 1] == sorted(valid[: best + 1], reverse=True)
    assert len(rows) == best + 2 or len(rows) == ngram.ORDERS
    test = corpora.load(f"file:{path.replace('model.npz', 'train.txt')}").splits["test"].data.tobytes().splitlines()
    test = [line for line in test if line]
    bits = ngram.sentence_bits(model, test).sum()
    assert float(rows[best][2]) == pytest.approx(bits / sum(len(line) + 1 for line in test), abs=1e-4)
    assert float(rows[best][3]) == pytest.approx(2 ** (bits / sum(len(line.split()) + 1 for line in test)), abs=6e-3)


def test_score_prints_perplexities_with_the_end_of_the_line(fitted, capsys):
    path, _ = fitted
    ngram.main(["score", f"--model={path}", "the cat eats", "the eats cat"])
    rows = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[1:]]
    expected = ngram.sentence_bits(ngram.KneserNey.load(path), [b"the cat eats", b"the eats cat"])
    for (total, rate, per_byte, per_word, text), bits in zip(rows, expected, strict=True):
        assert float(total) == pytest.approx(bits, abs=0.006) and float(rate) == pytest.approx(bits / 13, abs=1e-4)
        assert float(per_byte) == pytest.approx(2 ** (bits / 13), abs=1e-3) and len(text) == 12
        assert float(per_word) == pytest.approx(2 ** (bits / 4), rel=1e-5)
    ngram.main(
        ["score", f"--model={path}", "ca\udcfft"]
    )  # as Python hands on a byte of the command line that is no text
    total, *_, text = capsys.readouterr().out.splitlines()[1].split()
    assert float(total) == pytest.approx(ngram.sentence_bits(ngram.KneserNey.load(path), [b"ca\xfft"])[0], abs=0.006)
    assert text == "ca\ufffdt"
    # Two animals and three verbs, each as likely: log2 6 = 2.6 bits are the least.
    assert 2.5 < expected[0] < 3.5 and expected[1] > 10


def test_rank_sorts_and_filters_lines(fitted, tmp_path, capfdbinary):
    path, _ = fitted
    lines = ["zebras fly", "the dog runs", "", "the cat", "cat the eats", "the dog eats"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    ngram.main(["rank", f"--model={path}", str(tmp_path / "lines.txt")])
    rows = [line.split("\t") for line in capfdbinary.readouterr().out.decode().splitlines()]
    assert {row[1] for row in rows[:2]} == {"the dog runs", "the dog eats"} and rows[-1][1] == "zebras fly"
    bits = ngram.sentence_bits(ngram.KneserNey.load(path), [row[1].encode() for row in rows])
    np.testing.assert_allclose(
        [float(row[0]) for row in rows], bits / [len(row[1]) + 1 for row in rows], rtol=0, atol=1e-4
    )
    assert [float(row[0]) for row in rows] == sorted(float(row[0]) for row in rows)
    ngram.main(["rank", f"--model={path}", "--keep=0.4", str(tmp_path / "lines.txt")])
    assert capfdbinary.readouterr().out == b"the dog runs\nthe dog eats\n"


def test_the_command_says_what_is_wrong(fitted, tmp_path):
    path, _ = fitted
    (tmp_path / "broken.npz").write_bytes(open(path, "rb").read()[:-100])
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "blank.txt").write_text(" \n\n")
    np.savez(tmp_path / "old.npz", version=np.array(0), bits=np.array(3), symbol=np.zeros(256, np.int64))
    for arguments, message in [
        (["score", f"--model={tmp_path / 'none.npz'}", "a"], "there is no model .*none.npz; make it with"),
        (["score", f"--model={tmp_path / 'broken.npz'}", "a"], "is no intact n-gram model .*fit it again"),
        (
            ["score", f"--model={tmp_path / 'old.npz'}", "a"],
            "is a model of version 0, this program reads 1; fit it again",
        ),
        (["rank", f"--model={path}", str(tmp_path / "none.txt")], "there is no text file .*none.txt"),
        (["rank", f"--model={path}", str(tmp_path / "blank.txt")], "has no lines to rank"),
        (["rank", f"--model={path}", "--keep=2", "x"], "--keep=2.0 is the fraction"),
        (["fit", "shakespeare", f"--model={tmp_path}"], "--model=.* is a folder; give the name of a file"),
        (["fit", "shakespeare", f"--model={tmp_path}/no/model.npz"], "there is no folder .*/no; make it first"),
        (["fit"], "the following arguments are required: corpus, --model"),
        ([], "the following arguments are required: command"),
        (["fit", "shakespear", f"--model={path}"], "corpus='shakespear' is unknown"),
        (["fit", f"file:{tmp_path / 'train.txt'}", "--order=99", f"--model={path}"], "orders=99 must be 1 to"),
    ]:
        with pytest.raises(UserError, match=message):
            ngram.main(arguments)


def test_fit_tries_only_orders_that_fit_the_alphabet(tmp_path, monkeypatch, capsys):
    """Lines of 200 different bytes that only ever longer contexts predict better: 8 bits a symbol, so 7 orders at most."""
    monkeypatch.setenv("MIXOLOGY_CACHE", str(tmp_path))
    line = bytes(range(14, 214))
    (tmp_path / "text.bin").write_bytes(b"\n".join([line[i:] + line[:i] for i in range(0, 200, 5)] * 30))
    monkeypatch.setattr(ngram, "sentence_bits", lambda model, sentences: np.ones(1) / model.orders)
    ngram.main(["fit", f"file:{tmp_path / 'text.bin'}", f"--model={tmp_path / 'model.npz'}"])
    assert capsys.readouterr().out.endswith("model.npz: order 7\n")
