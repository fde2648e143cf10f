"""Multi-query associative recall: the format, by a plain dictionary, and where the questions are."""

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest, scored


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize(("length", "pairs", "vocab"), [(32, 4, 64), (4, 1, 4), (50, 12, 27)])
def test_each_key_is_asked_for_once_behind_the_pairs(length, pairs, vocab, random_non_queries):
    mqar = task.create(
        "mqar", length=length, num_kv_pairs=pairs, vocab_size=vocab, random_non_queries=random_non_queries
    )
    for i in range(50):
        row = mqar.example("train", i)
        inputs = row["inputs"].tolist()
        value_of = dict(zip(inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(1 <= key < vocab // 2 <= value < vocab for key, value in value_of.items())
        answers = scored(row)
        assert sorted(inputs[t] for t in answers) == sorted(value_of)
        assert all(t >= 2 * pairs and t % 2 == 0 and answers[t] == value_of[inputs[t]] for t in answers)
        if not random_non_queries:
            assert all(inputs[t] == 0 for t in range(2 * pairs, length) if t not in answers)


def test_rows():
    check_rows(task.create("mqar"))
    assert digest(task.create("mqar")) == "855315495bd0aa4b"
    assert digest(task.create("mqar", random_non_queries=True, length=64)) == "50e62339ae3bd869"


def test_questions_follow_the_power_law():
    """The place of the first key's question, against drawing without replacement by the definition."""
    mqar = task.create("mqar", length=20, num_kv_pairs=2, power_a=0.5, vocab_size=8)
    p = np.arange(1, 9) ** -0.5
    p /= p.sum()
    first = np.zeros(8)
    for row in mqar.rows("test"):
        first[(np.flatnonzero(row["inputs"][4:] == row["inputs"][0])[0]) // 2] += 1
    np.testing.assert_allclose(first / first.sum(), p, atol=4 * np.sqrt(p.max() / 3000))
    second = np.zeros(8)
    for row in mqar.rows("test"):
        second[(np.flatnonzero(row["inputs"][4:] == row["inputs"][2])[0]) // 2] += 1
    expected = [sum(p[i] * p[j] / (1 - p[i]) for i in range(8) if i != j) for j in range(8)]
    np.testing.assert_allclose(second / second.sum(), expected, atol=4 * np.sqrt(p.max() / 3000))


def test_random_fillers_are_any_token():
    mqar = task.create("mqar", length=64, num_kv_pairs=1, vocab_size=8, random_non_queries=True)
    counts = np.bincount(np.concatenate([mqar.example("train", i)["inputs"][2:] for i in range(200)]), minlength=8)
    assert counts.min() > 0.09 * counts.sum()


def test_floors():
    mqar = task.create("mqar", length=16, num_kv_pairs=2, vocab_size=13)
    floors = mqar.floors("valid")
    assert floors["chance"] == pytest.approx(1 / 7) and floors["a value of the row"] == 0.5
    in_order = []
    for i in range(mqar.num_examples("valid")):
        row = mqar.example("valid", i)
        in_order += [answer == row["inputs"][2 * j + 1] for j, answer in enumerate(scored(row).values())]
    assert floors["values in order"] == pytest.approx(np.mean(in_order))


def test_mixtures_and_passes():
    """Rows of each setting as often as it says, the pairs twice; valid is of the task's own."""
    given = {"length": 40, "num_kv_pairs": 2, "num_passes": 2, "mixture": "20:3*3+36:6", "vocab_size": 32}
    mqar = task.create("mqar", **given)
    assert mqar.spec.length == 40
    seen = []
    for split, i in [("train", i) for i in range(300)] + [("valid", i) for i in range(20)]:
        row = mqar.example(split, i)
        inputs, answers = row["inputs"].tolist(), scored(row)
        pairs = len(answers)
        begin = 2 * pairs
        assert inputs[:begin] == inputs[begin : 2 * begin]
        value_of = dict(zip(inputs[0:begin:2], inputs[1:begin:2], strict=True))
        assert len(value_of) == pairs
        assert {inputs[t]: label for t, label in answers.items()} == value_of
        length = {3: 20, 6: 36, 2: 40}[pairs]
        assert min(answers) >= 2 * begin and max(answers) < length and not any(inputs[length:])
        if split == "train":
            seen.append(pairs)
        else:
            assert pairs == 2
    assert set(seen) == {3, 6} and np.mean(np.array(seen) == 3) == pytest.approx(0.75, abs=0.1)
    assert mqar.at_length(given, 24) == given | {"length": 24, "mixture": ""}
    with pytest.raises(ValueError, match="length=32 is less than 64, the longest of mixture="):
        task.create("mqar", mixture="32:4+64:8")
    for mixture in ("64", "64:4*0", "64x4", "8:1*" + "9" * 400, "9" * 5000 + ":1"):
        with pytest.raises(ValueError, match="is none of LENGTH:PAIRS"):
            task.create("mqar", mixture=mixture)
    with pytest.raises(ValueError, match="length=16 must be even and at least 4"):
        task.create("mqar", mixture="16:5")
    with pytest.raises(ValueError, match=r"at least 6 \* num_kv_pairs=24.* with num_passes=2"):
        task.create("mqar", length=16, num_passes=2)


def test_bad_sizes_say_what_to_change():
    for sizes in ({"length": 33}, {"length": 14}, {"num_kv_pairs": 0}):
        with pytest.raises(ValueError, match="must be even and at least 4"):
            task.create("mqar", **sizes)
    with pytest.raises(ValueError, match=r"vocab_size=8 has 3 keys and num_kv_pairs=4 .* at least 10"):
        task.create("mqar", vocab_size=8)
    task.create("mqar", vocab_size=10)
    with pytest.raises(ValueError, match="power_a=0"):
        task.create("mqar", power_a=0.0)


@pytest.mark.parametrize(("updates", "passes"), [(2, 1), (4, 2)])
def test_the_last_value_of_a_key_counts(updates, passes):
    mqar = task.create("mqar", num_updates=updates, num_passes=passes, length=48)
    for i in range(50):
        row = mqar.example("train", i)
        inputs, begin = row["inputs"].tolist(), 8 * passes + 2 * updates
        shown = list(zip(inputs[:begin:2], inputs[1:begin:2]))
        first, last = dict(shown[:4]), dict(shown)
        assert len(first) == len(last) == 4 and sum(first[key] != last[key] for key in first) == updates
        assert {inputs[t]: label for t, label in scored(row).items()} == last
    assert mqar.floors("valid")["first value"] == 1 - updates / 4
    with pytest.raises(ValueError, match="num_updates=5 must be 0 to num_kv_pairs=4"):
        task.create("mqar", num_updates=5)
    with pytest.raises(ValueError, match=r"4 \* num_kv_pairs \+ 2 \* num_updates=22, with at least one pair"):
        task.create("mqar", num_updates=3, length=20)
