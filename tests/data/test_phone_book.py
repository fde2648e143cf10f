"""The phone book, by a dictionary of its lines."""

import re

import numpy as np
import pytest

from data import task
from tests.data.generated_rows import check_rows, digest


@pytest.mark.parametrize(("length", "depth"), [(512, None), (210, None), (3000, 0.0), (3000, 1.0)])
def test_the_number_is_in_the_book(length, depth):
    phone = task.create("phone_book", length=length, depth=depth)
    places = []
    for i in range(40):
        row = phone.example("test", i)
        text = phone.decode(np.append(row["inputs"], row["targets"][-1])).lstrip("\n")
        book, _, below = text.partition("\n\n")
        lines = book.split("\n")
        assert all(re.fullmatch(r"\w+ \w+: [2-9]\d\d-[2-9]\d\d-\d{4}", line) for line in lines)
        known = dict(line.split(": ") for line in lines)
        assert len(known) == len(lines)
        shown = [line.split(": ") for line in below.split("\n")]
        assert len(shown) == len(dict(shown)) == 3 and all(known[name] == number for name, number in shown)
        assert phone.decode(row["targets"][row["weights"] > 0]) == shown[-1][1]
        places.append(lines.index(": ".join(shown[-1])) / (len(lines) - 1))
        assert length + 1 - len(text) < 130
    if depth is None:
        assert np.ptp(places) > 0.7
    else:
        assert set(places) == {depth}


def test_rows():
    phone = task.create("phone_book")
    check_rows(phone, rows=8)
    assert digest(phone) == "c38525966469655c"
    assert phone.spec.metric.name == "row_accuracy" and 1 / 25 < phone.floors()["a number of the book"] < 1 / 12
    # Each place is as likely as another, the first and the last, too.
    rows = [phone.decode(phone.row("train", i, 0, 0)["inputs"]).lstrip("\n") for i in range(2000)]
    books = [text.partition("\n\n") for text in rows]
    known = [[line.partition(":")[0] for line in book.split("\n")] for book, _, _ in books]
    asked = [below.split("\n")[-1].partition(":")[0] for _, _, below in books]
    for place in (0, 1, -1):
        share = np.mean([lines[place] == name for lines, name in zip(known, asked)])
        assert share == pytest.approx(np.mean([1 / len(lines) for lines in known]), abs=0.02)
    # Of the entries two are shown, and never asked for.
    small = task.create("phone_book", length=204)
    texts = [small.decode(row["inputs"]) for row in small.rows("valid")]
    assert (
        small.floors("valid")["a number of the book"] == np.mean([1 / (text.count(": ") - 5) for text in texts]) > 0.3
    )
    with pytest.raises(ValueError, match="length=100 must be"):
        task.create("phone_book", length=100)
    with pytest.raises(ValueError, match=r"depth=2\.0 must be 0"):
        task.create("phone_book", depth=2.0)
