"""Metrics of a run: `metrics.jsonl` is the record, TensorBoard's event files beside it and the progress line are views.

One line is one JSON object, {"step": 100, "split": "train", "loss": 2.5, ...}. JSON has no NaN and no infinity; they
are the strings "NaN", "Infinity" and "-Infinity", which Python's and pandas' conversions to float understand. On an object store
the record is in pieces (`common.appended`), and there are no event files.
"""

import itertools
import json
import math
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import appended, remote
from common.appended import Appended
from common.console import say
from common.files import write_atomically
from data.metrics import LOSS, Metric
from training.run_directory import RunDirectory, writing

# Peak dense bfloat16 FLOP/s with float32 accumulation of one JAX device, by device kind; the vendors' figures, halved
# where they are given with sparsity. TPU: docs.cloud.google.com/tpu/docs, the pages of the versions (a device is a
# chip, but one of the two cores of a v3 or TPU7x). NVIDIA: data sheets of A100, A10, H100, H200, L4, L40S, HGX B200
# and GB200 NVL72, white papers of GA102 (A40, RTX 3090, RTX A6000) and Ada (RTX 4090). AMD: data sheet of MI300X.
_PEAKS = {
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite|TPU v5e": 197e12,
    "TPU v5|TPU v5p": 459e12,
    "TPU v6 lite|TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100[ -].*": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL|NVIDIA H200 NVL": 835e12,
    "NVIDIA H100( .*)?|NVIDIA H200( .*)?|NVIDIA GH200( .*)?": 989e12,
    "NVIDIA B200( .*)?": 2250e12,
    "NVIDIA GB200( .*)?": 2500e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "AMD Instinct MI300X( .*)?": 1307.4e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device; None for one whose figure is not known, or a slice of one (MIG)."""
    kind = device.device_kind
    if "MIG" in kind:
        return None
    return next((peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, kind)), None)


class MetricWriter:
    """Writes the metrics of a run; a no-op in all processes but the first.

    Args:
      workdir: the run directory.
      resume_step: the step that the run goes on from. What was recorded of later steps is dropped, since it is about
        to be computed again.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int = 0):
        self._file = None
        if jax.process_index() != 0:
            return
        run = RunDirectory(remote.at(workdir))
        with writing(run.metrics):
            lines = read_metrics(workdir)
            kept = [line for line in lines if line["step"] <= resume_step]
            # The first evaluation is saved: where there is one and no checkpoint, it was taken away, or the disk was full.
            if not kept and any(line["split"] == "valid" for line in lines):
                _set_aside(run.metrics, lines)
        self._earlier = {(line["split"], line["step"]) for line in kept}
        self._written = set()
        with writing(run.metrics):
            appended.replace(run.metrics, "".join(_encode(line) for line in kept))
            self._file = Appended(run.metrics)
            self._events = None
            if remote.is_address(run.root):
                return
            self._events = Events(run.root, resume_step + 1)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Records numbers of one step of one split ("train", "validation", ...).

        What an earlier launch recorded stays as it is: a step is recorded once.

        Args:
          values: numbers or scalar arrays by name.

        Raises:
          ValueError: if a value is not one number, a name is "step" or "split", or this split of this step has been
            recorded by this launch.
        """
        if self._file is None or (split, step) in self._earlier:
            return
        if (split, step) in self._written:
            raise ValueError(f"step {step} of {split} is recorded already: write all its values at once")
        if clash := {"step", "split"} & set(values):
            raise ValueError(f"a metric cannot be named {clash.pop()!r}")
        values = {name: _number(name, value) for name, value in values.items()}
        self._written.add((split, step))
        with writing(self._file.path):
            self._file.write(_encode({"step": int(step), "split": split} | values))
            if self._events is not None:
                self._events.write(int(step), {f"{split}/{name}": value for name, value in values.items()})

    def lacks(self, step: int, split: str) -> bool:
        """Whether earlier launches have recorded nothing of a split of a step; False of several processes, of which one could
        tell."""
        return jax.process_count() == 1 and (split, step) not in self._earlier

    def flush(self) -> None:
        """Returns when what was recorded can be read: a checkpoint must not be ahead of the record."""
        if self._file is not None:
            with writing(self._file.path):
                self._file.flush()

    def close(self) -> None:
        """Writes what is left. Raises a RunDirectoryError if that cannot be done."""
        if self._file is not None:
            with writing(self._file.path):
                self._file.close()
                if self._events is not None:
                    self._events.close()


class Events:
    """TensorBoard's file of the events of one launch, each of which is in the file when `write` returns.

    The library's own writer leaves that to a thread. Where the disk is full the thread ends, and the run waits for it for ever.

    Args:
      folder: of the run.
      first: step from which on this launch tells: what others told of it and of later ones, TensorBoard is to forget.
    """

    def __init__(self, folder: Path, first: int):
        # The package imports PyTorch, for seconds, where that is installed.
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._checksum = event_pb2.Event, summary_pb2.Summary, masked_crc32c
        earlier = [re.search(r"tfevents\.(\d+)", path.name) for path in folder.glob("events.out.tfevents.*")]
        second, fraction = divmod(time.time_ns(), 10**9)
        # TensorBoard reads the files in order of their names, and clocks are set back.
        second = max([second, *(int(found[1]) + 1 for found in earlier if found)])
        name = f"events.out.tfevents.{second:010}.{socket.gethostname()}.{fraction:09}"
        self._file = (folder / name).open("xb")
        self._add(file_version="brain.Event:2")
        if earlier:
            self._add(step=first, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """Tells the numbers of a step, by their tags."""
        summary = self._summary()
        for tag, value in values.items():
            summary.value.add(tag=re.sub(r"[^-/\w.]", "_", tag), simple_value=float(value))
        self._add(step=step, summary=summary)

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        content = self._event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(content))
        sums = (struct.pack("<I", self._checksum(part)) for part in (size, content))
        self._file.write(size + next(sums) + content + next(sums))
        self._file.flush()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The recorded metrics of a run in order. A line that a crash has cut is reported and left out."""
    path = RunDirectory(remote.at(workdir)).metrics
    lines = {}
    for number, text in enumerate(appended.read(path), start=1):
        line = _decode(text)
        if line is None:
            print(f"{path}, line {number} is no metrics: ignored", file=sys.stderr)
        else:
            lines.setdefault((line["split"], line["step"]), line)
    return list(lines.values())


