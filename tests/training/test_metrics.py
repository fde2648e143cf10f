"""Metrics: the record survives crashes and resumed runs, and the progress line says what was measured."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from common.appended import Appended
from common.errors import UserError
from data.metrics import ACCURACY, bits_per
from training.metrics import MetricWriter, Progress, peak_flops, read_metrics


def lines(root):
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def events(path):
    """What an event file holds: length, 4 bytes, record, 4 bytes, and so on."""
    found, data = [], path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def scalars(root):
    """(tag, step) -> value of all event files."""
    paths = sorted(root.glob("events.out.tfevents.*"))
    told = [(event, value) for path in paths for event in events(path) for value in event.summary.value]
    return {(value.tag, event.step): value.simple_value for event, value in told}


def test_record(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": jnp.float32(0.1), "tokens": np.int64(7), "rate": 1e-4})
    assert lines(tmp_path) == [{"step": 1, "split": "train", "loss": float(np.float32(0.1)), "tokens": 7, "rate": 1e-4}]
    writer.write(1, "validation", {"loss": jnp.bfloat16(2.5), "done": np.True_})
    writer.close()
    assert lines(tmp_path)[1] == {"step": 1, "split": "validation", "loss": 2.5, "done": 1}
    assert read_metrics(tmp_path) == lines(tmp_path)
    found = scalars(tmp_path)
    assert set(found) == {
        (t, 1) for t in ("train/loss", "train/tokens", "train/rate", "validation/loss", "validation/done")
    }
    assert found["validation/loss", 1] == 2.5


def test_numbers_that_json_lacks(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"a": math.nan, "b": jnp.inf, "c": np.float32(-np.inf), "d": 1.0})
    writer.close()
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: 1 / 0)
    assert strict == {"step": 1, "split": "train", "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.0}
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"]) and line["b"] == math.inf and line["c"] == -math.inf
    MetricWriter(tmp_path, resume_step=1).close()
    assert lines(tmp_path) == [strict]


def test_resume(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (10, 20, 30, 40):
        writer.write(step, "train", {"loss": 1.0 * step})
    writer.write(20, "validation", {"loss": 5.0})
    writer.write(40, "validation", {"loss": 6.0})
    writer.close()
    resumed = MetricWriter(tmp_path, resume_step=25)
    kept = [("train", 10, 10.0), ("train", 20, 20.0), ("validation", 20, 5.0)]
    assert [(x["split"], x["step"], x["loss"]) for x in lines(tmp_path)] == kept
    resumed.write(20, "validation", {"loss": 7.0})  # recorded before: stays
    resumed.write(30, "train", {"loss": 31.0})
    resumed.close()
    assert [(x["split"], x["step"], x["loss"]) for x in lines(tmp_path)] == [*kept, ("train", 30, 31.0)]
    MetricWriter(tmp_path).close()
    assert lines(tmp_path) == []


def test_tensorboard_forgets_what_is_told_again(tmp_path):
    """After a kill before the first checkpoint, too, when nothing of the record is kept: a new session begins at that step."""
    writer = MetricWriter(tmp_path)
    writer.write(5, "train", {"loss": 1.0})
    writer.close()
    before = set(tmp_path.glob("events.out.tfevents.*"))
    for path in before:  # files are named by the second
        path.rename(path.with_name(f"{path.name}.first"))
    MetricWriter(tmp_path, resume_step=0).close()
    (path,) = (p for p in tmp_path.glob("events.out.tfevents.*") if not p.name.endswith(".first"))
    starts = [e.step for e in events(path) if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [1]


def test_a_record_without_checkpoints_is_kept(tmp_path, capsys):
    """Of a run whose checkpoints were taken away: an evaluation tells that there were some."""
    for loss in (1.0, 2.0):
        writer = MetricWriter(tmp_path)
        writer.write(1, "train", {"loss": loss})
        writer.write(1, "valid", {"loss": loss})
        writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    MetricWriter(tmp_path, resume_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and "begins anew" in capsys.readouterr().out
    MetricWriter(tmp_path).close()
    assert (tmp_path / "metrics.before-2.jsonl").read_bytes() == before and lines(tmp_path) == []
    assert json.loads((tmp_path / "metrics.before.jsonl").read_text().splitlines()[1])["loss"] == 1.0


def test_event_files_follow_each_other(tmp_path, monkeypatch):
    """Several launches within a second, and after the clock was set back: TensorBoard reads the files in order of their names."""
    for step, second in ((1, 1_000), (2, 1_000), (3, 500)):
        monkeypatch.setattr("time.time_ns", lambda second=second: second * 10**9)
        writer = MetricWriter(tmp_path, resume_step=step - 1)
        writer.write(step, "train", {"loss": 1.0 * step})
        writer.write(step + 1, "train", {"loss": -1.0})  # told again
        writer.close()
    shown = {}
    for path in sorted(tmp_path.glob("events.out.tfevents.*")):
        for event in events(path):
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = {step: value for step, value in shown.items() if step < event.step}
            for value in event.summary.value:
                shown[event.step] = value.simple_value
    assert shown == {1: 1.0, 2: 2.0, 3: 3.0, 4: -1.0}


def test_events_on_a_full_disk_are_an_error(tmp_path):
    """Of the step that they belong to. (A thread that had ended of it was waited for for ever.)"""
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    assert scalars(tmp_path) == {("train/loss", 1): 1.0}, "it is there at once"
    writer._events._file = open("/dev/full", "wb")
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(2, "train", {"loss": 1.0})


def test_cut_line(tmp_path, capsys):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "split": "tra')
    assert [x["step"] for x in read_metrics(tmp_path)] == [1]
    assert "metrics.jsonl, line 2 is no metrics: ignored" in capsys.readouterr().err
    writer = MetricWriter(tmp_path, resume_step=5)
    writer.write(2, "train", {"loss": 2.0})
    writer.close()
    assert [x["step"] for x in lines(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('[1]\n"x"\n{"step": 1}\n{"step": 3, "split": "a", "loss": 1}\n')
    assert read_metrics(tmp_path) == [{"step": 3, "split": "a", "loss": 1}]
    assert read_metrics(tmp_path / "nothing") == []
    damaged = ['{"step": "a", "split": "x"}', '{"step": 1, "split": ["x"]}', '{"step": 1, "split": "x", "loss": "low"}']
    damaged += ['{"step": 1, "split": "x", "loss": null}', '{"step": 1, "split": "x", "loss": [1]}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*damaged, '{"step": 3, "split": "a", "loss": "NaN"}']))
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 3 and np.isnan(line["loss"])


def test_a_cut_line_does_not_take_the_next_along(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\n{"b": ')
    for _ in range(2):
        file = Appended(tmp_path / "lines")
        file.write('{"c": 3}\n')
        file.close()
    assert (tmp_path / "lines").read_text().splitlines() == ['{"a": 1}', '{"b": ', '{"c": 3}', '{"c": 3}']


def test_mistakes(tmp_path):
    writer = MetricWriter(tmp_path)
    for values, message in [
        ({"loss": np.ones(2)}, "metric loss must be one number"),
        ({"loss": "1.0"}, "metric loss must be one number"),
        ({"loss": None}, "metric loss must be one number"),
        ({"step": 1.0}, "cannot be named 'step'"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(1, "train", values)
    writer.write(1, "train", {"loss": 1.0})
    with pytest.raises(ValueError, match="step 1 of train is recorded already"):
        writer.write(1, "train", {"accuracy": 1.0})
    writer.close()
    assert len(lines(tmp_path)) == 1


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_progress():
    now = [100.0]
    progress = Progress(
        1000,
        tokens_per_step=4096,
        metrics=(bits_per("byte"), ACCURACY),
        flops_per_step=2e12,
        peak=40e12,
        clock=lambda: now[0],
    )
    assert progress.rates(1) == {} and progress.line(1, {"loss": 9.0}) == "step    1/1000  loss 9.0000"
    now[0] = 300.0  # compilation does not count
    progress.start(2)
    now[0] = 301.0
    rates = progress.rates(12)
    assert rates == pytest.approx({"tokens_per_second": 40960.0, "mfu": 0.5})
    line = progress.line(12, {"loss": 2.34567, "accuracy": 0.25, "bits_per_byte": 1.5, "grad_norm": 3.0} | rates)
    assert (
        line
        == "step   12/1000  loss 2.3457  1.5000 bits per byte  accuracy 25.00 %  40,960 tokens/s  MFU 50.0%  ETA 0:01:39"
    )
    assert progress.rates(12) == {}  # no step since
    now[0] = 1301.0
    assert progress.rates(112) == pytest.approx({"tokens_per_second": 409.6, "mfu": 0.005})
    assert progress.line(112, {"loss": math.nan}) == "step  112/1000  loss nan  ETA 2:28:00"


def test_no_utilisation_without_a_known_peak():
    now = [0.0]
    for known in ({"flops_per_step": 1e12}, {"peak": 1e12}, {}):
        progress = Progress(10, 8, clock=lambda: now[0], **known)
        progress.start(0)
        now[0] += 1.0
        assert set(progress.rates(1)) == {"tokens_per_second"}


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H20", None),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peak(kind, peak):
    found = peak_flops(types.SimpleNamespace(device_kind=kind))
    assert found == (None if peak is None else pytest.approx(peak * 1e12))
