"""Time and memory of the primitives in `ops/`, beside what others offer for the same mathematics.

    python -m benchmarks.ops --primitive linear_attention,delta_rule --lengths 512,2048 --json ops.json

Every implementation and every installed peer (`benchmarks.peers`) computes the same outputs from the same arrays: the
column "diff" says how far it is from the first row. They take turns within one process, so that what else the machine
does meets all of them. On a CPU the time is the process's CPU time on one core, on other devices the wall time; it is
the median of the rounds. Ratios below 1.3 are a tie.

Columns: milliseconds a call, its ratio to the fastest row and to the fastest peer, MB of temporary memory (as XLA plans
it; torch does not say) and the relative difference of the outputs; first forward, then forward and backward with the
gradients of all inputs. "(auto)" marks the implementation that the primitive picks by itself. Rows that would take too
long or too much memory are not measured, and say so.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.timing import Clock, Expectation, Program, environment, measure, settle_process
from ops.attention import attention
from ops.delta_rule import delta_rule
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.selective_scan import selective_scan
from ops.state_space_scan import state_space_scan

_MODES = ("fwd", "fwdbwd")
_IMPLEMENTATIONS = ("auto", "reference", "sequential", "chunked", "associative", "blockwise", "library")
_PROBES = (128, 256)  # lengths at which a torch peer runs first: it may be far too slow at longer ones
_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers", "fla-core", "mambapy")


class Case(NamedTuple):
    """A primitive at one setting.

    Attributes:
      primitive, variant: its name, which is also its key in `peers.PEERS`.
      shape: for the table.
      inputs: (generator, length) -> float32 arrays, all of which are differentiated.
      function: (implementation, length, *inputs) -> output or tuple of outputs, without the final state.
      implementations: what to try; those that the primitive does not offer are left out.
    """

    primitive: str
    variant: str
    shape: str
    inputs: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]]
    function: Callable[..., Any]
    implementations: tuple[str, ...] = _IMPLEMENTATIONS


def _qkv(rng, length):
    return tuple(rng.standard_normal((1, length, 4, 64)) for _ in range(3))


def _log_decay(rng, *shape):
    """log sigmoid(x + 3): about 0.95 a step."""
    return -np.log1p(np.exp(-rng.standard_normal(shape) - 3))


def _linear_attention_inputs(per_channel, rng, length):
    q, k, v = _qkv(rng, length)
    return q, k / 8, v, _log_decay(rng, 1, length, 4, *(64,) * per_channel)


def _delta_rule_inputs(per_channel, rng, length):
    q, k, v, g = _linear_attention_inputs(per_channel, rng, length)
    beta = 1 / (1 + np.exp(-rng.standard_normal((1, length, 4))))
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, beta, g


def _rank_one_inputs(rng, length):
    q, k, v, beta, g = _delta_rule_inputs(True, rng, length)
    return q, k, v, g, -beta[..., None] * k, k


def _real_inputs(rng, length):
    return np.exp(_log_decay(rng, 1, length, 512)), rng.standard_normal((1, length, 512))


def _complex_inputs(rng, length):
    size, phase = np.exp(_log_decay(rng, 1, length, 512)), rng.uniform(0, np.pi, 512)
    return size * np.cos(phase), size * np.sin(phase), *(rng.standard_normal(size.shape) for _ in range(2))


def _mamba_inputs(rng, length):
    x, B, C = (rng.standard_normal((1, length, width)) for width in (256, 16, 16))
    dt = np.log1p(np.exp(rng.standard_normal(x.shape) - 4))
    return x, dt, -np.tile(np.arange(1.0, 17.0), (256, 1)), B, C


def _s4d_parameters(rng, width, states):
    """log a = dt (-1/2 + i pi n) and c."""
    dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), (width, 1)))
    c = rng.standard_normal((2, width, states))
    return -0.5 * dt * np.ones(states), math.pi * dt * np.arange(states), *c


def _state_space_inputs(rng, length):
    log_re, log_im, *c = _s4d_parameters(rng, 64, 32)
    a = np.exp(log_re + 1j * log_im)
    return rng.standard_normal((2, length, 64)), a.real, a.imag, *rng.standard_normal((2, 64, 32)), *c


def _convolution_inputs(rng, length):
    kernel = rng.standard_normal((64, length)) * np.exp(-np.arange(length) / 100)
    return rng.standard_normal((2, length, 64)), kernel


def _vandermonde_inputs(rng, length):
    return _s4d_parameters(rng, 32, 32)


def _attention(options):
    return lambda name, length, q, k, v: attention(q, k, v, implementation=name, **options)


def _linear_attention(name, length, q, k, v, g):
    return linear_attention(q, k, v, g, scale=q.shape[-1] ** -0.5, implementation=name)[0]


def _delta_rule(name, length, q, k, v, beta, g):
    return delta_rule(q, k, v, beta, g, scale=q.shape[-1] ** -0.5, implementation=name)[0]


def _rank_one(name, length, q, k, v, g, a, b):
    return delta_rule(q, k, v, log_decay=g, a=a, b=b, scale=q.shape[-1] ** -0.5, implementation=name)[0]


def _real(name, length, a, b):
    return linear_recurrence(a, b, implementation=name)[0]


def _complex(name, length, a_re, a_im, b_re, b_im):
    return linear_recurrence((a_re, a_im), (b_re, b_im), implementation=name)[0]


def _selective_scan(name, length, x, dt, A, B, C):
    return selective_scan(x, dt, A, B, C, implementation=name)[0]


def _state_space_scan(name, length, x, a_re, a_im, b_re, b_im, c_re, c_im):
    return state_space_scan(x, (a_re, a_im), (b_re, b_im), (c_re, c_im), implementation=name)[0]


def _long_convolution(name, length, x, kernel):
    return long_convolution(x, kernel)


def _vandermonde(name, length, log_re, log_im, c_re, c_im):
    return vandermonde_kernel((log_re, log_im), (c_re, c_im), length)


_HEADS = "B1 H4 K64 V64"
_LINEAR, _DELTA = _linear_attention_inputs, _delta_rule_inputs
CASES = (
    Case("attention", "causal", _HEADS, _qkv, _attention({})),
    Case("attention", "window 256", _HEADS, _qkv, _attention({"window": 256})),
    Case("attention", "relu2", _HEADS, _qkv, _attention({"activation": "relu2"})),
    Case("linear_attention", "decay per head", _HEADS, functools.partial(_LINEAR, False), _linear_attention),
    Case("linear_attention", "decay per channel", _HEADS, functools.partial(_LINEAR, True), _linear_attention),
    Case("delta_rule", "decay per head", _HEADS, functools.partial(_DELTA, False), _delta_rule),
    Case("delta_rule", "decay per channel", _HEADS, functools.partial(_DELTA, True), _delta_rule),
    Case("delta_rule", "diagonal plus rank one", _HEADS, _rank_one_inputs, _rank_one),
    Case("linear_recurrence", "real", "B1 D512", _real_inputs, _real),
    Case("linear_recurrence", "complex", "B1 D512", _complex_inputs, _complex),
    Case("selective_scan", "Mamba", "B1 D256 N16", _mamba_inputs, _selective_scan),
    Case("state_space_scan", "S4D", "B2 D64 N32", _state_space_inputs, _state_space_scan),
    Case("long_convolution", "causal", "B2 D64", _convolution_inputs, _long_convolution, ("auto",)),
    Case("vandermonde_kernel", "S4D", "D32 N32", _vandermonde_inputs, _vandermonde, ("auto",)),
)
PRIMITIVES = tuple(dict.fromkeys(case.primitive for case in CASES))


def jax_programs(case: Case, length: int, mode: str, inputs: list, cotangents: list, with_peers: bool) -> list[Program]:
    """The implementations that the primitive offers, then the peers in JAX. Equal programs make one row."""
    arrays = [jnp.asarray(x) for x in inputs]
    cotangents = [jnp.asarray(x) for x in cotangents]
    lowered: dict[str, Any] = {}
    named: dict[str, list[str]] = {}
    peer_names = set()

    def add(name, function):
        def program(cotangents, *inputs):
            y = lambda *inputs: jax.tree.leaves(function(length, *inputs))
            if mode == "fwd":
                return y(*inputs)
            outputs, pull_back = jax.vjp(y, *inputs)
            return [*outputs, *pull_back(cotangents)]

        low = jax.jit(program).lower(cotangents, *arrays)
        text = low.as_text()
        lowered.setdefault(text, low)
        named.setdefault(text, []).append(name)

    for name in case.implementations:
        function = functools.partial(case.function, name)
        if name != "auto":
            try:
                jax.eval_shape(functools.partial(function, length), *arrays)
            except ValueError:  # not offered
                continue
        add(name, function)
    if with_peers:
        for peer in peers.PEERS[case.primitive, case.variant]:
            if not peer.uses_torch:
                peer_names.add(peer.name)
                add(peer.name, peer.function)

    def prepare(text):
        compiled = lowered[text].compile()
        call = functools.partial(compiled, cotangents, *arrays)
        return call, compiled.memory_analysis().temp_size_in_bytes

    return [
        Program(_label(names), not peer_names.isdisjoint(names), functools.partial(prepare, text))
        for text, names in named.items()
    ]


def _label(names):
    rest = [name for name in names if name != "auto"]
    return " = ".join(rest) + " (auto)" * ("auto" in names) if rest else "auto"


def torch_programs(case: Case, length: int, mode: str, inputs: list, cotangents: list) -> list[Program]:
    """The installed peers in torch."""
    return [
        Program(peer.name, True, lambda peer=peer: (peers.torch_program(peer, length, mode, inputs, cotangents), None))
        for peer in peers.PEERS[case.primitive, case.variant]
        if peer.uses_torch and not peer.missing
    ]


def arrays_of(case: Case, length: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs, and a random cotangent for each output."""
    rng = np.random.default_rng(0)
    inputs = [np.asarray(x, np.float32) for x in case.inputs(rng, length)]
    outputs = jax.tree.leaves(jax.eval_shape(functools.partial(case.function, "auto", length), *inputs))
    return inputs, [rng.standard_normal(y.shape, np.float32) for y in outputs]


