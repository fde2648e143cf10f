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
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from ops.attention import attention
from ops.delta_rule import delta_rule
from ops.linear_attention import linear_attention
from ops.linear_recurrence import linear_recurrence
from ops.long_convolution import long_convolution, vandermonde_kernel
from ops.selective_scan import selective_scan
from ops.state_space_scan import state_space_scan

# Without these, glibc gives large temporaries back after every call, and the page faults of the next one can cost more
# than the computation, to some implementations more than to others.
_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=17179869184"
)
_MODES = ("fwd", "fwdbwd")
_IMPLEMENTATIONS = ("auto", "reference", "sequential", "chunked", "associative", "blockwise", "library")
_MEMORY = 8 * 2**30  # bytes of temporaries above which a row is not run
_SAMPLE = 0.02  # seconds: shorter calls are repeated to make up a sample
_QUEUED = 20  # calls in a sample on a device, between two waits for it
_PROBES = (128, 256)  # lengths from which the time of a torch peer is extrapolated before it runs at a longer one


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


class Program:
    """What one row of the table runs."""

    def __init__(self, name: str, is_peer: bool, prepare: Callable):
        self.name, self.is_peer = name, is_peer
        self.prepare = prepare  # () -> (function of no arguments, bytes of temporaries or None)
        self.samples: list[float] = []
        self.skipped: str | None = None
        self.temporary: int | None = None
        self.prepare_seconds = self.difference = None


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


class Clock:
    """Seconds of some calls of a function: CPU time of the process on a CPU, wall time on other devices."""

    def __init__(self):
        self.on_cpu = jax.default_backend() == "cpu"
        self.now = time.process_time if self.on_cpu else time.perf_counter

    def __call__(self, function: Callable, calls: int = 1) -> float:
        start = self.now()
        for _ in range(calls):
            result = function()
            if self.on_cpu:  # one call at a time; a device is given a queue of them
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (self.now() - start) / calls


def measure(programs: Sequence[Program], rounds: int, budget: float, clock: Clock, expect: Callable) -> None:
    """Fills in the programs' results.

    Args:
      programs: they take turns in each round.
      rounds: samples of each; fewer where they do not fit into `budget`.
      budget: seconds for one program; one whose single call is expected to take longer is skipped.
      clock: what times them.
      expect: program -> expected seconds a call, or None where nothing is known.
    """
    first = None
    plans = []
    for program in programs:
        expected = expect(program)
        if expected is not None and expected > budget:
            program.skipped = f"about {expected:.0f} s a call"
            continue
        try:
            start = time.perf_counter()
            call, program.temporary = program.prepare()
            program.prepare_seconds = time.perf_counter() - start
            if program.temporary is not None and program.temporary > _MEMORY:
                program.skipped = f"{program.temporary / 1e9:.1f} GB of temporaries"
                continue
            outputs = [peers.to_numpy(x) for x in jax.block_until_ready(call())]
        except Exception as error:
            if not program.is_peer:
                raise
            program.skipped = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        first = outputs if first is None else first
        program.difference = max(_difference(x, y) for x, y in zip(outputs, first, strict=True))
        del outputs
        seconds = clock(call)
        calls = max(1 if clock.on_cpu else _QUEUED, math.ceil(_SAMPLE / max(seconds, 1e-6)))
        fits = int(budget / (seconds * calls))
        if fits == 0:
            program.skipped = f"{seconds:.0f} s a call"
            program.samples = [seconds]
            continue
        plans.append((program, call, calls, min(rounds, fits)))
    for number in range(rounds):
        for program, call, calls, own_rounds in plans if number % 2 == 0 else reversed(plans):
            if number < own_rounds:
                program.samples.append(clock(call, calls))


def _difference(x, y):
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))


class Expectation:
    """Extrapolates the time of a row from shorter lengths, by the power law of the last two, at least linearly."""

    def __init__(self):
        self.known: dict[tuple[str, str], list[tuple[int, float]]] = {}

    def add(self, mode: str, length: int, program: Program):
        if program.samples:
            seconds = statistics.median(program.samples)
            self.known.setdefault((mode, program.name), []).append((length, seconds))

    def __call__(self, mode: str, length: int, program: Program) -> float | None:
        points = sorted(self.known.get((mode, program.name), []))
        if not points:
            return None
        power = 1.0
        if len(points) > 1:
            (t0, s0), (t1, s1) = points[-2:]
            power = max(power, math.log(s1 / s0) / math.log(t1 / t0))
        return points[-1][1] * (length / points[-1][0]) ** power


def run_case(case: Case, lengths: Sequence[int], modes: Sequence[str], rounds: int, budget: float, with_peers: bool):
    """Measures a case at all lengths; returns one record for each row and mode."""
    clock, expectation, records = Clock(), Expectation(), []
    with_torch = with_peers and clock.on_cpu
    for mode in modes if with_torch else ():
        for length in (probe for probe in _PROBES if probe < min(lengths)):
            programs = torch_programs(case, length, mode, *arrays_of(case, length))
            measure(programs, 1, budget, clock, lambda program: None)
            for program in programs:
                expectation.add(mode, length, program)
    for length in sorted(lengths):
        arrays = arrays_of(case, length)
        for mode in modes:
            programs = jax_programs(case, length, mode, *arrays, with_peers)
            if with_torch:
                programs += torch_programs(case, length, mode, *arrays)
            measure(programs, rounds, budget, clock, lambda p, m=mode, t=length: expectation(m, t, p))
            for program in programs:
                expectation.add(mode, length, program)
            records += _records(case, length, mode, programs)
    return records
