"""Skip-gram and CBOW against loops, the closed-form optimum, and words whose neighbours are known."""

import collections
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from data import word_embeddings as we


def random_params(size, width, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=(size, width)), jnp.float32) for name in ("input", "output")}


def test_a_lookup_is_a_product_with_one_hot_vectors():
    table, ids = random_params(7, 5)["input"], jnp.array([[3, 0, 3], [6, 1, 1]])
    looked_up, looked_up_gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(w[ids])))(table)
    with jax.default_matmul_precision("float32"):
        one_hot = jax.nn.one_hot(ids, 7)
        np.testing.assert_array_equal(one_hot @ table, table[ids])
        multiplied, gradient = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(one_hot @ w)))(table)
    assert looked_up == multiplied
    np.testing.assert_allclose(looked_up_gradient, gradient, rtol=1e-6)
    scattered = np.zeros((7, 5), np.float32)
    np.add.at(scattered, np.asarray(ids), np.cos(np.asarray(table[ids])))
    np.testing.assert_allclose(gradient, scattered, rtol=1e-5)


def test_words_and_vocabulary():
    words = we.words_of("The cat's 2 hats;  the HATS, café_au-lait")
    assert words == ["the", "cat's", "hats", "the", "hats", "café", "au", "lait"]
    kept, counts = we.vocabulary(words, 2)
    assert kept == ["hats", "the"] and counts.tolist() == [2, 2]
    with pytest.raises(ValueError, match="fewer than two words occur 3 times"):
        we.vocabulary(words, 3)


def test_examples_are_the_pairs_within_the_drawn_windows():
    ids, window = np.random.default_rng(0).integers(0, 9, 60), 4
    reach = np.random.default_rng(7).integers(1, window + 1, 60)
    inside = [[j for j in range(60) if j != i and abs(i - j) <= reach[i]] for i in range(60)]
    inputs, outputs = we.examples(ids, window, "skipgram", np.random.default_rng(7))
    expected = [(ids[i], ids[j]) for i in range(60) for j in inside[i]]
    assert list(zip(inputs[:, 0], outputs, strict=True)) == expected
    inputs, outputs = we.examples(ids, window, "cbow", np.random.default_rng(7))
    assert inputs.shape == (60, 8) and outputs.tolist() == ids.tolist()
    assert [row[row >= 0].tolist() for row in inputs] == [[ids[j] for j in places] for places in inside]


def test_frequent_words_are_left_out_and_negatives_follow_the_power():
    counts = np.array([80_000, 15_000, 4_000, 1_000])
    ids = np.repeat(np.arange(4), counts)
    kept = np.bincount(we.subsample(ids, counts, 0.05, np.random.default_rng(0)), minlength=4) / counts
    np.testing.assert_allclose(kept, [0.25, np.sqrt(1 / 3), 1, 1], atol=0.01)
    np.testing.assert_allclose(we.noise(np.array([16, 81, 256])), np.array([8, 27, 64]) / 99)


@pytest.mark.parametrize("model", we.MODELS)
def test_loss_is_that_of_a_loop(model):
    params, rng = random_params(9, 4), np.random.default_rng(1)
    inputs, outputs = we.examples(rng.integers(0, 9, 12), 3, model, rng)
    negatives = rng.integers(0, 9, (len(outputs), 5))
    v, u = (np.asarray(params[name], np.float64) for name in ("input", "output"))
    total, logistic = 0.0, lambda x: 1 / (1 + np.exp(-x))
    for read, predicted, drawn in zip(inputs, outputs, negatives, strict=True):
        hidden = np.mean([v[i] for i in read if i >= 0], axis=0)
        total -= np.log(logistic(hidden @ u[predicted])) + sum(np.log(logistic(-hidden @ u[n])) for n in drawn)
    assert float(jax.jit(we.loss)(params, inputs, outputs, negatives)) == pytest.approx(total / len(outputs), rel=1e-5)


def last(*args, **kwargs):
    *_, (params, value) = we.train(*args, **kwargs)
    return params, value


