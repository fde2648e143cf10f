"""ListOps: values by an independent evaluator, the distribution of trees, floors, both protocols, the released files."""

import re
import statistics

import numpy as np
import pytest

from common.errors import UserError
from data import task
from data.tasks import listops
from data.tasks.listops import TOKENS
from tests.data.classification_rows import check, digest

PAPER = {"length": 2000, "min_length": 500, "max_depth": 10, "max_args": 10}


def value_of(words):
    """The value of an expression by a stack."""
    stack = []
    for word in words:
        if word == "X":
            arguments = []
            while not isinstance(stack[-1], str):
                arguments.append(stack.pop())
            name = stack.pop()
            value = {
                "[MIN": min,
                "[MAX": max,
                "[SM": lambda a: sum(a) % 10,
                "[MED": lambda a: int(statistics.median(a)),
            }
            stack.append(value[name](arguments))
        else:
            stack.append(word if word.startswith("[") else int(word))
    (result,) = stack
    return result


def depth_and_arguments(words):
    """The deepest level of a tree, counted from 1, and the numbers of arguments of its operations."""
    open_counts, counts, depth = [0], [], 1
    for word in words:
        if word == "X":
            counts.append(open_counts.pop())
            continue
        open_counts[-1] += 1
        depth = max(depth, len(open_counts))
        if word.startswith("["):
            open_counts.append(0)
    return depth, counts


@pytest.mark.parametrize(
    "split,index,options,expected",
    [
        ("train", 0, {}, "83ece952c00696cc"),
        ("train", 95_999, {}, "534cad34d49ba32e"),
        ("valid", 0, {}, "240b2a0ed0f197bc"),
        ("test", 1_999, {}, "70d5f7b1fde12eff"),
        ("train", 0, {"protocol": "s4"}, "cc62d3987738626d"),
        ("test", 0, PAPER, "57644b67e762e758"),
    ],
)
def test_rows_never_change(split, index, options, expected):
    listops = task.create("listops", **options)
    assert digest(listops.row(split, index, 0, 0)) == expected
    assert digest(listops.row(split, index, 7, 3)) == expected


@pytest.mark.parametrize("protocol", ["lra", "s4"])
@pytest.mark.parametrize("options", [{}, PAPER])
def test_labels_are_the_values_of_the_expressions(protocol, options):
    listops = task.create("listops", protocol=protocol, **options)
    low, high = (16, 64) if not options else (500, 2000)
    for split in listops.splits:
        for index in range(150 if not options else 8):
            row = check(listops, split, index)
            size = int(row["segment_ids"].sum())
            ids = row["inputs"][:size]
            if protocol == "s4":
                assert ids[-1] == 2 and ids[:-1].min() >= 3
                ids = ids[:-1]
            words = listops.decode(ids).split()
            assert low < len(words) < high
            assert value_of(words) == row["targets"]
            depth, counts = depth_and_arguments(words)
            assert depth <= listops.max_depth and min(counts) >= 2 and max(counts) <= listops.max_args
            np.testing.assert_array_equal(listops.encode(listops.decode(ids)), ids)


def test_trees_are_those_of_the_published_distribution():
    # With nothing rejected the root is a digit 3 times in 4; operators, digits and numbers of arguments are uniform.
    listops = task.create("listops", length=400, min_length=0, max_depth=3, max_args=4)
    rows = [[TOKENS[t] for t in listops.expression("train", i)[0]] for i in range(3000)]
    assert abs(np.mean([len(row) == 1 for row in rows]) - 0.75) < 0.03
    digits = [row[0] for row in rows if len(row) == 1]
    assert max(abs(digits.count(d) / len(digits) - 0.1) for d in TOKENS[:10]) < 0.03
    operations = [row for row in rows if len(row) > 1]
    assert max(abs(np.mean([row[0] == op for row in operations]) - 0.25) for op in TOKENS[10:14]) < 0.06
    counts = [depth_and_arguments(row)[1][-1] for row in operations]
    assert max(abs(counts.count(n) / len(counts) - 1 / 3) for n in (2, 3, 4)) < 0.07


def test_splits_are_disjoint_and_of_the_published_sizes():
    listops = task.create("listops")
    assert [listops.num_examples(split) for split in listops.splits] == [96_000, 2_000, 2_000]
    seen = [{listops.expression(split, i)[0] for i in range(1500)} for split in listops.splits]
    assert len(set.union(*seen)) == 4500


def at_the_root(words):
    """The root, the value of its own digits, and how many of its arguments are operations, at most 4: inner operations are cut
    out one by one."""
    inner, nested = " ".join(words[1:-1]), 0
    while "[" in inner:
        inner = re.sub(r"\[\w+ [^\[X]*X", "o", inner)
    nested = inner.count("o")
    digits = [word for word in inner.split() if word != "o"]
    return words[0], value_of([words[0], *digits, "X"]) if digits else None, min(nested, 4)


