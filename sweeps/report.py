"""What a sweep has found: `report.md`, `results.csv` and, where matplotlib is installed, plots."""

import csv
import dataclasses
import io
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from common.files import read_json, write_atomically
from data.metrics import Display
from models.accounting import Summary
from sweeps.cells import LOG, Cell, directory
from sweeps.request import Request
from sweeps.sizing import MEASURES, TOLERANCE, Sized
from training.command_line import ROOT
from training.metrics import read_metrics
from training.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells that differ in nothing but the seed.

    Attributes:
      values: of all axes but the seed.
      cells: one for each seed.
      results: of the finished ones, as `sweeps.result.write` makes them.
      metrics: recorded by them.
      cost, sized: of the model.
    """

    values: Mapping[str, str]
    cells: Sequence[Cell]
    results: Sequence[Mapping[str, Any]]
    metrics: Sequence[Sequence[Mapping[str, Any]]]
    cost: Summary | None
    sized: Sized | None

    @property
    def first(self) -> Mapping[str, Any]:
        """A result, for what they have in common."""
        return self.results[0]

    def label(self, common: Sequence[str] = ()) -> str:
        """Its values, without those of axes that all rows have in common."""
        shown = {key: value for key, value in self.values.items() if key not in common}
        return ", ".join(v if key == "mixer" else f"{key}={v}" for key, v in shown.items()) or "all"

    def test(self, length: int | None = None) -> tuple[float, float | None]:
        """Mean and half the interval of the test metric, at a length (by default that of training)."""
        return interval([result["test"][str(length or result["length"])] for result in self.results])

    def lengths(self) -> list[int]:
        """The lengths that all its cells are scored at."""
        return sorted(
            set.intersection(
                *({int(n) for n, value in result["test"].items() if value is not None} for result in self.results)
            )
        )

    def tokens_per_second(self) -> float | None:
        """Median speed of training."""
        speeds = [line["tokens_per_second"] for run in self.metrics for line in run if "tokens_per_second" in line]
        return statistics.median(speeds) if speeds else None


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float | None]:
    """The mean, and half the width of its confidence interval by the t distribution; None for less than two values."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2 or not math.isfinite(mean):
        return mean, None
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    return mean, quantile * statistics.stdev(values) / math.sqrt(count)


def rows(cells: Sequence[Cell]) -> list[Row]:
    """The cells by everything but their seed."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        values = {key: value for key, value in cell.values.items() if key != "seed"}
        groups.setdefault(tuple(values.items()), []).append(cell)
    made = []
    for values, members in groups.items():
        found = [(result, read_metrics(cell.workdir)) for cell in members if (result := cell.result()) is not None]
        results, metrics = [result for result, _ in found], [lines for _, lines in found]
        made.append(Row(dict(values), members, results, metrics, members[0].cost, members[0].sized))
    return made


def sections(all_rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that have results, those together that can be compared (task, data, metric and floors), best first."""
    groups: dict[str, list[Row]] = {}
    for row in all_rows:
        if row.results:
            same = repr([row.first.get(key) for key in ("task", "data", "metric", "floors", "length")])
            groups.setdefault(same, []).append(row)
    return [
        sorted(group, key=lambda row: row.test()[0] * (-1 if Display.read(row.first).higher_is_better else 1))
        for group in groups.values()
    ]


def common_axes(group: Sequence[Row]) -> list[str]:
    """The axes on which all rows have the same value, the mixer apart."""
    return [k for k in group[0].values if k != "mixer" and len({row.values[k] for row in group}) == 1]


