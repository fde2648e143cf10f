"""The word problem: the groups by their laws, the products by a plain loop."""

import itertools

import numpy as np
import pytest

from data import task
from data.tasks.word_problem import multiplication_table, products
from tests.data.generated_rows import check_rows, digest, scored

ORDERS = {
    "parity": 2,
    "Z60": 60,
    "S3": 6,
    "A4": 12,
    "S5": 120,
    "A5": 60,
    "A4_x_Z5": 60,
    "A6": 360,
    "S6": 720,
    "Z2_x_Z2": 4,
}


@pytest.mark.parametrize(("group", "order"), ORDERS.items())
def test_tables_are_groups(group, order):
    table = multiplication_table(group)
    everything = np.arange(order)
    assert table.shape == (order, order) and table.dtype.kind == "i"
    np.testing.assert_array_equal(table[0], everything)
    np.testing.assert_array_equal(table[:, 0], everything)
    # Latin square, and associative (on random triples).
    np.testing.assert_array_equal(np.sort(table, 0), np.broadcast_to(everything[:, None], table.shape))
    np.testing.assert_array_equal(np.sort(table, 1), np.broadcast_to(everything, table.shape))
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 20_000))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table == table.T).all() == (group[0] in "pZ")


def test_the_groups_are_the_ones_of_the_names():
    """Elements by their orders, which tell these groups apart."""

    def element_orders(group):
        table = multiplication_table(group)
        orders = []
        for x in range(len(table)):
            power, n = x, 1
            while power:
                power, n = table[power, x], n + 1
            orders.append(n)
        return {n: orders.count(n) for n in set(orders)}

    assert element_orders("A5") == {1: 1, 2: 15, 3: 20, 5: 24}
    assert element_orders("S5") == {1: 1, 2: 25, 3: 20, 4: 30, 5: 24, 6: 20}
    assert element_orders("A4") == {1: 1, 2: 3, 3: 8}
    assert element_orders("Z6") == {1: 1, 2: 1, 3: 2, 6: 2}
    assert element_orders("Z2_x_Z3") == element_orders("Z6") != element_orders("S3")


def test_permutations_compose_right_to_left():
    table = multiplication_table("S4")
    elements = list(itertools.permutations(range(4)))
    for p, q in ((3, 17), (9, 9), (23, 4), (0, 11)):
        assert elements[table[p, q]] == tuple(elements[p][elements[q][i]] for i in range(4))


@pytest.mark.parametrize("group", ["parity", "S5", "A4_x_Z5"])
@pytest.mark.parametrize("length", [12, 16, 37])
def test_labels_are_running_products(group, length):
    word = task.create("word_problem", group=group, length=length, scored="all")
    table = multiplication_table(group).tolist()
    for split in word.splits:
        for i in range(5):
            row = word.example(split, i)
            state, expected = 0, {}
            for t, element in enumerate(row["inputs"].tolist()):
                state = table[state][element]
                expected[t] = state
            assert scored(row) == expected
    np.testing.assert_array_equal(products(np.array(table), np.zeros(1, int)), [0])


def test_parity_is_parity():
    row = task.create("word_problem", length=100).example("train", 3)
    np.testing.assert_array_equal(row["targets"], np.cumsum(row["inputs"]) % 2)


def test_evaluation_scores_the_last_position_and_says_so():
    last, every = (task.create("word_problem", scored=scored) for scored in ("last", "all"))
    assert last.spec.metric.name == "accuracy" and every.spec.metric.name == "row_accuracy"
    for split in ("valid", "test"):
        row, whole = last.example(split, 5), every.example(split, 5)
        np.testing.assert_array_equal(row["inputs"], whole["inputs"])
        assert scored(row) == {15: scored(whole)[15]} and len(scored(whole)) == 16
    assert len(scored(last.example("train", 5))) == 16
    assert every.floors("valid") == {"chance": 2.0**-15}
    # The sign of a permutation can be counted, and so can all but A4's Klein four-group of A4_x_Z5; A5 has nothing of it.
    for group, inside in (("S3", 3), ("A4_x_Z5", 4)):
        assert task.create("word_problem", group=group).floors("valid")["counting"] == 1 / inside
    assert "counting" not in task.create("word_problem", group="A5").floors("valid")
    answers = [int(row["targets"][-1]) for row in last.rows("valid")]
    assert last.floors("valid") == {"chance": 0.5, "majority": max(answers.count(0), answers.count(1)) / len(answers)}


def test_short_sequences_are_in_one_split_only():
    word = task.create("word_problem", length=12)
    seen = {split: {word.row(split, i, 0, 0)["inputs"].tobytes() for i in range(1000)} for split in word.splits}
    assert not seen["train"] & seen["valid"] and not seen["train"] & seen["test"] and not seen["valid"] & seen["test"]
    assert 100 < len(seen["valid"]) < 400 and 100 < len(seen["test"]) < 400 and len(seen["train"]) > 800


def test_rows():
    check_rows(task.create("word_problem", group="A5", length=25))
    check_rows(task.create("word_problem", length=32))
    assert digest(task.create("word_problem")) == "56443dc3c16d63f8"
    assert digest(task.create("word_problem", group="S5", length=25, scored="all")) == "e69cf95fdb054fd9"


def test_the_papers_form():
    """A token in front, training rows of all lengths, and blanks that nothing is asked of."""
    word = task.create("word_problem", group="S3", length=10, scored="all", bos=True, shortest=2)
    table, sizes = multiplication_table("S3"), set()
    assert (word.spec.length, word.spec.vocab_size, word.spec.metric.name) == (10, 8, "row_accuracy")
    for split in word.splits:
        for i in range(100):
            row = word.example(split, i)
            inputs = row["inputs"].tolist()
            size = sum(token < 6 for token in inputs)
            assert inputs[0] == 6 and inputs[size + 1 :] == [7] * (9 - size)
            state, expected = 0, {}
            for t, element in enumerate(inputs[1 : size + 1], 1):
                state = int(table[state, element])
                expected[t] = state
            assert scored(row) == expected
            sizes.add((split == "train", size))
    assert sizes == {(True, size) for size in range(2, 10)} | {(False, 9)}
    assert word.floors("valid")["chance"] == 6.0**-8
    with pytest.raises(ValueError, match="shortest=10 must be 1 to the 9 elements of a row"):
        task.create("word_problem", group="S3", length=9, shortest=10)


def test_bad_groups_say_what_to_give():
    for group in ("D5", "S", "Z0", "A4xZ5", "", "S5_x_"):
        with pytest.raises(ValueError, match="is no group; give 'parity', Zn, Sn or An"):
            task.create("word_problem", group=group)
    for group in ("S7", "A7", "Z1001", "Z60_x_Z60"):
        with pytest.raises(ValueError, match="more than 1000 elements"):
            task.create("word_problem", group=group)
    with pytest.raises(ValueError, match="'parity' has 2 elements and at length=11 fewer than 4096"):
        task.create("word_problem", length=11)
    with pytest.raises(ValueError, match="fewer than 4096"):
        task.create("word_problem", group="Z1", length=100)
    with pytest.raises(ValueError, match="scored='first'"):
        task.create("word_problem", scored="first")