def run_case(case: Case, lengths: Sequence[int], modes: Sequence[str], rounds: int, budget: float, with_peers: bool):
    """Measures a case; returns one record for each length, mode and row."""
    clock, records = Clock(), []
    expectations = {mode: Expectation() for mode in modes}
    with_torch = with_peers and clock.on_cpu
    for length in [t for t in _PROBES if t < min(lengths)] if with_torch else ():
        for mode in modes:
            programs = torch_programs(case, length, mode, *arrays_of(case, length))
            measure(programs, 1, budget, clock, expectations[mode].at(length))
            expectations[mode].learn(length, programs)
    for length in sorted(lengths):
        inputs, cotangents = arrays_of(case, length)
        for mode in modes:
            programs = jax_programs(case, length, mode, inputs, cotangents, with_peers)
            if with_torch:
                programs += torch_programs(case, length, mode, inputs, cotangents)
            measure(programs, rounds, budget, clock, expectations[mode].at(length))
            expectations[mode].learn(length, programs)
            records += _records(case, length, mode, programs)
    return records


def _records(case, length, mode, programs):
    medians = [statistics.median(p.samples) if p.samples else math.inf for p in programs]
    fastest = min(medians)
    fastest_peer = min((m for m, p in zip(medians, programs, strict=True) if p.is_peer), default=math.inf)
    records = []
    for median, program in zip(medians, programs, strict=True):
        ran = bool(program.samples)
        record = {"primitive": case.primitive, "variant": case.variant, "shape": case.shape, "length": length}
        record |= {"mode": mode, "implementation": program.name, "peer": program.is_peer}
        record |= {
            "milliseconds": 1e3 * median if ran else None,
            "milliseconds_of_rounds": [1e3 * s for s in program.samples],
            "to_fastest": median / fastest if ran else None,
            "to_fastest_peer": median / fastest_peer if ran and fastest_peer < math.inf else None,
            "temporary_bytes": program.temporary_bytes,
            "difference": program.difference,
            "prepare_seconds": program.prepare_seconds,
            "note": program.note,
        }
        records.append(record)
    return records