def test_skip_gram_reaches_the_shifted_mutual_information():
    """With vectors as long as the vocabulary, every product can be what Levy and Goldberg's theorem says."""
    rng = np.random.default_rng(0)
    follow = rng.dirichlet(np.full(6, 0.7), 6)
    ids = [0]
    for _ in range(6000):
        ids.append(rng.choice(6, p=follow[ids[-1]]))
    ids = np.array(ids, np.int32)
    counts = np.bincount(ids)
    options = {"window": 1, "negatives": 3, "threshold": 1.0, "batch_size": 256, "learning_rate": 0.03}
    params, value = last(ids, counts, size=6, epochs=8, **options)
    w, c, expected = we.optimum(*we.examples(ids, 1, "skipgram", rng), counts, 3, min_count=20)
    # The oracle, pair by pair.
    pairs = collections.Counter(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    both = collections.Counter({(a, b): pairs[a, b] + pairs[b, a] for a in range(6) for b in range(6)})
    for a, b, x in zip(w.tolist(), c.tolist(), expected, strict=True):
        conditional = both[a, b] / sum(both[a, other] for other in range(6))
        assert x == pytest.approx(np.log(conditional / (counts[b] ** 0.75 / (counts**0.75).sum()) / 3))
    assert we.pmi_correlation(params, w, c, expected) > 0.97
    products = np.einsum("nd,nd->n", np.asarray(params["input"])[w], np.asarray(params["output"])[c])
    assert np.abs(products - expected).mean() < 0.15
    again, same = last(ids, counts, size=6, epochs=8, **options)
    assert same == value and all(np.array_equal(again[key], params[key]) for key in params)


@pytest.mark.parametrize("model", we.MODELS)
def test_words_of_the_same_use_are_neighbours(model):
    rng = np.random.default_rng(1)
    groups = [[f"{kind}{i}" for i in range(4)] for kind in "abc"]
    text = " ".join(" ".join(groups[g][i] for i in rng.integers(4, size=8)) for g in rng.integers(3, size=1200))
    words, counts = we.vocabulary([word for word in text.split()], 5)
    ids = np.array([words.index(word) for word in text.split()], np.int32)
    params, _ = last(
        ids, counts, model=model, size=8, window=3, epochs=3, batch_size=256, learning_rate=0.03, threshold=1.0
    )
    for word in words:
        near = we.nearest(np.asarray(params["input"]), words, word, 3)
        assert {other[0] for other, _ in near} == {word[0]} and word not in dict(near)
        assert [cosine for _, cosine in near] == sorted((cosine for _, cosine in near), reverse=True)


def test_the_command_trains_prints_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIXOLOGY_CACHE", str(tmp_path))
    rng = np.random.default_rng(2)
    lines = (f"the {rng.choice(['cat', 'dog'])} {rng.choice(['eats', 'sleeps'])} here." for _ in range(400))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    arguments = [f"--corpus=file:{tmp_path / 'text.txt'}", "--size=6", "--epochs=2", "--batch_size=64", "--window=2"]
    for model in we.MODELS:
        we.main([*arguments, f"--model={model}", "--neighbours=cat,eats", f"--vectors={tmp_path / model}.txt"])
        printed = capsys.readouterr().out
        assert (
            "vocabulary 6" in printed
            and "epoch 2/2  loss " in printed
            and "\ncat: " in printed
            and "\neats: " in printed
        )
        assert ("correlation with the shifted PMI" in printed) == (model == "skipgram")
        first, *rows = (tmp_path / f"{model}.txt").read_text().splitlines()
        assert first == "6 6" and {row.split()[0] for row in rows} == {"the", "cat", "dog", "eats", "sleeps", "here"}
        assert np.isfinite([[float(x) for x in row.split()[1:]] for row in rows]).all()
    for bad, message in [
        ([*arguments, "--neighbours=zebra"], "'zebra' does not occur 5 times"),
        ([*arguments[:-2], "--batch_size=100000"], "fewer than batch_size=100000: make it smaller"),
        ([*arguments, "--min_count=9999"], "fewer than two words"),
        ([arguments[0], "--epochs=0"], "epochs must be at least 1, got 0"),
        ([*arguments, "--threshold=nan"], "threshold=nan must be above 0"),
        ([*arguments, "--seed=-1"], "seed must be at least 0"),
        ([*arguments, "--epoch=3"], "unrecognized arguments: --epoch=3"),
        ([*arguments, f"--vectors={tmp_path}"], "--vectors=.* is a folder"),
        ([*arguments, f"--vectors={tmp_path}/no/file"], "--vectors=.*: there is no folder .*/no; make it first"),
        ([*arguments, "--vectors="], f"--vectors={re.escape(os.getcwd())} is a folder"),
        (["--corpus=nothing"], "corpus='nothing' is unknown"),
    ]:
        with pytest.raises(UserError, match=message):
            we.main(bad)
