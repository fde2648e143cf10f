"""Time and memory of the primitives in `ops/`, beside what others offer for the same mathematics.

    python -m benchmarks.ops --primitive linear_attention,delta_rule --lengths 512,2048 --json ops.json

Every implementation and every installed peer (`benchmarks.peers`) computes the same outputs from the same arrays: the
column "diff" says how far it is from the first row. They take turns within one process, so that what else the machine
does meets all of them. On a CPU the time is the process's CPU time on one core, on other devices the wall time; it is
the median of the rounds. Ratios below 1.3 are a tie.

Columns: milliseconds a call, its ratio to the fastest row and to the fastest peer, MB of temporary memory (as XLA plans
it; torch does not say) and the relative difference of the outputs; first forward, then forward and backward with the
gradients of all inputs. "(auto)" marks what the primitive picks by itself. Names whose compiled programs are the same
share one measurement. Rows that would take too long or too much memory are not measured, and say so.
"""

import argparse
import functools
import json
import math
import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.cases import CASES, Case, case_arrays
from benchmarks.peers import PEERS, torch_program
from benchmarks.timing import Clock, Expectation, Program, environment, measure, settle_process
from common import command

PRIMITIVES = tuple(dict.fromkeys(case.primitive for case in CASES))
_MODES = ("fwd", "fwdbwd")
_PROBES = (128, 256)  # lengths at which a torch peer runs first: it may be far too slow at longer ones
_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "fla-core", "mambapy")


class Rows(NamedTuple):
    """Rows of the table that are one program, which is measured once."""

    names: list[str]
    program: Program


def jax_rows(case: Case, length: int, mode: str, inputs: list, cotangents: list, with_peers: bool) -> list[Rows]:
    """The implementations that the primitive offers, then the peers in JAX."""
    functions = {"auto": functools.partial(case.function, "auto")}
    for name in case.forms():
        function = functools.partial(case.function, name)
        try:
            jax.eval_shape(functools.partial(function, length), *inputs)
        except ValueError:  # not offered
            continue
        functions[name] = function
    if with_peers:
        for peer in PEERS[case.primitive, case.variant]:
            if not peer.uses_torch and _takes(peer, length, inputs):
                functions[peer.name] = peer.function

    arguments = jax.tree.map(jnp.asarray, (cotangents, *inputs))
    names: dict[str, list[str]] = {}  # text of a program -> who calls it so
    lowered = {}
    for name, function in functions.items():
        lowering = jax.jit(differentiated(function, length, mode)).lower(*arguments)
        text = lowering.as_text()
        lowered[text] = lowering
        names.setdefault(text, []).append(name)

    def prepare(lowering):
        compiled = lowering.compile()
        return functools.partial(compiled, *arguments), compiled.memory_analysis().temp_size_in_bytes

    rows = []
    for text, equal in names.items():
        program = Program(equal[-1], _is_peer(case, equal[-1]), functools.partial(prepare, lowered[text]))
        rows.append(Rows(equal, program))
    return rows


def _takes(peer, length, inputs):
    """Whether a peer in JAX computes in the precision of the inputs; complex numbers and Fourier transforms have no bfloat16."""
    try:
        jax.eval_shape(functools.partial(peer.function, length), *inputs)
    except (TypeError, ValueError):
        if all(x.dtype == jnp.float32 for x in inputs):
            raise
        return False
    return True


def _is_peer(case, name):
    return name in {peer.name for peer in PEERS[case.primitive, case.variant]}


def differentiated(function: Callable, length: int, mode: str) -> Callable:
    """(cotangents, *inputs) -> the outputs of `function(length, *inputs)`, and in mode "fwdbwd" the gradients of all inputs."""

    def program(cotangents, *inputs):
        outputs = lambda *inputs: jax.tree.leaves(function(length, *inputs))
        if mode == "fwd":
            return outputs(*inputs)
        y, pull_back = jax.vjp(outputs, *inputs)
        return [*y, *pull_back([c.astype(x.dtype) for c, x in zip(cotangents, y, strict=True)])]

    return program


def torch_rows(case: Case, length: int, mode: str, inputs: list, cotangents: list) -> list[Rows]:
    """The installed peers in torch."""
    rows = []
    for peer in PEERS[case.primitive, case.variant]:
        if peer.uses_torch and not peer.missing:
            prepare = functools.partial(torch_program, peer, length, mode, inputs, cotangents)
            rows.append(Rows([peer.name], Program(peer.name, True, lambda prepare=prepare: (prepare(), None))))
    return rows


def run_case(case: Case, lengths: list[int], modes: list[str], rounds: int, budget: float, peers: bool) -> list[dict]:
    """Measures a case; returns one record for each length, mode and row. See `parse` for the arguments."""
    clock, records = Clock(), []
    expectations = {mode: Expectation() for mode in modes}
    with_torch = peers and clock.on_cpu

    def measure_all(rows, mode, length, rounds):
        programs = [row.program for row in rows]
        measure(programs, rounds, budget, clock, expectations[mode].at(length))
        expectations[mode].learn(length, programs)

    for length in [t for t in _PROBES if t < min(lengths)] if with_torch else ():
        for mode in modes:
            measure_all(torch_rows(case, length, mode, *case_arrays(case, length)), mode, length, 1)
    for length in sorted(lengths):
        arrays = case_arrays(case, length)
        for mode in modes:
            rows = jax_rows(case, length, mode, *arrays, peers)
            if with_torch:
                rows += torch_rows(case, length, mode, *arrays)
            measure_all(rows, mode, length, rounds)
            records += _records(case, length, mode, rows)
    return records