class Progress:
    """Speed of a run, and the line that tells of it.

    Args:
      steps: the step that the run ends with.
      tokens_per_step: over all devices.
      metrics: of the task, which the line shows beside the loss.
      flops_per_step: of the model (forward and backward, without recomputation), over all devices; None if not known.
      peak: peak FLOP/s of all devices together; None if not known. Without both there is no MFU.
      clock: time in seconds.
    """

    def __init__(
        self,
        steps: int,
        tokens_per_step: int,
        *,
        metrics: Sequence[Metric] = (),
        flops_per_step: float | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._steps = steps
        self._tokens = tokens_per_step
        self._metrics = (LOSS, *(metric for metric in metrics if metric != LOSS))
        self._utilisation = flops_per_step / peak if flops_per_step and peak else None
        self._clock = clock
        self._seconds = None
        self._since = None

    def start(self, step: int) -> None:
        """Measures from here: to be called after the first step, which compiles, and after evaluations."""
        self._since = step, self._clock()

    def rates(self, step: int) -> dict[str, float]:
        """Tokens per second and, if known, model FLOPs utilisation since the last call or `start`; {} at first."""
        now = self._clock()
        since, self._since = self._since, (step, now)
        if since is None or step <= since[0] or now <= since[1]:
            return {}
        self._seconds = (now - since[1]) / (step - since[0])
        rates = {"tokens_per_second": self._tokens / self._seconds}
        if self._utilisation is not None:
            rates["mfu"] = self._utilisation / self._seconds
        return rates

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """One line with those of the loss, the metrics, speed and MFU that are in `values`, and the time left."""
        forms = {
            "tokens_per_second": "{:,.0f} tokens/s",
            "mfu": "MFU {:.1%}",
        }
        parts = [f"step {step:>{len(str(self._steps))}}/{self._steps}"]
        parts += [metric.show(float(values[metric.name])) for metric in self._metrics if metric.name in values]
        parts += [form.format(float(values[name])) for name, form in forms.items() if name in values]
        if self._seconds is not None:
            minutes, seconds = divmod(round((self._steps - step) * self._seconds), 60)
            parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
        return "  ".join(parts)


def _set_aside(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Keeps the record of a run that begins anew."""
    names = itertools.chain(["metrics.before.jsonl"], (f"metrics.before-{i}.jsonl" for i in itertools.count(2)))
    kept = next(found for found in (path.with_name(name) for name in names) if not found.exists())
    write_atomically(kept, "".join(map(_encode, lines)))
    say(f"{path.parent} has no checkpoint and begins anew; what it had recorded is kept as {kept.name}")


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.ndim or array.dtype.kind in "OSU":
        raise ValueError(f"metric {name} must be one number, got {value!r}")
    return int(array) if array.dtype.kind in "biu" else float(array)


def _encode(line: Mapping[str, Any]) -> str:
    names = {math.inf: "Infinity", -math.inf: "-Infinity"}
    safe = {
        key: names.get(value, "NaN") if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(safe, allow_nan=False) + "\n"


def _decode(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or not isinstance(line.get("split"), str):
        return None
    try:
        return {key: value if key in ("step", "split") else _read_number(value) for key, value in line.items()}
    except (TypeError, ValueError):
        return None


def _read_number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)
