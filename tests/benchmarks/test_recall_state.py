"""Recall against the carry: what is read from the reports of sweeps, and what is refused."""

import json

import pytest

from benchmarks import recall_state
from common.errors import UserError
from models import mixer as mixers

TUNED = (("1e-3", True, 0.5), ("1e-2", False, 0.6))  # rate, whether it was chosen, score


def sweep(folder, lines, length=64):
    """A directory with what a sweep leaves: mixer, width, seed, carry bytes and the score of each cell (None: not finished)."""
    text = ["mixer,model.width,seed,status,carry_bytes,task,metric,length,test"]
    for mixer, width, seed, carry, score in lines:
        status = "unfinished" if score is None else "finished"
        text.append(f"{mixer},{width},{seed},{status},{carry},mqar,accuracy,{length},{'' if score is None else score}")
    (folder / "cell").mkdir(parents=True)
    (folder / "results.csv").write_text("\n".join(text) + "\n")
    metric = {"metric": "accuracy", "higher_is_better": True, "unit": "%", "scale": 100.0, "digits": 2}
    result = {"task": "mqar", "length": length, "floors": {"chance": 0.1}, **metric}
    (folder / "cell" / "result.json").write_text(json.dumps(result))
    return folder


def test_points_and_stairs(tmp_path):
    """Seeds are one point, cells that are not finished none, and what is worse than a smaller carry is not on the stairs."""
    one = sweep(
        tmp_path / "one",
        [("gla", 32, 0, 100, 0.5), ("gla", 32, 1, 100, 0.7), ("gla", 64, 0, 400, 0.55), ("mamba", 64, 0, 300, None)],
    )
    two = sweep(tmp_path / "two", [("attention", 32, 0, 4000, 1.0), ("based", 32, 0, 4000, 0.9)])
    points, example = recall_state.read([one, two])
    shown = [(p.mixer, p.setting, p.carry, round(p.score, 6), len(p.scores)) for p in points]
    assert shown == [
        ("gla", "model.width=32", 100, 0.6, 2),
        ("gla", "model.width=64", 400, 0.55, 1),
        ("attention", "model.width=32", 4000, 1.0, 1),
        ("based", "model.width=32", 4000, 0.9, 1),
    ]
    best = recall_state.frontier(points, True)
    assert [p.mixer for p in best] == ["gla", "attention"] and best[0].carry == 100
    assert recall_state.frontier(points, False) == [points[0], points[1]]
    text = recall_state.table(points, best, 100)
    assert "60.00 ± 10.00" in text and text.count("*") == 2
    pytest.importorskip("matplotlib", reason="the picture is drawn by matplotlib, which is optional")
    recall_state.draw(points, best, example, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_of_tuned_axes_what_was_chosen(tmp_path):
    """A better score on the test split counts for nothing."""
    made = sweep(tmp_path / "tuned", [])
    lines = ["mixer,rate,status,chosen,carry_bytes,task,metric,length,test"]
    lines += [f"gla,{rate},finished,{chosen},100,mqar,accuracy,64,{test}" for rate, chosen, test in TUNED]
    (made / "results.csv").write_text("\n".join(lines) + "\n")
    points, _ = recall_state.read([made])
    assert [(p.setting, p.scores) for p in points] == [("rate=1e-3", (0.5,))]


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"holds no results.csv"):
        recall_state.read([tmp_path])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.csv").write_text("name,value\na,1\n")
    with pytest.raises(UserError, match=r"is no table of a sweep"):
        recall_state.read([tmp_path / "other"])
    none = sweep(tmp_path / "none", [("gla", 32, 0, 100, None)])
    with pytest.raises(UserError, match=r"no cell of .* is finished"):
        recall_state.read([none])
    short, long = (sweep(tmp_path / str(n), [("gla", 32, 0, 100, 0.5)], length=n) for n in (64, 128))
    with pytest.raises(UserError, match=r"not of one task.*length 64.*length 128"):
        recall_state.read([short, long])


def test_trainable():
    """Mixers that are only two-sided, or have no carry, are not asked for."""
    names = recall_state.trainable()
    assert {"attention", "gla", "lact"} <= set(names) and not {"fnet", "hydra"} & set(names)
    assert names == sorted(names) and set(names) <= set(mixers.names())
