"""Word embeddings: skip-gram and CBOW with negative sampling (word2vec; arXiv 1301.3781, 1310.4546).

    python -m data.word_embeddings --corpus=shakespeare --vectors=vectors.txt --neighbours=king,love

Skip-gram predicts each word around a word, CBOW a word from the mean of those around it. With the input vectors v, the
output vectors u, h = v[word] or the mean of v[words], and k words n drawn in proportion to count^0.75,

    loss = -log s(h . u[predicted]) - sum_n log s(-h . u[n]),       s the logistic function.

Windows reach 1 to `window` words to each side, drawn for each place, and frequent words are left out at random, each with
probability 1 - sqrt(threshold / frequency), both anew in every epoch. Departs from the authors' program: batches and Adam in
place of single examples and SGD. The optimum of skip-gram is v[w] . u[c] = log(p(c | w) / p_n(c)) - log k, which for
p_n = p is the shifted pointwise mutual information (Levy and Goldberg 2014); how nearly it is reached is printed.
"""

import collections
import pathlib
import re
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from common import command
from common.errors import UserError, check_choice, check_range
from common.files import check_can_write, write_atomically
from data import corpora

MODELS = ("skipgram", "cbow")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: letters, with apostrophes inside."""
    return _WORD.findall(text.lower())


def vocabulary(words: Sequence[str], min_count: int) -> tuple[list[str], np.ndarray]:
    """The words that occur at least `min_count` times, the most frequent first, and their counts (int64)."""
    counts = sorted(collections.Counter(words).items(), key=lambda item: (-item[1], item[0]))
    kept = [(word, count) for word, count in counts if count >= min_count]
    if len(kept) < 2:
        raise UserError(f"fewer than two words occur {min_count} times: give a longer text or a smaller min_count")
    return [word for word, _ in kept], np.array([count for _, count in kept])


def noise(counts: np.ndarray) -> np.ndarray:
    """Probabilities of the negative samples, in proportion to count^0.75."""
    powered = counts**0.75
    return powered / powered.sum()


def subsample(ids: Int[np.ndarray, "N"], counts: np.ndarray, threshold: float, rng: np.random.Generator) -> np.ndarray:
    """The ids less some of the frequent words: each is kept with probability min(1, sqrt(threshold / frequency))."""
    kept = np.sqrt(threshold * counts.sum() / counts)
    return ids[rng.random(len(ids)) < kept[ids]]


def examples(
    ids: Int[np.ndarray, "N"], window: int, model: str, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "E M"], Int[np.ndarray, "E"]]:
    """What is read and what is predicted.

    Returns:
      inputs: for skip-gram one word (M = 1), for CBOW the 2 window words around a place, where -1 stands for none.
      outputs: a word each: one around the place, or the one at it.
    """
    reach = rng.integers(1, window + 1, len(ids))
    offsets = [d for d in range(-window, window + 1) if d]
    around = np.full((len(ids), len(offsets)), -1, np.int32)
    for column, d in enumerate(offsets):
        place = np.arange(max(0, -d), len(ids) - max(0, d))
        place = place[reach[place] >= abs(d)]
        around[place, column] = ids[place + d]
    if model == "cbow":
        some = (around >= 0).any(1)
        return around[some], ids[some]
    place, column = np.nonzero(around >= 0)
    return ids[place, None], around[place, column]


def loss(
    params: dict[str, Float[Array, "V D"]],
    inputs: Int[Array, "B M"],
    outputs: Int[Array, "B"],
    negatives: Int[Array, "B K"],
) -> Float[Array, ""]:
    """The mean over the batch of the loss above; inputs of -1 count for nothing."""
    there = (inputs >= 0).astype(jnp.float32)
    summed = jnp.einsum("bmd,bm->bd", params["input"][jnp.maximum(inputs, 0)], there)
    hidden = summed / there.sum(1, keepdims=True)
    positive = jnp.einsum("bd,bd->b", hidden, params["output"][outputs])
    negative = jnp.einsum("bd,bkd->bk", hidden, params["output"][negatives])
    return -jnp.mean(jax.nn.log_sigmoid(positive) + jax.nn.log_sigmoid(-negative).sum(1))


def train(
    ids: Int[np.ndarray, "N"],
    counts: np.ndarray,
    *,
    model: str = "skipgram",
    size: int = 100,
    window: int = 5,
    negatives: int = 5,
    threshold: float = 1e-3,
    epochs: int = 5,
    batch_size: int = 2048,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Iterator[tuple[dict[str, Array], float]]:
    """Trains vectors on a text of word ids, and yields after each epoch the parameters and its mean loss in nats.

    Args:
      ids, counts: the text and the counts of its words, see `vocabulary`.
      model: "skipgram" or "cbow".
      size: of a vector.
      window: words to each side at most.
      negatives: drawn for each example.
      threshold: frequency above which words are left out at times; 1 keeps all.
      epochs, batch_size, learning_rate: of Adam, with a rate that falls to zero along a line.
      seed: of everything drawn.

    Raises:
      UserError: for an unknown model, a number below 1, or a text without a whole batch of examples.
    """
    check_choice("model", model, MODELS)
    numbers = {"size": size, "window": window, "negatives": negatives, "epochs": epochs, "batch_size": batch_size}
    for name, number in numbers.items():
        check_range(name, number, 1)
    check_range("seed", seed, 0)
    if not (0 < threshold <= 1 and 0 < learning_rate < np.inf):
        raise UserError(
            f"threshold={threshold} must be above 0, at most 1, and learning_rate={learning_rate} a positive number"
        )
    rng = np.random.default_rng(seed)

    def draw():
        return examples(subsample(ids, counts, threshold, rng), window, model, rng)

    inputs, outputs = draw()
    steps = len(outputs) // batch_size
    if steps == 0:
        raise UserError(f"the text gives {len(outputs)} examples, fewer than batch_size={batch_size}: make it smaller")
    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0, epochs * steps))
    cumulative = np.cumsum(noise(counts))
    scale = 0.5 / size
    start = rng.uniform(-scale, scale, (len(counts), size)).astype(np.float32)
    params = {"input": jnp.asarray(start), "output": jnp.zeros((len(counts), size))}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    for epoch in range(epochs):
        if epoch:
            inputs, outputs = draw()
        total, done = 0.0, len(outputs) // batch_size
        for batch in rng.permutation(len(outputs))[: done * batch_size].reshape(done, batch_size):
            # The sum can end below 1 by rounding.
            drawn = np.minimum(
                np.searchsorted(cumulative, rng.random((batch_size, negatives)), "right"), len(counts) - 1
            )
            params, state, value = step(params, state, inputs[batch], outputs[batch], drawn)
            total += value
        yield params, float(total) / done


def nearest(
    vectors: Float[np.ndarray, "V D"], words: Sequence[str], word: str, count: int = 8
) -> list[tuple[str, float]]:
    """The words whose vectors have the largest cosines with a word's, and these.

    Raises:
      UserError: for a word that is not in the vocabulary.
    """
    if word not in words:
        raise UserError(f"{word!r} is not in the vocabulary of {len(words)} words")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    index = list(words).index(word)
    cosines = unit @ unit[index]
    order = [i for i in np.argsort(-cosines, kind="stable") if i != index][:count]
    return [(words[i], float(cosines[i])) for i in order]


def optimum(
    inputs: Int[np.ndarray, "E 1"],
    outputs: Int[np.ndarray, "E"],
    counts: np.ndarray,
    negatives: int,
    min_count: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(w, c, log(p(c | w) / p_n(c)) - log k) of the pairs that occur at least `min_count` times in skip-gram's examples."""
    size = len(counts)
    pairs, times = np.unique(inputs[:, 0].astype(np.int64) * size + outputs, return_counts=True)
    often = times >= min_count
    w, c = pairs[often] // size, pairs[often] % size
    totals = np.bincount(inputs[:, 0], minlength=size)
    return w, c, np.log(times[often] / totals[w] / noise(counts)[c]) - np.log(negatives)