def write(request: Request, cells: Sequence[Cell], errors: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Writes `report.md` and `results.csv` into the sweep's directory.

    Args:
      request: what was asked for.
      cells: all cells, whether they are finished or not.
      errors: of the failed cells, by name.
      arguments: of `sweep.py`, given in the current directory.
    """
    request.workdir.mkdir(parents=True, exist_ok=True)
    everything = rows(cells)
    write_atomically(request.workdir / "results.csv", _csv(request, cells, errors))
    text = [f"# {request.workdir.name}", _shell([_command("sweep.py", arguments)]), _method(request, cells)]
    groups = sections(everything)
    for group in groups:
        text += _section(group, len(groups) > 1)
    text += _not_matched(request, everything) + _diverged(cells) + _missing(cells, errors)
    text += ["## Commands", "What each row is made of, without the sweep.", _commands(everything)]
    write_atomically(request.workdir / "report.md", "\n\n".join(text) + "\n")


def _method(request: Request, cells: Sequence[Cell]) -> str:
    lines = [
        "Scores are of the test split, at the checkpoint that is best on the validation split; after ± is half the 95 % "
        "confidence interval of the mean over seeds (t distribution). Parameters, FLOPs (forward pass, per token, every "
        "primitive in its matmul form) and carry (bytes per sequence, at the task's length) are those of the whole model, "
        "derived from its trace. Tokens/s is the median over training, as fast as cells that ran beside it let it be."
    ]
    if request.match is not None:
        whose = "" if request.budget else f" of `mixer={request.axes['mixer'][0]}` at the configuration's width"
        budget = f"{request.budget:,.0f}" if request.budget else "that"
        what = {"params": "number of parameters", "flops": "FLOPs per token", "state": "carry"}[request.match]
        lines.append(f"Widths are solved for the same {what}: {budget}{whose}.")
    launches = [launch[-1] for cell in cells if (launch := read_json(RunDirectory(cell.workdir).environment))]
    for what, describe in {"Code": _code, "Device": _device}.items():
        found = sorted({text for launch in launches if (text := describe(launch))})
        if found:
            warning = " (**they differ between cells**)" if len(found) > 1 else ""
            lines.append(f"{what}: {'; '.join(found)}{warning}.")
    for row in rows(cells):
        data = {own for result in row.results for own in (result.get("data"), result.get("data_of_the_run")) if own}
        if len(data) > 1:
            lines.append(
                f"**The data of `{row.label()}` changed while it was run**: {', '.join(sorted(d[:12] for d in data))}."
            )
    return "\n\n".join(lines)


def _code(launch: Mapping[str, Any]) -> str | None:
    """The commit that a run was started from; None where the code was no checkout."""
    git = launch["git"]
    return git and f"commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}"


def _device(launch: Mapping[str, Any]) -> str:
    """What a run was started on."""
    devices = launch["devices"]
    return f"{devices['count']} x {devices['kind']}, jax {launch['packages']['jax']}"


def _section(group: Sequence[Row], several: bool) -> list[str]:
    """Title, table with the floors among the rows, and scores by length."""
    first, common = group[0].first, common_axes(group)
    metric = Display.read(first)
    show = lambda score: shown(score, metric)
    matched = any(row.sized is not None for row in group)
    shared = "".join(f", {key}={group[0].values[key]}" for key in common) if several else ""
    header = [
        "",
        f"test {metric.label}",
        "valid",
        "seeds",
        "width",
        "parameters",
        "FLOPs/token",
        "carry bytes",
        "tokens/s",
    ]
    if matched:
        header.insert(5, "budget met to")
    lines = []
    for row in group:
        seeds = f"{len(row.results)}" + (f" of {len(row.cells)}" if len(row.results) < len(row.cells) else "")
        valid = show((statistics.fmean(result["valid"] for result in row.results), None))
        width = row.cells[0].config["model"]["width"]
        cost, speed = row.cost, row.tokens_per_second()
        cells = [f"`{row.label(common)}`", show(row.test()), valid, seeds, f"{width}"]
        cells += [f"{cost.parameters:,}", f"{cost.flops_per_token:,.0f}"]
        cells += ["–" if x is None else f"{x:,.0f}" for x in (cost.carry_bytes, speed)]
        if matched:
            cells.insert(5, met(row.sized))
        lines.append((row.test()[0], cells))
    for name, value in first["floors"].items():
        lines.append((value, [f"*{name}*", f"*{show((value, None))}*"] + [""] * (len(header) - 2)))
    lines.sort(key=lambda line: line[0], reverse=metric.higher_is_better)
    better = "higher" if metric.higher_is_better else "lower"
    note = f"At length {first['length']:,}; {better} is better; trivial predictors (floors) in italics."
    text = [f"## {first['task']}{shared}", note, markdown(header, [cells for _, cells in lines])]
    lengths = sorted(set().union(*(row.lengths() for row in group)))
    if len(lengths) > 1:
        table = [
            [f"`{row.label(common)}`", *(show(row.test(n)) if n in row.lengths() else "–" for n in lengths)]
            for row in group
        ]
        text += [f"### test {metric.label} by length", markdown(["", *(f"{n:,}" for n in lengths)], table)]
    return text


def shown(score: tuple[float, float | None], metric: Display) -> str:
    """Mean ± half the interval."""
    mean, half = score
    return metric.number(mean) + ("" if half is None else f" ± {metric.scale * half:.{metric.digits}f}")


def met(sized: Sized | None) -> str:
    """How far a model is from its budget."""
    if sized is None or sized.deviation is None:
        return "**no carry**"
    return f"{100 * sized.deviation:+.1f} %" if sized.reached else f"**{100 * sized.deviation:+.1f} %**"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def _not_matched(request: Request, everything: Sequence[Row]) -> list[str]:
    """Which rows are not comparable, and why."""
    far = [row for row in everything if row.sized is not None and not row.sized.reached]
    if not far:
        return []
    lines = []
    for row in far:
        has = (
            "no carry at all" if row.sized.achieved is None else f"{row.sized.achieved:,.0f} at width {row.sized.width}"
        )
        lines.append(f"- `{row.label()}`: {has}, for a budget of {row.sized.budget:,.0f} ({met(row.sized)})")
    title = f"## Not within {100 * TOLERANCE:.0f} % of the budget"
    note = (
        f"No width brings these to the same {MEASURES[request.match].replace('_', ' ')}; they are run at the nearest."
    )
    return [title, note, "\n".join(lines)]


def _diverged(cells: Sequence[Cell]) -> list[str]:
    """Which cells have all their steps and have not learned. They are in no mean."""
    lines = [f"- `{cell.name}`: {why}" for cell in cells if (why := cell.diverged()) is not None]
    return ["## Diverged", "These have all their steps, and count nowhere above.", "\n".join(lines)] if lines else []


def _missing(cells: Sequence[Cell], errors: Mapping[str, str]) -> list[str]:
    lines = []
    for cell in cells:
        if cell.name in errors:
            log = "" if cell.error else f" (`{cell.name}/{LOG}`)"
            lines.append(f"- `{cell.name}`: {errors[cell.name]}{log}")
        elif cell.result() is None and cell.diverged() is None:
            lines.append(f"- `{cell.name}`: not finished")
    return ["## Failures and unfinished cells", "\n".join(lines)] if lines else []


def _command(program: str, arguments: Sequence[str]) -> str:
    """A command line. In the project's own directory it is that of the project's pages."""
    return shlex.join(["python", program if Path.cwd() == ROOT else str(ROOT / program), *arguments])


def _shell(commands: Sequence[str]) -> str:
    """Commands as text to be copied. Relative paths in them start from the current directory."""
    here = [] if Path.cwd() == ROOT else [f"cd {shlex.quote(str(Path.cwd()))}"]
    return "```\n" + "\n\n".join([*here, *commands]) + "\n```"


def _commands(everything: Sequence[Row]) -> str:
    """For each row a loop over its seeds: train.py, then eval.py."""
    blocks = []
    for row in everything:
        first = row.cells[0]
        seeds = [cell.values["seed"] for cell in row.cells if "seed" in cell.values]
        arguments = [a for a in first.arguments if not (seeds and a.startswith("--config.seed="))]
        workdir = shlex.quote(f"--workdir=runs/{directory(row.values) or 'all'}")
        trained = first.config["task"].get("length")
        lengths = row.lengths() if row.results else sorted({trained, *first.lengths} - {None})
        lengths = [f"--lengths={','.join(map(str, lengths))}"] if first.lengths else []
        train, score = _command("train.py", arguments), _command("eval.py", lengths)
        if seeds:
            block = f"for seed in {' '.join(seeds)}; do\n  {train} --config.seed=$seed {workdir}-$seed &&\n"
            blocks.append(block + f"  {score} {workdir}-$seed\ndone")
        else:
            blocks.append(f"{train} {workdir} &&\n  {score} {workdir}")
    return _shell(blocks)


def _csv(request: Request, cells: Sequence[Cell], errors: Mapping[str, str]) -> str:
    """One line for each cell."""
    lines = []
    for cell in cells:
        (row,) = rows([cell])
        why = cell.diverged()
        status = "failed" if cell.name in errors else "unfinished" if why is None else "diverged"
        line = {**cell.values, "status": status, "error": errors.get(cell.name, why)}
        line["width"] = cell.config["model"]["width"]
        if cell.cost is not None:
            line |= {key: getattr(cell.cost, key) for key in MEASURES.values()}
        if cell.sized is not None:
            line |= {"budget": cell.sized.budget, "budget_deviation": cell.sized.deviation}
        for result in row.results:
            kept = ("task", "metric", "length", "steps", "step", "valid")
            line |= {"status": "finished", "tokens_per_second": row.tokens_per_second()}
            line |= {key: result[key] for key in kept} | {"test": result["test"][str(result["length"])]}
            if len(row.lengths()) > 1:
                line |= {f"test_at_{length}": result["test"][str(length)] for length in row.lengths()}
        line["arguments"] = shlex.join(cell.arguments)
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line if name != "arguments"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, "arguments"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
