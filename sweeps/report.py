"""What a sweep has found: `report.md`, `results.csv` and, where matplotlib is installed, plots."""

import csv
import dataclasses
import io
import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import make_directory, read_json, write_atomically
from data.metrics import Display
from sweeps import fits, jobs, tuning
from sweeps.cells import LOG, Cell, directory
from sweeps.comparison import Difference, compare
from sweeps.request import Request
from sweeps.rows import Row, common_axes, grids, interval, rows, sections
from sweeps.sizing import IN_WORDS, MEASURES, TOLERANCE, Sized
from sweeps.tuning import Choice
from training.command_line import ROOT
from training.run_directory import RunDirectory

TABLE, REPORT = "results.csv", "report.md"


def write(request: Request, cells: Sequence[Cell], errors: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Writes `report.md` and `results.csv` into the sweep's directory.

    Args:
      request: what was asked for.
      cells: all cells, whether they are finished or not.
      errors: of the failed cells, by name.
      arguments: of `sweep.py`, given in the current directory.
    """
    make_directory(request.workdir)
    everything = rows(cells)
    choices = tuning.choose(request, everything, list(errors)) if request.best_of else []
    write_atomically(request.workdir / TABLE, _csv(request, cells, errors, choices))
    text = [f"# {request.workdir.name}", _shell([_command("sweep.py", arguments)]), _method(request, cells)]
    compared = [choice.chosen for choice in choices if choice.chosen] if choices else everything
    groups = sections(compared)
    # Where nothing could be chosen, since every value has cells that diverged, there is a line, too, of all of these cells.
    none = [choice for choice in choices if choice.chosen is None and choice.complete]
    whole = [
        dataclasses.replace(c.candidates[0], cells=[cell for row in c.candidates for cell in row.cells], results=[])
        for c in none
    ]
    lost = [row for row in (*compared, *whole) if not row.results and row.diverged()]
    for group in groups:
        text += _section(request, group, len(groups) > 1, choices, lost if len(groups) == 1 else ())
    text += (
        _tuning(request, choices, arguments)
        + fits.report(request.fit, everything, compared, request.best_of)
        + _not_matched(request, everything)
        + _diverged(cells)
        + _missing(cells, errors)
    )
    text += ["## Commands", "What each row is made of, without the sweep.", _commands(compared)]
    write_atomically(request.workdir / REPORT, "\n\n".join(text) + "\n")


def _method(request: Request, cells: Sequence[Cell]) -> str:
    lines = [
        "Scores are of the test split, at the checkpoint that is best on the validation split; after ± is half the 95 % "
        "confidence interval of the mean over seeds (t distribution). Parameters, FLOPs (forward pass, per token, every "
        "primitive in its matmul form) and carry (bytes per sequence, at the task's length) are those of the whole model, "
        "derived from its trace. Tokens/s is the median over training, as fast as cells that ran beside it let it be."
    ]
    if request.match is not None:
        whose = "" if request.budget else f" of `mixer={request.first_mixer}` at the configuration's width"
        budget = f"{request.budget:,.0f}" if request.budget else "that"
        what = IN_WORDS[request.match]
        lines.append(f"Widths are solved for the same {what}: {budget}{whose}.")
    if request.best_of:
        with_ = " with seed 0" if request.seeds_of_best else ", with the best mean over seeds"
        lines.append(
            f"`{'`, `'.join(request.best_of)}` {'is' if len(request.best_of) == 1 else 'are'} tuned: what is shown was chosen on "
            f"the validation split{with_}, out of the values under Tuning. Scores on the test split chose nothing."
        )
    if hours := _hours(cells):
        lines.append(hours)
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


def _hours(cells: Sequence[Cell]) -> str:
    """What the cells have taken, over all attempts."""
    made = [attempt for cell in cells for attempt in jobs.attempts(cell.workdir)]
    hours = sum(attempt.seconds * (attempt.devices or 1) for attempt in made) / 3600
    if not made:
        return ""
    lost = sum(a.seconds * (a.devices or 1) for a in made if a.status not in ("finished", "interrupted")) / 3600
    why = f", of which {lost:.3g} in attempts that failed, diverged or were lost" if lost else ""
    return f"Total: {hours:.3g} device-hours in {len(made)} attempts at {len(cells)} cells{why}."


def _code(launch: Mapping[str, Any]) -> str | None:
    """The commit that a run was started from; None where the code was no checkout."""
    git = launch["git"]
    return git and f"commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}"


def _device(launch: Mapping[str, Any]) -> str:
    """What a run was started on."""
    devices = launch["devices"]
    return f"{devices['count']} x {devices['kind']}, jax {launch['packages']['jax']}"


def _section(
    request: Request, group: Sequence[Row], several: bool, choices: Sequence[Choice], lost: Sequence[Row]
) -> list[str]:
    """Title, table with the floors among the rows, and scores by length."""
    first, common = group[0].first, [key for key in common_axes(group) if key not in request.best_of]
    hidden = [*common, *request.best_of]
    metric = Display.read(first)
    show = lambda score: shown(score, metric)
    reference, differences = compare(request, group)
    diverged = any(row.diverged() for row in (*group, *lost))
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
    if diverged:
        header.insert(4, "diverged")
    if differences:
        named = request.reference or "the best"  # which may be another row for each
        header.insert(4, f"difference to {reference.label(hidden) if reference else named}")
    header[1:1] = [f"chosen {key}" for key in request.best_of]
    lines = []
    for row in group:
        seeds = f"{len(row.results)}" + (f" of {len(row.cells)}" if len(row.results) < len(row.cells) else "")
        valid = show((statistics.fmean(result["valid"] for result in row.results), None))
        width = row.cells[0].config["model"]["width"]
        cost, speed = row.cost, row.tokens_per_second()
        cells = [f"`{row.label(hidden)}`", show(row.test()), valid, seeds, f"{width}"]
        cells += [f"{cost.parameters:,}", f"{cost.flops_per_token:,.0f}"]
        cells += ["–" if x is None else f"{x:,.0f}" for x in (cost.carry_bytes, speed)]
        if matched:
            cells.insert(5, met(row.sized))
        if diverged:
            cells.insert(4, f"{row.diverged()} of {len(row.cells)}")
        if differences:
            cells.insert(4, difference(differences[id(row)], metric, row.test()[0]))
        cells[1:1] = [_chosen(row, key, choices) for key in request.best_of]
        lines.append((row.test()[0], cells))
    for name, value in first["floors"].items():
        line = [f"*{name}*", *[""] * len(request.best_of), f"*{show((value, None))}*"]
        lines.append((value, line + [""] * (len(header) - len(line))))
    lines.sort(key=lambda line: line[0], reverse=metric.higher_is_better)
    for row in lost:  # worse than all
        count, place = f"{row.diverged()} of {len(row.cells)}", header.index("diverged")
        line = [f"`{row.label(hidden)}`", *[""] * (len(header) - 1)]
        line[1 + len(request.best_of)], line[place] = "diverged", count
        lines.append((math.nan, line))
    better = "higher" if metric.higher_is_better else "lower"
    note = f"At length {first['length']:,}; {better} is better; trivial predictors (floors) in italics."
    if any(one is not None and one.half is not None for one in differences.values()):
        note += (
            " Differences are paired over seeds, with half their 95 % interval; one is called better or worse where it is clear "
            "after Holm's correction for all rows, else =."
        )
    elif differences:
        note += " With one seed, nothing can be said of whether a difference is chance."
    elif request.reference is not None and len(group) > 1:
        note += f" No row has a result of a seed that {request.reference}, the reference, has one of."
    text = [f"## {first['task']}{shared}", note, markdown(header, [cells for _, cells in lines])]
    lengths = sorted(set().union(*(row.lengths() for row in group)))
    if len(lengths) > 1:
        table = [
            [f"`{row.label(hidden)}`", *(show(row.test(n)) if n in row.lengths() else "–" for n in lengths)]
            for row in group
        ]
        text += [f"### test {metric.label} by length", markdown(["", *(f"{n:,}" for n in lengths)], table)]
    return text + _by_settings(group, hidden)


def _by_settings(group: Sequence[Row], hidden: Sequence[str]) -> list[str]:
    """Scores under other settings of the task, a table for each metric, with the floor that is hardest to beat."""
    text = []
    for metric, columns in grids(group):
        lines = []
        for row in group:
            found = row.grid()
            scores = (interval([e["score"] for e in found[words]]) if words in found else None for words in columns)
            lines.append([f"`{row.label(hidden)}`", *("–" if s is None else shown(s, metric) for s in scores)])
        hardest = max if metric.higher_is_better else min
        floors = [next(row.grid()[words][0]["floors"] for row in group if words in row.grid()) for words in columns]
        best = [shown((hardest(own.values()), None), metric) if own else "–" for own in floors]
        lines.append(["*best floor*", *(f"*{value}*" for value in best)])
        text += [f"### test {metric.label} by settings of the task", markdown(["", *columns], lines)]
    return text


def shown(score: tuple[float, float | None], metric: Display) -> str:
    """Mean ± half the interval."""
    mean, half = score
    return metric.number(mean) + ("" if half is None else f" ± {metric.number(half, mean)}")


def difference(found: Difference | None, metric: Display, score: float) -> str:
    """Mean ± half the interval, and what it says, in the form of the score; nothing for the reference itself."""
    if found is None:
        return ""
    sign = "+" if found.mean >= 0 else "−"
    size = f"{sign}{metric.number(abs(found.mean), score)}"
    return size if found.half is None else f"{size} ± {metric.number(found.half, score)} {found.verdict}"


def _chosen(row: Row, key: str, choices: Sequence[Choice]) -> str:
    """The value of a tuned axis, and whether it is at the edge, or all there is so far."""
    choice = next(choice for choice in choices if choice.chosen is row)
    value = row.values[key]
    if key in choice.edges:
        value = f"**{value}** (edge of the grid)"
    return value if choice.complete else f"{value} (so far)"


def _tuning(request: Request, choices: Sequence[Choice], arguments: Sequence[str]) -> list[str]:
    """Every value and its score on validation; and how a grid is extended whose best is at its edge."""
    if not choices:
        return []
    text = ["## Tuning"]
    keys = ", ".join(request.best_of)
    text.append(
        f"Scores on the validation split by {keys}; the chosen one in bold, – has not been run, × failed or diverged."
    )
    columns = list(
        dict.fromkeys(tuple(row.values[k] for k in request.best_of) for c in choices for row in c.candidates)
    )
    lines = []
    for choice in choices:
        shown_at = {}
        for row, score in zip(choice.candidates, choice.scores):
            display = Display.read(row.first) if row.results else None
            text_ = (
                "–" if score is None else "×" if not math.isfinite(score) or display is None else display.number(score)
            )
            shown_at[tuple(row.values[k] for k in request.best_of)] = f"**{text_}**" if row is choice.chosen else text_
        label = ", ".join(v if k == "mixer" else f"{k}={v}" for k, v in choice.values.items()) or "all"
        lines.append([f"`{label}`", *(shown_at.get(column, "") for column in columns)])
    text.append(markdown(["", *(", ".join(column) for column in columns)], lines))
    extended: dict[str, list[str]] = {}
    for choice in choices:
        for key, values in choice.edges.items():
            extended[key] = list(dict.fromkeys([*extended.get(key, []), *values]))
    for key, values in extended.items():
        at = [", ".join(map(str, c.values.values())) or "all" for c in choices if key in c.edges]
        text.append(f"**The best {key} is at the edge of the grid** for {', '.join(at)}. The grid that goes on there:")
        text.append(_shell([_command("sweep.py", _with_values(arguments, key, [*request.grid[key], *values]))]))
    return text


def _with_values(arguments: Sequence[str], key: str, values: Sequence[str]) -> list[str]:
    """A command line with other values of an axis."""
    axis = re.compile(f"(--over=)?{re.escape(key)}=")
    return [f"{found[0]}{','.join(values)}" if (found := axis.match(argument)) else argument for argument in arguments]


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
    """Which cells have not learned."""
    lines = [f"- `{cell.name}`: {why}" for cell in cells if (why := cell.diverged()) is not None]
    return (
        ["## Diverged", "These have all their steps, or were stopped; they are in no mean.", "\n".join(lines)]
        if lines
        else []
    )


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
        under = f" &&\n  {_command('eval.py', ['--set', *first.score])}" if first.score else ""
        if seeds:
            block = f"for seed in {' '.join(seeds)}; do\n  {train} --config.seed=$seed {workdir}-$seed &&\n"
            under = f"{under} {workdir}-$seed" if under else ""
            blocks.append(block + f"  {score} {workdir}-$seed{under}\ndone")
        else:
            blocks.append(f"{train} {workdir} &&\n  {score} {workdir}" + (f"{under} {workdir}" if under else ""))
    return _shell(blocks)


def _csv(request: Request, cells: Sequence[Cell], errors: Mapping[str, str], choices: Sequence[Choice]) -> str:
    """One line for each cell."""
    lines = []
    chosen = {cell.name for choice in choices if choice.chosen for cell in choice.chosen.cells}
    for cell in cells:
        (row,) = rows([cell])
        why = cell.diverged()
        status = "failed" if cell.name in errors else "unfinished" if why is None else "diverged"
        line = {**cell.values, "status": status, "error": errors.get(cell.name, why)}
        if choices:
            line["chosen"] = cell.name in chosen
        line["attempts"] = len(jobs.attempts(cell.workdir))
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
            line |= {f"{own['metric']} with {words}": own["score"] for words, (own,) in row.grid().items()}
        line["arguments"] = shlex.join(cell.arguments)
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line if name != "arguments"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, "arguments"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
