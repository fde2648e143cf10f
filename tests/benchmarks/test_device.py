"""The script for accelerators: its parts run without one, one that fails costs itself, a page keeps what is of other devices."""

import pytest

from benchmarks import device, device_parts
from benchmarks.cases import CASES
from models import mixer


def test_parts_are_of_what_there_is():
    assert set(device.MIXERS) <= set(mixer.names())
    assert set(device.PRIMITIVES) == {case.primitive for case in CASES}
    assert len(set(device.parts())) == len(device.parts())
    assert {(part.what, part.name) for part in device.parts()} == {
        *((what, name) for what in ("forms", "ops") for name in device.PRIMITIVES),
        *((what, name) for what in ("train", "decode") for name in device.MIXERS),
    }


def test_forms():
    rows = list(device_parts.forms("vandermonde_kernel", device_parts.SIZES[True]))
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        limit = 1e-5 if row["dtype"] == "float32" else 3e-2
        assert row["outputs"] < limit and row["gradients"] < limit, row


def test_a_wrong_form_shows(monkeypatch):
    case = next(case for case in CASES if case.variant == "window 256")
    wrong = lambda form, *inputs: case.function("reference", *inputs) * (1.5 if form == "blockwise" else 1)
    monkeypatch.setattr(
        "benchmarks.cases.CASES", (case._replace(function=wrong, implementations=("reference", "blockwise")),)
    )
    rows = {
        row["form"]: row
        for row in device_parts.forms("attention", device_parts.SIZES[True])
        if row["dtype"] == "float32"
    }
    assert rows["blockwise"]["outputs"] == pytest.approx(0.5, rel=1e-3) and rows["reference"]["outputs"] < 1e-6


@pytest.mark.thorough
def test_a_part_that_fails_costs_itself(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(
        device, "parts", lambda: [device.Part("train", "nothing", 60), device.Part("decode", "min_gru", 60)]
    )
    device.main(["--tiny", "--minutes=5", f"--json={tmp_path / 'out.json'}", f"--page={tmp_path / 'page.md'}"])
    shown = capsys.readouterr().out
    assert "train nothing: error: " in shown and "'nothing'" in shown
    assert "| min_gru | 2 |" in (tmp_path / "page.md").read_text()


def test_a_page_keeps_the_other_devices():
    page = device.inserted(device.TITLE, "## A\n\nfirst\n")
    page = device.inserted(page, "## B\n\nother\n")
    page = device.inserted(page, "## A\n\nsecond\n")
    assert page == device.TITLE + "\n## B\n\nother\n\n## A\n\nsecond\n"


def test_what_the_minutes_leave_out_is_named(capsys):
    device.main(["--tiny", "--minutes=0"])
    assert "Left out, since the time was over: forms attention, forms linear_attention" in capsys.readouterr().out
