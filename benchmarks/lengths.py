"""What a token costs by the length of the sequence: time and memory of one mixer, forward and backward, and its compilation.

    python -m benchmarks.lengths --mixers=mamba,gla,attention --lengths=512,8192,131072
    python -m benchmarks.lengths --json=lengths.json --png=lengths.png          every causal mixer; goes on with what the file has
    python -m benchmarks.lengths --plan --lengths=2048                          memory and compilation alone, nothing is run

One sequence, one mixer at the width --width with its defaults, in float32; the sum of its outputs under random weights is
differentiated with respect to inputs and parameters. A mixer whose cost per token is constant has equal numbers in a row.

Columns: seconds of CPU time to trace and compile the shortest length, and the equations of its program; then for each length
microseconds a token (CPU time on one core, or the device's); kB a token of temporaries, as XLA plans them, of
residuals, which the backward pass is handed by the forward pass (a policy of rematerialisation may leave less), and of what the
compiled program reads and writes of memory (`compilation.moved`). A cell that is expected to take longer than --budget seconds
is left out, as "-".
"""

import functools
import json
import math
import pathlib
import statistics
import sys
import time

import jax
from flax import nnx
from jax.extend.core import jaxprs_in_params

from benchmarks.timing import Clock, earlier, environment, settle_process
from common import command
from compilation.hlo import Program
from compilation.moved import moved
from models import mixer as mixers

LENGTHS = tuple(2**n for n in (9, 11, 13, 15, 17, 20))
MEMORY = 16 * 2**30  # bytes of temporaries above which a length is not run


def program(name: str, width: int, length: int):
    """(arguments, a function of them with the outputs and all gradients, bytes of its residuals)."""
    cls = mixers.find(name)
    graph, params = nnx.split(mixers.create(name, width, rngs=nnx.Rngs(0), causal=cls.causal, length=length))
    x, weight = jax.random.normal(jax.random.key(0), (2, 1, length, width))
    forward = lambda params, x: nnx.merge(graph, params)(x)[0]

    def run(params, x, weight):
        y, pull_back = jax.vjp(forward, params, x)
        return y, pull_back(weight)

    kept = jax.eval_shape(lambda params, x: jax.vjp(forward, params, x)[1], params, x)
    known = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, x)))
    residuals = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    return (params, x, weight), jax.jit(run), max(0, residuals - known)


def measure(name: str, options, row: dict) -> None:
    """Fills in the lengths that `row` lacks, from the shortest; longer ones as long as they are expected to fit the budget."""
    clock, seconds = Clock(), {}
    for length in options.lengths:
        cell = row["lengths"].get(str(length))
        measured = cell and ("seconds" in cell or cell["temporary bytes"] >= MEMORY)  # else it was but planned
        if measured or (cell and options.plan):
            seconds[length] = cell.get("seconds")
            continue
        if len(seconds) and not options.plan:
            known = [(t, s) for t, s in seconds.items() if s]
            power = 1.0
            if len(known) > 1:
                (t0, s0), (t1, s1) = known[-2:]
                power = max(1.0, math.log(s1 / s0) / math.log(t1 / t0))
            if not known or known[-1][1] * (length / known[-1][0]) ** power > options.budget:
                continue
        arguments, run, residuals = program(name, options.width, length)
        start = time.process_time()
        traced = run.trace(*arguments)
        compiled = traced.lower().compile()
        if "compile seconds" not in row:
            row["compile seconds"] = round(time.process_time() - start, 2)
            row["equations"] = count(traced.jaxpr.jaxpr)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        cell = {
            "temporary bytes": temporary,
            "residual bytes": residuals,
            "moved bytes": moved(Program(compiled.as_text())),
        }
        if not options.plan and temporary < MEMORY:
            jax.block_until_ready(compiled(*arguments))
            call = functools.partial(clock.per_call, functools.partial(compiled, *arguments), 1)
            samples = [call()]
            rounds = max(1, min(options.rounds, int(options.budget / max(samples[0], 1e-3))))
            samples += [call() for _ in range(rounds - 1)]
            cell["seconds"] = seconds[length] = statistics.median(samples)
        row["lengths"][str(length)] = cell
        jax.clear_caches()


