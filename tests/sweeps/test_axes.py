"""Values of axes: expressions, draws, and files that list cells."""

import numpy as np
import pytest
from scipy.stats import kstest

from common.errors import UserError
from sweeps import axes


@pytest.mark.parametrize(
    "text, values",
    [
        ("log:1e-4..1e-2:5", ["0.0001", "0.000316", "0.001", "0.00316", "0.01"]),
        ("log:1..100:3", ["1", "10", "100"]),
        ("lin:0..0.3:4", ["0", "0.1", "0.2", "0.3"]),
        ("lin:-1..1:3", ["-1", "0", "1"]),
        ("lin:512..1024:3", ["512", "768", "1024"]),
        ("lin:64..1984:31", [f"{n}" for n in range(64, 2048, 64)]),
        ("lin:0.99..0.9999:3", ["0.99", "0.99495", "0.9999"]),
        ("log:1000..10000:3", ["1000", "3160", "10000"]),
        ("log:1..1.0001:3", ["1", "1.00005", "1.0001"]),
        ("pow2:64..512", ["64", "128", "256", "512"]),
        ("pow2:0.25..2", ["0.25", "0.5", "1", "2"]),
        ("1e-3,(1,2)", ["1e-3", "(1,2)"]),
        ("file:log:1..2", ["file:log:1..2"]),
    ],
)
def test_expressions(text, values):
    assert axes.expand({"a": text}) == ({"a": values}, None)


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("log:1..2", {}, "is a range without a number of values"),
        ("log:2..1:3", {}, "must go up"),
        ("log:0..1:3", {}, "begins above 0"),
        ("log:1..2:1", {}, "at least two values"),
        ("lin:1..1.0000000000000002:9", {}, "more than there are numbers"),
        ("log:1..2:99999999999", {}, "at most 10,000 values"),
        ("pow2:1..1e400", {}, "from one number to another"),
        ("lin:-1e400..1:3", {}, "from one number to another"),
        ("lin:1..1.0000000000000002", {"draw": 9}, "more points than a can show"),
        ("log:1..2", {"draw": 10**9}, "--draw must be from 1 to 10000"),
        ("log:1..2", {"draw": 2, "seed": -1}, "--draw_seed must be at least 0"),
        ("pow2:3..8", {}, "powers of two"),
        ("pow2:1..8:2", {}, "takes no number"),
        ("log:1-2", {}, "is no range"),
        ("1,2", {"draw": 4}, "--draw needs an axis that is a range"),
        ("log:1..2", {"draw": 0}, "--draw must be from 1 to 10000"),
    ],
)
def test_expressions_that_have_no_meaning(text, options, message):
    with pytest.raises(UserError, match=message):
        axes.expand({"a": text}, **options)


def test_draws():
    """Points fill the ranges evenly, each in its measure; more of them go on where fewer ended; another seed has others."""
    given = {"lr": "log:1e-4..1e-2", "decay": "lin:0..1", "mixer": "gla,mamba"}
    over, points = axes.expand(given, draw=64)
    assert over == {"mixer": ["gla", "mamba"]} and len(points) == 64
    rates, decays = (np.array([float(point[key]) for point in points]) for key in ("lr", "decay"))
    for unit in ((np.log10(rates) + 4) / 2, decays):
        assert kstest(unit, "uniform").statistic < 0.05, "random points of that number would have some 0.1"
        assert all(np.histogram(unit, 8, (0, 1))[0] >= 6)
    assert abs(np.corrcoef(np.log(rates), decays)[0, 1]) < 0.1
    assert axes.expand(given, draw=16)[1] == points[:16]
    assert axes.expand(given, draw=16, seed=1)[1] != points[:16]


def test_where_a_grid_goes_on():
    log = ["0.0001", "0.001", "0.01"]
    assert axes.beyond(log, "0.01") == ["0.1", "1"] and axes.beyond(log, "0.0001") == ["1e-05", "1e-06"]
    assert axes.beyond(log, "0.001") == [] and axes.beyond(["3e-3", "1e-3"], "1e-3") == ["0.000333", "0.000111"]
    assert axes.beyond(["64", "128"], "128") == ["256", "512"] and axes.beyond(["0", "0.1"], "0.1") == ["0.2", "0.3"]
    assert axes.beyond(["adam", "lion"], "lion") == [] and axes.beyond(["1"], "1") == []


def test_a_file_that_lists_cells(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def cells():\n    return [{'mixer': m, 'seed': s} for m in ('gla', 'lru') for s in range(2)]\n")
    assert axes.listed(str(file))[1] == {"mixer": "gla", "seed": "1"}
    drawn = [{"lr": "0.1"}, {"lr": "0.2"}]
    assert axes.listed(str(file), drawn)[1] == {"mixer": "gla", "seed": "0", "lr": "0.2"}
    with pytest.raises(UserError, match="mixer is both drawn and of the listed cells"):
        axes.listed(str(file), [{"mixer": "gla"}])
    for text, message in (
        ("x = 1", "no function"),
        ("cells = lambda: []", "at least one"),
        ("cells = lambda: [{}]", "with keys"),
        ("cells = lambda: [{'a': 1}, {'b': 1}]", "same keys"),
        ("cells = lambda: [{'a': 1}, {'a': '1'}]", "there twice"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            axes.listed(str(file))
    (tmp_path / "cells.txt").write_text("mixer=gla")
    with pytest.raises(UserError, match="no function"):
        axes.listed(str(tmp_path / "cells.txt"))
    with pytest.raises(UserError, match="no such file"):
        axes.listed(str(tmp_path / "no.py"))