@pytest.mark.parametrize("length,options", [(256, {}), (32, {}), (300, {"max_depth": 4, "max_length": 60})])
def test_other_lengths(length, options):
    """Rows are as long as they were, relative to the length; released files have the lengths that they have."""
    listops = task.create("listops", **task.find("listops").at_length(options, length))
    sizes = [len(listops.expression("test", i)[0]) for i in range(200)]
    low, high = 16 * length / 64, options.get("max_length", 64) * length / 64
    assert low - 1 < min(sizes) and max(sizes) < high and np.median(sizes) > 1.2 * low
    assert task.find("listops").at_length(options, 64) == task.create("listops", **options).hyperparameters
    with pytest.raises(UserError, match="leave data_dir out"):
        task.find("listops").at_length({"data_dir": "somewhere"}, length)


def test_floors_by_counting():
    listops = task.create("listops")
    rows = [listops.row("train", i, 0, 0) for i in range(6000)]
    best = {}
    for first in range(1, 18):
        labels = [int(row["targets"]) for row in rows if row["inputs"][0] == first]
        best[first] = max(range(10), key=labels.count)  # the smallest of the most frequent
    labels = [int(row["targets"]) for row in rows]
    most = max(range(10), key=labels.count)
    held = [listops.row("test", i, 0, 0) for i in range(2000)]
    expected = {
        "majority": np.mean([row["targets"] == most for row in held]),
        "root operator": np.mean([row["targets"] == best[row["inputs"][0]] for row in held]),
    }
    table = {}
    for row in rows:
        table.setdefault(at_the_root(listops.decode(row["inputs"]).split()), []).append(int(row["targets"]))
    right = []
    for row in held:
        seen = table.get(at_the_root(listops.decode(row["inputs"]).split()))
        guess = max(range(10), key=seen.count) if seen else best[row["inputs"][0]]
        right.append(guess == row["targets"])
    expected["root, its digits, nested"] = np.mean(right)
    assert listops.floors("test") == pytest.approx(expected)
    assert expected["root, its digits, nested"] > 0.4 > expected["root operator"] > 0.2 > expected["majority"]


def test_released_files_are_read_and_cut(tmp_path):
    folder = tmp_path / "lra_release" / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    line = "( ( ( [MED 3 ) 4 ) ( ( ( [MAX 1 ) 7 ) ] ) ) ]\t4\r\n"
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        (folder / f"basic_{part}.tsv").write_text("Source\tTarget\r\n" + line * count)
    listops = task.create("listops", data_dir=str(tmp_path), length=8)
    assert [listops.num_examples(split) for split in listops.splits] == [3, 2, 1]
    row = check(listops, "test", 0)
    assert listops.decode(row["inputs"]) == "[MED 3 4 [MAX 1 7 X X" and row["targets"] == 4
    s4 = task.create("listops", protocol="s4", data_dir=str(tmp_path), length=8)
    assert s4.row("test", 0, 0, 0)["inputs"][-1] == 2
    assert listops.floors() == {"majority": 1.0, "root operator": 1.0, "root, its digits, nested": 1.0}
    assert listops.name == "listops/lra/released" and len(listops.fingerprint()) == 64
    (folder / "basic_val.tsv").write_text("Source\tTarget\n( [MIN 3 ) ten ] )\t4\n")
    with pytest.raises(ValueError, match=r"basic_val.tsv, row 0: .*'ten' is no token"):
        task.create("listops", data_dir=str(tmp_path), length=8)
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(UserError, match=r"basic_val.tsv is missing: fetch https://.*lra_release.gz"):
        task.create("listops", data_dir=str(tmp_path), length=8)


def test_bad_options():
    with pytest.raises(ValueError, match="protocol='s5' is unknown"):
        task.create("listops", protocol="s5")
    with pytest.raises(ValueError, match="max_length=99 is more than length=64"):
        task.create("listops", max_length=99)
    with pytest.raises(ValueError, match="at least 4 apart"):
        task.create("listops", min_length=61)
    with pytest.raises(ValueError, match="at most 5 tokens"):
        task.create("listops", max_depth=2, max_args=3, min_length=16)
    with pytest.raises(ValueError, match="max_args must be at least 2, got 1"):
        task.create("listops", max_args=1)


@pytest.mark.parametrize(
    "options",
    [
        {"length": 512, "min_length": 256, "max_args": 3},
        {"length": 2000, "min_length": 500, "max_depth": 10, "max_args": 2},
        {"length": 64, "min_length": 50, "max_args": 2},
    ],
)
def test_sizes_that_hardly_any_tree_has_are_refused(options, monkeypatch):
    """There is such a tree, and it would be drawn for ever."""
    monkeypatch.setattr(listops, "MOST_TOKENS", 10_000)
    with pytest.raises(UserError, match=r"tokens, drawn with .*, none has between .*: raise max_depth and max_args"):
        task.create("listops", **options)
    # Where the first row is found, another may not be.
    made = task.create("listops")
    made.min_length = 62
    with pytest.raises(UserError, match="none has between min_length=62 and max_length=64"):
        made.expression("test", 7)


def test_the_name_and_the_fingerprint_tell_data_sets_apart():
    tasks = [task.create("listops", **o) for o in ({}, {"protocol": "s4"}, {"max_depth": 5}, {"length": 128})]
    assert len({t.name for t in tasks}) == len({t.fingerprint() for t in tasks}) == 4