def _records(case, length, mode, rows):
    medians = [statistics.median(row.program.samples or [math.inf]) for row in rows]
    fastest = min(medians)
    fastest_peer = min((m for m, row in zip(medians, rows, strict=True) if row.program.is_peer), default=math.inf)
    records = []
    for median, (names, program) in zip(medians, rows, strict=True):
        for name in [name for name in names if name != "auto"] or names:
            ran = bool(program.samples)
            records.append(
                {
                    "primitive": case.primitive,
                    "variant": case.variant,
                    "shape": case.shape,
                    "length": length,
                    "mode": mode,
                    "implementation": name,
                    "auto": "auto" in names,
                    "peer": _is_peer(case, name),
                    "milliseconds": 1e3 * median if ran else None,
                    "milliseconds_of_rounds": [1e3 * seconds for seconds in program.samples],
                    "to_fastest": median / fastest if ran else None,
                    "to_fastest_peer": median / fastest_peer if ran and fastest_peer < math.inf else None,
                    "temporary_bytes": program.temporary_bytes,
                    "difference": program.difference,
                    "prepare_seconds": program.prepare_seconds,
                    "note": program.note,
                }
            )
    return records


def table(records: list[dict], modes: list[str]) -> str:
    """The records of one case, the modes side by side."""
    lines: dict[tuple[int, str], dict[str, dict]] = {}
    for record in records:
        lines.setdefault((record["length"], record["implementation"]), {})[record["mode"]] = record
    head = ["T", "implementation"]
    for mode in modes:
        head += [f"{mode} ms", "/best", "/peer", "MB", "diff"]
    rows = [[*head, "note"]]
    for (length, name), line in lines.items():
        auto = name != "auto" and all(line[mode]["auto"] for mode in modes)
        row = [str(length), name + " (auto)" * auto]
        for mode in modes:
            record = line[mode]
            row += [
                _cell(record["milliseconds"], _three_digits),
                _cell(record["to_fastest"], "{:.2f}".format),
                _cell(record["to_fastest_peer"], "{:.2f}".format),
                _cell(record["temporary_bytes"], lambda size: f"{size / 1e6:.1f}"),
                _cell(record["difference"], "{:.0e}".format),
            ]
        row.append("; ".join(f"{mode} {line[mode]['note']}" for mode in modes if line[mode]["note"]))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = "{primitive}, {variant} ({shape}, float32)".format(**records[0])
    return "\n".join([title, *(_aligned(row, widths) for row in rows)])


def _aligned(row, widths):
    """Text to the left (the implementation and the note), numbers to the right."""
    cells = [
        c.ljust(w) if i in (1, len(row) - 1) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _cell(value, show):
    return "-" if value is None else show(value)


def _three_digits(x):
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}"


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    settle_process()
    run(options)


def run(options: argparse.Namespace) -> None:
    """Measures what the command line says, prints the tables and writes the JSON."""
    chosen = [case for case in CASES if case.primitive in options.primitive]
    with_peers = options.peers == "auto"
    facts = environment(_PACKAGES)
    result = {"environment": facts, "options": vars(options), "results": []}
    load = ", ".join(f"{x:.1f}" for x in facts["load_average"])
    print(f"{facts['device']}, {facts['cores']} core(s), {Clock().metric}; load average {load}")
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    if with_peers:
        needed = [peer for case in chosen for peer in PEERS[case.primitive, case.variant]]
        missing = sorted({module for peer in needed for module in peer.missing})
        print(f"not installed, so the rows that need it are left out: {', '.join(missing) or 'nothing'}")
        if not Clock().on_cpu:
            print("left out on this device: the rows in torch, which are measured on a CPU")
        result["not_installed"] = missing
    for case in chosen:
        records = run_case(case, options.lengths, options.mode, options.rounds, options.budget, with_peers)
        print("\n" + table(records, options.mode), flush=True)
        result["results"] += records
        result["load_average_at_end"] = os.getloadavg()
        if options.json:  # after every case, so that an aborted run leaves what it had
            options.json.write_text(json.dumps(result, indent=1, default=str))


def parse(argv):
    def names(choices):
        def split(text):
            chosen = text.split(",")
            if unknown := set(chosen) - set(choices):
                raise argparse.ArgumentTypeError(f"unknown: {sorted(unknown)}; choose from {', '.join(choices)}")
            return chosen

        return split

    parser = command.Parser(__doc__, prog="python -m benchmarks.ops")
    parser.add_argument("--primitive", type=names(PRIMITIVES), default=list(PRIMITIVES), metavar="NAME,...")
    parser.add_argument("--lengths", type=command.whole_numbers, default=[512, 2048], metavar="T,...")
    parser.add_argument("--mode", type=names(_MODES), default=list(_MODES), metavar="fwd,fwdbwd")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the rounds of one row")
    parser.add_argument("--peers", choices=("auto", "none"), default="auto")
    parser.add_argument("--json", type=command.new_file)
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(main)
