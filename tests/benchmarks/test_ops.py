"""The benchmark of the primitives runs, computes the same in every row, and says what it leaves out."""

import json

import numpy as np
import pytest

from benchmarks import ops
from benchmarks.cases import CASES
from benchmarks.peers import PEERS
from benchmarks.timing import Clock, Expectation, Program, measure
from common.errors import UserError

pytestmark = pytest.mark.xdist_group("benchmarks.ops")  # one process makes the rows


pytestmark = pytest.mark.xdist_group("benchmark")  # whose table is made once


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "ops.json"
    ops.run(ops.parse(["--lengths", "8", "--mode", "fwdbwd", "--rounds", "1", "--json", str(path)]))
    return json.loads(path.read_text())


def test_every_case_says_what_it_is_compared_with():
    assert {(case.primitive, case.variant) for case in CASES} == set(PEERS)


@pytest.mark.thorough
def test_every_case_has_rows_and_peers(smoke):
    for case in CASES:
        rows = [row for row in smoke["results"] if (row["primitive"], row["variant"]) == case[:2]]
        assert any(row["auto"] for row in rows)
        installed = {peer.name for peer in PEERS[case.primitive, case.variant] if not peer.missing}
        assert {row["implementation"] for row in rows if row["peer"]} == installed
    offered = {r["implementation"] for r in smoke["results"] if r["variant"] == "decay per head" and not r["peer"]}
    assert offered == {"reference", "sequential", "chunked"}


@pytest.mark.thorough
def test_every_row_computes_the_same(smoke):
    for row in smoke["results"]:
        assert row["note"] == "" and row["difference"] < 1e-4, row
        assert row["milliseconds"] > 0 and row["to_fastest"] >= 1


def test_the_table_has_a_line_for_each_row_and_aligned_columns():
    case = next(case for case in CASES if case.primitive == "vandermonde_kernel")
    records = ops.run_case(case, [4, 3], ["fwd", "fwdbwd"], 2, 10.0, True)
    title, head, *lines = ops.table(records, ["fwd", "fwdbwd"]).splitlines()
    assert title == "vandermonde_kernel, S4D (D32 N32, float32)"
    assert len(lines) == len(records) / 2 and [line.split()[0] for line in lines][:: len(lines) // 2] == ["3", "4"]
    end = head.index("fwd ms") + len("fwd ms")
    for line, record in zip(lines, [r for r in records if r["mode"] == "fwd"], strict=True):
        assert float(line[:end].split()[-1]) == pytest.approx(record["milliseconds"], rel=0.01)
        assert len(record["milliseconds_of_rounds"]) == 2


def test_a_wrong_alternative_shows():
    programs = [
        Program(name, False, lambda y=y: (lambda: [np.full(3, y)], 0)) for name, y in (("one", 1.0), ("two", 2.0))
    ]
    measure(programs, 1, 1.0, Clock())
    assert [program.difference for program in programs] == [0.0, 1.0]


def test_what_is_not_measured_is_said():
    case = next(case for case in CASES if case.primitive == "vandermonde_kernel")
    records = ops.run_case(case, [4], ["fwd"], 3, 1e-9, False)
    assert "first call only" in ops.table(records, ["fwd"])

    slow, broken, large = (Program(name, True, lambda: (lambda: 1 / 0, 0)) for name in ("slow", "broken", "large"))
    large.prepare = lambda: (lambda: [], 10**12)
    expectation = Expectation()
    for length, seconds in ((16, 1.0), (32, 4.0)):
        slow.samples = [seconds]
        expectation.learn(length, [slow])
    slow.samples = []
    measure([slow, broken, large], 1, 10.0, Clock(), expectation.at(64))
    assert slow.note == "not run: about 16 s a call"
    assert broken.note == "failed: ZeroDivisionError: division by zero"
    assert large.note == "not run: 1000 GB of temporaries"
    assert not (slow.samples or broken.samples or large.samples)


def test_own_failures_are_raised():
    with pytest.raises(ZeroDivisionError):
        measure([Program("own", False, lambda: (lambda: 1 / 0, 0))], 1, 1.0, Clock())


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="choose from attention, linear_attention"):
        ops.parse(["--primitive", "linear_attenton"])