def count(jaxpr) -> int:
    """Equations of a program, those inside of loops and calls once."""
    return sum(1 + sum(map(count, jaxprs_in_params(equation.params))) for equation in jaxpr.eqns)


def table(rows: dict, lengths: list[int]) -> str:
    """A Markdown table; four numbers a length: microseconds, kB of temporaries, of residuals and of what is moved a token."""
    head = ["mixer", "compile s", "equations", *(f"{length:,}" for length in lengths)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        cells = [f"`{name}`", str(row.get("compile seconds", "-")), str(row.get("equations", "-"))]
        for length in lengths:
            cell = row["lengths"].get(str(length), {})
            values = [("seconds", 1e6), *((f"{what} bytes", 1e-3) for what in ("temporary", "residual", "moved"))]
            cells.append(" / ".join(f"{cell[key] * by / length:.3g}" if key in cell else "-" for key, by in values))
        lines.append("| " + " | ".join(cells + [row[key] for key in ("failed",) if key in row]) + " |")
    return "\n".join(lines)


def draw(rows: dict, lengths: list[int], path: pathlib.Path) -> None:
    """Time and temporaries of a token by the length, a line for each mixer; those that grow are named."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for panel, key, by, label in (
        (panels[0], "seconds", 1e6, "microseconds a token"),
        (panels[1], "temporary bytes", 1e-3, "kB of temporaries a token"),
    ):
        for name, row in rows.items():
            points = [
                (t, row["lengths"][str(t)][key] * by / t) for t in lengths if key in row["lengths"].get(str(t), {})
            ]
            if len(points) < 2:
                continue
            grows = points[-1][1] > 1.5 * min(y for _, y in points)
            panel.plot(
                *zip(*points, strict=True), marker=".", lw=1, color=None if grows else "lightgrey", zorder=1 + grows
            )
            if grows:
                panel.annotate(name, points[-1], xytext=(4, 0), textcoords="offset points", fontsize=7, va="center")
        panel.set(xscale="log", yscale="log", xlabel="tokens of the sequence", ylabel=label)
    figure.suptitle("Grey: at most 1.5 times as much a token at the last length as at the best one")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__, prog="python -m benchmarks.lengths")
    parser.add_argument("--mixers", default="", help="names joined by commas; all causal ones by default")
    parser.add_argument("--lengths", type=command.whole_numbers, default=LENGTHS, help="joined by commas")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--budget", type=float, default=10, help="seconds that one call may be expected to take")
    parser.add_argument("--rounds", type=int, default=5, help="calls, at most, that a time is the median of")
    parser.add_argument("--plan", action="store_true", help="memory and compilation alone")
    parser.add_argument("--json", type=command.new_file, help="file for the results; what it has is not measured again")
    parser.add_argument("--png", type=command.new_file, help="file for the plot")
    options = parser.parse_args(arguments)
    settle_process()
    options.lengths = sorted(options.lengths)
    causal = [name for name in mixers.names() if mixers.find(name).causal]
    names = options.mixers.split(",") if options.mixers else causal
    for name in names:
        mixers.find(name)
    rows = earlier(options.json, {"width": options.width})
    for name in names:
        row = rows.setdefault(name, {"lengths": {}})
        row.pop("failed", None)
        try:
            measure(name, options, row)
        except Exception as error:  # a failure is a row of the table, too
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(table({name: row}, options.lengths).splitlines()[-1], file=sys.stderr, flush=True)
        if options.json:
            facts = environment(("jax", "jaxlib"))
            options.json.write_text(json.dumps({"width": options.width, "environment": facts, "rows": rows}, indent=1))
    rows = {name: row for name, row in rows.items() if name in names}
    print(table(rows, options.lengths))
    if options.png:
        draw(rows, options.lengths, options.png)


if __name__ == "__main__":
    command.run(main)
