"""The table of compiled primitives, for the CPU that is here, which needs no other compiler."""

import jax
import pytest

from benchmarks import compiled_ops
from benchmarks.cases import CASES
from common.errors import UserError

ROW = {"form": "chunked", "auto": True, "mode": "fwd", "compile_seconds": 2.0, "moved_bytes": 6e6, "fused_bytes": 2e6}


def test_rows_of_a_primitive():
    """A recurrence has two inputs, and so gradients, and an output, and so a cotangent, of [2, 16, 512] numbers of two bytes."""
    case = next(case for case in CASES if (case.primitive, case.variant) == ("linear_recurrence", "real"))
    programs = list(compiled_ops.programs(case, 16, 2, "fwdbwd", jax.devices()[0]))
    assert [names for names, _, _ in programs] == [["auto", "sequential"], ["reference"], ["associative"], ["blocked"]]
    row = compiled_ops.measured(*programs[0])
    assert (row["form"], row["auto"], row["flops"], row["trips"]) == ("sequential", True, 0, 16)
    assert row["fused_bytes"] == (2 + 1 + 1 + 2) * 2 * 2 * 16 * 512 < row["moved_bytes"]


def test_a_line_of_the_table():
    row = ROW | {"flops": 4e9, "flops_not_bf16": 1e9, "temporary_bytes": 3e6, "trips": 32}
    line = compiled_ops.cells(row)
    assert line == ["chunked (auto)", "fwd", "2.0", "6", "2", "3.0", "4.0", "25 %", "3", "32"]
    assert len(compiled_ops.cells(ROW | {"refused": "no"})) == len(line) == len(compiled_ops.HEAD)


@pytest.mark.parametrize(
    "option, message", [("--devices=v5", "v5p"), ("--lengths=1", "at least 2"), ("--batch=0", "at least 1")]
)
def test_options_that_are_refused(option, message, monkeypatch):
    monkeypatch.setattr(compiled_ops.command, "start", lambda **_: None)
    with pytest.raises(UserError, match=message):
        compiled_ops.main([option])
