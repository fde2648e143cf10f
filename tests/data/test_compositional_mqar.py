"""Keys of two tokens, by a plain dictionary."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize(
    ("length", "pairs", "vocab", "random"), [(64, 4, 96, False), (54, 9, 29, True), (6, 1, 6, False)]
)
def test_both_tokens_are_needed(length, pairs, vocab, random):
    made = task.create(
        "compositional_mqar", length=length, num_kv_pairs=pairs, vocab_size=vocab, random_non_queries=random
    )
    side = int(pairs**0.5)
    for i in range(50):
        row = made.example("train", i)
        inputs = row["inputs"].tolist()
        triples = [inputs[t : t + 3] for t in range(0, 3 * pairs, 3)]
        known = {(a, b): value for a, b, value in triples}
        assert len(known) == len(set(known.values())) == pairs
        assert len({a for a, _ in known}) == len({b for _, b in known}) == side
        assert all(1 <= a < vocab // 3 <= b < 2 * (vocab // 3) <= value < vocab for (a, b), value in known.items())
        answers = scored(row)
        assert {(inputs[t - 1], inputs[t]): label for t, label in answers.items()} == known
        assert all(t > 3 * pairs and (t - 1 - 3 * pairs) % 3 == 0 for t in answers)
        if not random:
            rest = set(range(3 * pairs, length)) - {t - s for t in answers for s in (0, 1)}
            assert not any(inputs[t] for t in rest)


def test_rows():
    made = task.create("compositional_mqar")
    check_rows(made)
    assert digest(made) == "8c9a9f0345c75c14"
    floors = {"chance": 1 / 32, "a value of the row": 1 / 4, "a value of half the key": 1 / 2}
    assert made.floors("valid") == pytest.approx(floors)
    soon = np.mean([min(scored(made.example("test", i))) for i in range(200)])
    late = task.create("compositional_mqar", power_a=1.0)
    assert soon < 16 < np.mean([min(scored(late.example("test", i))) for i in range(200)])


def test_bad_sizes():
    for options, message in (
        ({"num_kv_pairs": 5}, "num_kv_pairs=5 must be a square"),
        ({"length": 23}, "length=23 must be at least 6"),
        ({"vocab_size": 8}, "vocab_size=8 is too small"),
        ({"power_a": 0.0}, "power_a=0.0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            task.create("compositional_mqar", **options)