def pmi_correlation(params: dict[str, Array], w: np.ndarray, c: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's correlation of v[w] . u[c] with what `optimum` expects."""
    products = np.einsum("nd,nd->n", np.asarray(params["input"])[w], np.asarray(params["output"])[c])
    return float(np.corrcoef(products, expected)[0, 1])


def save(path: str, words: Sequence[str], vectors: Float[np.ndarray, "V D"]) -> None:
    """Writes word2vec's text format: a line "words size", then a line for each word."""
    lines = [f"{len(words)} {vectors.shape[1]}"]
    lines += [f"{word} {' '.join(f'{x:.6g}' for x in vector)}" for word, vector in zip(words, vectors, strict=True)]
    write_atomically(pathlib.Path(path), ("\n".join(lines) + "\n").encode())


def main(arguments: list[str]) -> None:
    """The command; raises a UserError for what cannot be done."""
    parser = command.Parser(__doc__, prog="python -m data.word_embeddings")
    parser.add_argument("--corpus", default="auto", help="see data/corpora.py; its train split is read")
    parser.add_argument("--data_dir", help="folder of data sets that are read from one")
    parser.add_argument("--download", action="store_true", help="download a TFDS data set that is not prepared")
    parser.add_argument("--model", default="skipgram", choices=MODELS)
    parser.add_argument("--min_count", type=int, default=5, help="rarer words are left out")
    parser.add_argument("--size", type=int, default=100, help="numbers of a vector")
    parser.add_argument("--window", type=int, default=5, help="words to each side at most")
    parser.add_argument("--negatives", type=int, default=5, help="noise words drawn for each example")
    parser.add_argument(
        "--threshold", type=float, default=1e-3, help="frequency above which words are left out at times; 1 keeps all"
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over the text")
    parser.add_argument("--batch_size", type=int, default=2048, help="examples of a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of Adam, at the first step")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--vectors", help="file for the vectors, in word2vec's text format")
    parser.add_argument("--neighbours", default="", help="words joined by commas, whose nearest are printed")
    _run(**vars(parser.parse_args(arguments)))


def _run(
    corpus: str,
    data_dir: str | None,
    download: bool,
    min_count: int,
    vectors: str | None,
    neighbours: str,
    **options,
) -> None:
    """Trains, prints, and writes the vectors; `options` are those of `train`."""
    if vectors is not None:
        check_can_write("--vectors", vectors)
    text = (
        corpora.load(corpus, data_dir=data_dir, download=download)
        .splits["train"]
        .data.tobytes()
        .decode(errors="replace")
    )
    found = words_of(text)
    words, counts = vocabulary(found, min_count)
    index = {word: i for i, word in enumerate(words)}
    ids = np.array([index[word] for word in found if word in index], np.int32)
    asked = [word for word in neighbours.split(",") if word]
    for word in asked:
        if word not in index:
            raise UserError(f"--neighbours: {word!r} does not occur {min_count} times in the text")
    print(f"{len(ids):,} of {len(found):,} words, vocabulary {len(words):,}", flush=True)
    for epoch, result in enumerate(train(ids, counts, **options), 1):
        params, value = result
        print(f"epoch {epoch}/{options['epochs']}  loss {value:.4f}", flush=True)
    if options["model"] == "skipgram":
        rng = np.random.default_rng(options["seed"])
        pairs = examples(subsample(ids, counts, options["threshold"], rng), options["window"], "skipgram", rng)
        expected = optimum(*pairs, counts, options["negatives"], min_count=5)
        print(
            f"correlation with the shifted PMI of {len(expected[0]):,} pairs: {pmi_correlation(params, *expected):.3f}"
        )
    table = np.asarray(params["input"])
    for word in asked:
        near = ", ".join(f"{other} {cosine:.2f}" for other, cosine in nearest(table, words, word))
        print(f"{word}: {near}")
    if vectors is not None:
        save(vectors, words, table)


if __name__ == "__main__":
    command.run(main)