def table(records: Sequence[dict], modes: Sequence[str]) -> str:
    """The records of one case, the modes side by side."""
    head = [
        "T",
        "implementation",
        *(c for mode in modes for c in (f"{mode} ms", "/best", "/peer", "MB", "diff")),
        "note",
    ]
    lines = {}
    for record in records:
        line = lines.setdefault((record["length"], record["implementation"]), {})
        line[record["mode"]] = record
    rows = [head]
    for (length, name), line in lines.items():
        row = [str(length), name]
        for mode in modes:
            record = line.get(mode, {})
            megabytes = record.get("temporary_bytes")
            row += [
                _number(record.get("milliseconds")),
                _number(record.get("to_fastest")),
                _number(record.get("to_fastest_peer")),
                "-" if megabytes is None else f"{megabytes / 1e6:.1f}",
                "-" if record.get("difference") is None else f"{record['difference']:.0e}",
            ]
        notes = [f"{mode} {line[mode]['note']}" for mode in modes if line.get(mode, {}).get("note")]
        rows.append([*row, "; ".join(notes)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = (1, len(head) - 1)
    aligned = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    first = records[0]
    title = f"{first['primitive']}, {first['variant']} ({first['shape']}, float32)"
    return "\n".join([title, *(line.rstrip() for line in aligned)])


def _number(x):
    """Three significant digits, never in exponent form."""
    if x is None:
        return "-"
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else "0"


def not_installed(cases: Sequence[Case]) -> list[str]:
    """Modules that peers of these cases need and that are not there."""
    return sorted({module for case in cases for p in peers.PEERS[case.primitive, case.variant] for module in p.missing})


def run(argv: Sequence[str]) -> None:
    """Measures what the command line says, prints the tables and writes the JSON."""
    options = _parse(argv)
    cases = [case for case in CASES if case.primitive in options.primitive]
    with_peers = options.peers == "auto"
    result = {
        "environment": environment(_PACKAGES),
        "options": vars(options) | {"json": str(options.json)},
        "results": [],
    }
    facts = result["environment"]
    load = ", ".join(f"{x:.1f}" for x in facts["load_average"])
    print(f"{facts['device']}, {facts['cores']} core(s), {Clock().metric}; load average {load}")
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    if with_peers:
        result["not_installed"] = not_installed(cases)
        print(f"not installed, so their rows are missing: {', '.join(result['not_installed']) or 'nothing'}")
        if not Clock().on_cpu:
            print("rows of torch are missing: they run on CPUs only")
    for case in cases:
        records = run_case(case, options.lengths, options.mode, options.rounds, options.budget, with_peers)
        print("\n" + table(records, options.mode), flush=True)
        result["results"] += records
        result["load_average_at_end"] = os.getloadavg()
        if options.json:  # after every case, so that an aborted run leaves what it had
            options.json.write_text(json.dumps(result, indent=1))


def _parse(argv):
    def names(choices):
        def split(text):
            chosen = text.split(",")
            if unknown := set(chosen) - set(choices):
                raise argparse.ArgumentTypeError(f"unknown: {sorted(unknown)}; choose from {', '.join(choices)}")
            return chosen

        return split

    def lengths(text):
        return [int(length) for length in text.split(",")]

    parser = argparse.ArgumentParser(prog="benchmarks.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--primitive", type=names(PRIMITIVES), default=list(PRIMITIVES), metavar="NAME,...")
    parser.add_argument("--lengths", type=lengths, default=[512, 2048], metavar="T,...")
    parser.add_argument("--mode", type=names(_MODES), default=list(_MODES), metavar="fwd,fwdbwd")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the rounds of one row")
    parser.add_argument("--peers", choices=("auto", "none"), default="auto")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    settle_process()
    run(sys.argv[1:])
