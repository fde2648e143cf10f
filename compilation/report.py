"""The page of a compiled step, and its verdict."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.files import write_atomically
from compilation.findings import LONG, MOST, Findings, amount
from compilation.hlo import Sent

MIB = 2**20
FOLDER = "compiled"


def verdict(found: Findings) -> str:
    """Whether the step fits on a device, and by how much."""
    memory = found.memory
    if memory.fits:
        left = memory.capacity - memory.peak
        close = "; little is left" if left < 0.1 * memory.capacity else ""
        return f"fits: {amount(memory.peak)} of {amount(memory.capacity)}, {amount(left)} are left{close}"
    if math.isinf(memory.peak):
        return f"does not fit into {amount(memory.capacity)}"
    over = memory.peak - memory.capacity
    return f"does not fit: {amount(memory.peak)} of {amount(memory.capacity)}, {amount(over)} too many"


def page(found: Findings) -> str:
    """One page for a reader; `Findings.record` has all of it."""
    return "\n".join(_lines(found))


def write(found: Findings, workdir: Path) -> Path:
    """Writes the findings as JSON below a directory and returns the path."""
    path = workdir / FOLDER / f"{found.step}-{found.target.replace(':', '-')}.json"
    record = found.record()
    if math.isinf(found.memory.peak):
        record["memory"]["peak"] = None
    write_atomically(path, json.dumps(record, indent=1))
    return path


def _lines(found: Findings) -> Iterator[str]:
    mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1) or "of one device"
    yield f"{found.step} step on {found.target}: {found.devices} x {found.device}, mesh {mesh}"
    yield (
        f"{'+'.join(found.pattern)}, {found.parameters / 1e6:,.1f} M parameters, {found.dtype}; {found.rows} rows of "
        f"{found.length} ({found.task})"
    )
    forms = ", ".join(f"{name}={'/'.join(forms)}" for name, forms in found.forms.items())
    yield f"forms: {forms or 'none to choose'}"
    yield ""
    yield verdict(found)
    memory = found.memory
    if memory.remark:
        yield f"  {amount(memory.capacity)} is {memory.remark}"
    parts = {
        **memory.held,
        "temporaries": memory.temporaries,
        "results": memory.results,
        "machine code": memory.program,
    }
    yield from _table(
        ("on each device", "memory"), [(name, amount(size)) for name, size in parts.items() if size is not None]
    )
    if found.refusal:
        yield f"  the compiler: {found.refusal.splitlines()[0]}"
    for suggestion in found.suggestions:
        yield f"  try {suggestion}"
    if found.refusal:
        yield from _whole(found)
        yield _seconds(found)
        return
    if found.arrays:
        yield from _table(
            ("largest arrays that are made", "MiB", "places", "from"),
            [(str(a.shape), f"{a.shape.bytes / MIB:.1f}", a.places, _tail(a.origin)) for a in found.arrays[:MOST]],
        )
    yield from _table(
        ("collectives", "over", "places", "executions", "MiB a step"),
        [(t.kind, t.axes, t.places, t.executions, f"{t.bytes / MIB:.1f}") for t in found.traffic],
        "no collectives",
    )
    columns = ("over", "array", "executions", "MiB a step", "from")
    yield from _table(("the most of it", *columns), _sent([s for s in found.sent if s not in found.gathered]))
    yield from _table(("sent between rows, but no parameter", *columns), _sent(found.gathered))
    if found.mesh["sequence"] > 1:
        none = "no device gets activations of whole rows"
        yield from _table(("activations of whole rows", *columns), _sent(found.collected), none)
    work = sum(p.flops for p in found.products) or 1
    yield from _table(
        ("matrix products", "result", "precision", "places", "executions", "share of FLOPs"),
        [
            (p.operands, p.result, p.precision, p.places, p.executions, f"{100 * p.flops / work:.1f} %")
            for p in found.products
        ],
        "no matrix products",
    )
    yield from _table(
        ("kernels", "places", "executions"),
        [(k.name, k.places, k.executions) for k in found.kernels],
        "no kernels of others: all is compiled by XLA",
    )
    yield from _table(
        (f"loops of more than {LONG} trips", "executions", "from"),
        [(loop.trips or "unknown", loop.executions, _tail(loop.origin)) for loop in found.loops[:MOST]],
        f"no loop of more than {LONG} trips",
    )
    yield from _whole(found)
    yield _seconds(found)


def _sent(sent: Sequence[Sent]) -> list[tuple]:
    return [
        (s.kind, s.axes, str(s.shape), s.executions, f"{s.bytes / MIB:.1f}", _tail(s.origin))
        for s in sent[:MOST]
        if s.bytes >= MIB / 10
    ]


def _whole(found: Findings) -> Iterator[str]:
    if found.whole:
        yield from _table(
            ("parameters that an axis does not split", "axis", "MiB on each device", "because"),
            [(w.name, w.axis, f"{w.bytes / MIB:.2f}", w.reason) for w in found.whole[:MOST]],
        )
        if len(found.whole) > MOST:
            yield f"  and {len(found.whole) - MOST} more"


def _seconds(found: Findings) -> str:
    s = found.seconds
    by = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return (
        f"\ncompiled in {s['compile']:.1f} s (traced in {s['trace']:.1f}, lowered in {s['lower']:.1f}; "
        f"{s['processor']:.0f} s of processors) by {by}"
    )


def _tail(origin: str) -> str:
    """The end of a JAX name, which says most."""
    return origin if len(origin) <= 60 else f"...{origin[-57:]}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], nothing: str = "") -> Iterator[str]:
    rows = [[str(cell) for cell in row] for row in rows]
    if not rows:
        if nothing:
            yield f"\n{nothing}"
        return
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    numbers = [all(row[i][:1].isdigit() for row in rows) and i > 0 for i in range(len(head))]
    yield ""
    for row in (head, *rows):
        cells = (f"{c:>{w}}" if n else f"{c:<{w}}" for c, w, n in zip(row, widths, numbers, strict=True))
        yield ("  " if row is not head else "") + "  ".join(cells).rstrip()
