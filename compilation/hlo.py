"""What a compiled program does, read from its text: collectives, matrix products, kernels, loops, large arrays.

The text is XLA's HLO after optimisation, which every platform's compiler prints: one instruction a line, in computations that
call each other. It is the program of one device. How often an instruction is executed follows from the trip counts of the loops
around it; both branches of a condition count as executed.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from compilation import replica_groups

BYTES = {"pred": 1, "bf16": 2, "token": 0, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
UNKNOWN = 0  # trips of a loop whose text does not say them
# Custom calls that are marks for the compiler, or memory, and no kernels.
MARKS = re.compile(
    r"AllocateBuffer|Assume|Async|Sharding|Shape|Move|Pin|annotate|Barrier|Slice|xla\.|\$barrier|SPMD|Bitcast"
)
# Instructions that make no new array.
VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional", "call", "iota")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|bf16|[sufc]\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CLOSE = re.compile(r"^\}(?:, |\s*$)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its type, its sizes, and whether it lies in the device's main memory (on TPUs, and not in a core's)."""

    dtype: str
    sizes: tuple[int, ...]
    in_memory: bool = True

    @property
    def bytes(self) -> float:
        width = BYTES.get(self.dtype)
        if width is None:
            width = int(re.search(r"\d+", self.dtype).group()) / 8
        return width * math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `name = result operation(operands), attributes`."""

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    attributes: str  # what is in the parentheses, and behind them

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result."""
        return tuple(
            Shape(dtype, tuple(int(n) for n in sizes.split(",") if n), "S(" not in (layout or ""))
            for dtype, sizes, layout in _ARRAY.findall(self.result)
        )

    @property
    def kind(self) -> str:
        """The operation; that of an asynchronous one is that of its start."""
        return self.operation.removesuffix("-start")

    @property
    def origin(self) -> str:
        """What of the program it came from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop: trips of one execution (`UNKNOWN` where the text does not say), and how often it is executed."""

    trips: int
    executions: int
    origin: str


@dataclasses.dataclass(frozen=True)
class Sent:
    """One collective.

    Attributes:
      kind: the operation, such as "all-gather".
      axes: the mesh axes that it goes over, see `replica_groups.over_axes`.
      shape: of its largest result.
      executions: in a step.
      bytes: of a step: executions times the arrays as they are on one device at the larger end (what is gathered, or is to be
        scattered).
      origin: what of the program it came from.
    """

    kind: str
    axes: str
    shape: Shape
    executions: int
    bytes: float
    origin: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of a kind over the same mesh axes: places in the program, executions a step, and bytes a step as of `Sent`."""

    kind: str
    axes: str
    places: int
    executions: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products (and convolutions) of the same types: places, executions and floating-point operations a step."""

    operands: str
    result: str
    precision: str
    places: int
    executions: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Calls of something that XLA did not compile itself."""

    name: str
    places: int
    executions: int


@dataclasses.dataclass(frozen=True)
class Large:
    """Arrays of one shape that the program makes in a device's memory: places that make one, and where the first came from."""

    shape: Shape
    places: int
    origin: str


class Program:
    """The text of a compiled program, taken apart.

    Args:
      text: as `jax.stages.Compiled.as_text` gives it.

    Attributes:
      computations: instructions by the name of their computation.
      executions: of each computation in one run of the program.
      loops: all loops that are executed.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        entry = current = None
        for line in _lines(text):
            if header := _COMPUTATION.match(line):
                current = self.computations[header.group(2)] = []
                entry = header.group(2) if header.group(1) else entry
            elif _CLOSE.match(line):
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line)):
                name, result, operation, rest = found.groups()
                operands, attributes = _split_at_close(rest)
                current.append(
                    Instruction(
                        name, result, operation, tuple(re.findall(r"%([\w.\-]+)", operands)), operands + attributes
                    )
                )
        self.executions: collections.Counter[str] = collections.Counter()
        self.loops: list[Loop] = []
        if entry is not None:
            self._count(entry)

    def _count(self, entry: str) -> None:
        """Follows the calls, callers before the called."""
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            seen.add(name)
            for called, _ in self._calls(name):
                if called not in seen:
                    visit(called)
            order.append(name)

        visit(entry)
        self.executions[entry] = 1
        for name in reversed(order):
            for called, times in self._calls(name):
                self.executions[called] += times * self.executions[name]
            for instruction in self.computations[name]:
                if instruction.operation == "while":
                    self.loops.append(Loop(self._trips(instruction), self.executions[name], instruction.origin))

    def _calls(self, name: str) -> Iterator[tuple[str, int]]:
        """The computations that one calls, and how often."""
        for instruction in self.computations[name]:
            called = _CALLED.findall(instruction.attributes)
            for branches in _BRANCHES.findall(instruction.attributes):
                called += re.findall(r"%?([\w.\-]+)", branches)
            if instruction.operation == "call":
                called += re.findall(r"to_apply=%?([\w.\-]+)", instruction.attributes)
            times = max(1, self._trips(instruction)) if instruction.operation == "while" else 1
            for other in called:
                if other in self.computations:
                    yield other, times

    def _trips(self, loop: Instruction) -> int:
        """Trips of a loop: what its text says, else the bound that its condition compares a count from 0 with."""
        if said := loop.attribute(r'known_trip_count"?:\{"?n"?:"?(\d+)'):
            return int(said)
        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        return max(self._constants(condition), default=UNKNOWN) if condition else UNKNOWN

    def _constants(self, name: str) -> list[int]:
        found = []
        for instruction in self.computations.get(name, ()):
            if instruction.operation == "constant" and re.match(r"[su]\d+\[\]", instruction.result):
                found += map(int, re.findall(r"^(\d+)(?![^,])", instruction.attributes))
            if called := instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)"):
                found += self._constants(called)
        return found

    def instructions(self) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int]]:
        """All that are executed: each with its computation's instructions by name and the number of its executions."""
        for name, instructions in self.computations.items():
            if times := self.executions[name]:
                by_name = {instruction.name: instruction for instruction in instructions}
                for instruction in instructions:
                    yield instruction, by_name, times

    def sent(self, mesh: Mapping[str, int]) -> list[Sent]:
        """Everything that is sent between devices, the most bytes first.

        An asynchronous collective may be written at several places, as pieces that other work is put between: places of one
        channel in several computations are one collective, executed as often as the place outermost of loops. Not so where the
        program says that they come from different places of its source: what is sent in a `shard_map` has one channel.

        Args:
          mesh: sizes of the mesh axes, in order; the places of a group's devices in it say over which axes it goes.
        """
        channels: dict[tuple, Sent] = {}
        seen: collections.Counter[tuple] = collections.Counter()
        for number, (instruction, by_name, times) in enumerate(self.instructions()):
            if instruction.kind not in COLLECTIVES:
                continue
            channel = instruction.attribute(r"channel_id=(\d+)")
            key = instruction.kind, f"channel {channel}" if channel else f"place {number}", instruction.origin
            seen[id(by_name), key] += 1
            made = sum(shape.bytes for shape in instruction.shapes)
            given = sum(s.bytes for name in instruction.operands if name in by_name for s in by_name[name].shapes)
            if instruction.operation.endswith("-start") and made > given:  # its result is operands and results
                made -= given
            largest = max(instruction.shapes, key=lambda shape: shape.bytes)
            axes = replica_groups.over_axes(instruction.attributes, mesh)
            found = Sent(instruction.kind, axes, largest, times, times * max(given, made), instruction.origin)
            key = *key, seen[id(by_name), key]
            channels[key] = min(channels.get(key, found), found, key=lambda sent: sent.executions)
        for key in [key for key in channels if not key[2]]:  # pieces that do not say where they come from
            others = [other for other in channels if other[:2] == key[:2] and other[2]]
            if others:
                piece, other = channels.pop(key), others[0]
                channels[other] = min(channels[other], piece, key=lambda sent: sent.executions)
        return sorted(channels.values(), key=lambda sent: -sent.bytes)

    def products(self) -> list[Products]:
        """Matrix products by the types of their operands and result and the precision that is asked for, the most work first."""
        groups: dict[tuple[str, str, str], list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
        for instruction, by_name, times in self.instructions():
            if instruction.operation not in ("dot", "convolution"):
                continue
            left, right = (by_name[name].shapes[0] for name in instruction.operands[:2])
            precision = instruction.attribute(r"operand_precision=\{(\w+)") or "default"
            if algorithm := instruction.attribute(r"algorithm=(\w+)"):
                precision = algorithm
            types = left.dtype if left.dtype == right.dtype else f"{left.dtype} {right.dtype}"
            group = groups[types, instruction.shapes[0].dtype, precision]
            group[0], group[1] = group[0] + 1, group[1] + times
            group[2] += times * _flops(instruction, left, right)
        found = [Products(*types, *numbers) for types, numbers in groups.items()]
        return sorted(found, key=lambda products: -products.flops)

    def kernels(self) -> list[Kernel]:
        """Custom calls (Pallas kernels, with their names if they have some, cuDNN, sorts) and Fourier transforms, by name."""
        groups: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        for instruction, _, times in self.instructions():
            if instruction.kind == "custom-call":
                name = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
                if MARKS.search(name):
                    continue
                if named := re.search(r"(\w+)/pallas_call$", instruction.origin):
                    name = f"{name} {named.group(1)}"
            elif instruction.operation == "fft":
                name = "fft"
            else:
                continue
            groups[name][0] += 1
            groups[name][1] += times
        return sorted((Kernel(name, *numbers) for name, numbers in groups.items()), key=lambda k: -k.executions)

    def large(self, least: float) -> list[Large]:
        """Arrays of at least so many bytes that are made in memory, the largest first; inside of a fusion none is."""
        fused = {
            name
            for instructions in self.computations.values()
            for instruction in instructions
            if instruction.operation in ("fusion", "custom-call")
            for name in _CALLED.findall(instruction.attributes)
        }
        found: dict[Shape, list] = {}
        for name, instructions in self.computations.items():
            if not self.executions[name] or name in fused:
                continue
            for instruction in instructions:
                if instruction.operation in VIEWS or instruction.operation.endswith("-done"):
                    continue
                for shape in instruction.shapes:
                    if shape.in_memory and shape.bytes >= least:
                        places = found.setdefault(shape, [0, instruction.origin])
                        places[0] += 1
        return sorted((Large(shape, *rest) for shape, rest in found.items()), key=lambda large: -large.shape.bytes)


def traffic(sent: Iterable[Sent]) -> list[Traffic]:
    """Collectives by kind and axes, the most bytes first."""
    groups: dict[tuple[str, str], list[Sent]] = collections.defaultdict(list)
    for one in sent:
        groups[one.kind, one.axes].append(one)
    found = [
        Traffic(*key, len(group), sum(one.executions for one in group), sum(one.bytes for one in group))
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda traffic: -traffic.bytes)


def _lines(text: str) -> Iterator[str]:
    """The lines of a program; what a kernel says of itself may have several, which are joined to one."""
    whole = ""
    for line in text.splitlines():
        if whole and (not line or line[0] == " " or _CLOSE.match(line) or _COMPUTATION.match(line)):
            yield whole
            whole = ""
        whole += line
    yield whole


def _split_at_close(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes an opened one, and what behind it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _flops(product: Instruction, left: Shape, right: Shape) -> float:
    """Two for each multiplication and addition."""
    out = product.shapes[0]
    if product.operation == "dot":
        axes = product.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2.0 * math.prod(out.sizes) * math.prod(left.sizes[int(n)] for n in axes.split(",") if n)
    labels = product.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    lhs, rhs, result = re.match(r"(\w+)_(\w+)->(\w+)", labels).groups()
    groups = int(product.attribute(r"batch_group_count=(\d+)") or 1)
    # The features of a kernel are those of one group already.
    total = 2.0 * right.sizes[rhs.index("i")] * out.sizes[result.index("f")] * left.sizes[lhs.index("b")] / groups
    window = product.attribute(r"window=\{([^}]*)\}") or ""
    for number, label in enumerate(sorted(c for c in rhs if c.isdigit())):
        total *= _pairs(
            window, number, left.sizes[lhs.index(label)], right.sizes[rhs.index(label)], out.sizes[result.index(label)]
        )
    return total


def _pairs(window: str, number: int, size: int, kernel: int, out: int) -> int:
    """Pairs of an output and a kernel's entry, along an axis of a convolution, that meet an input: no padding, no gap."""

    def field(name: str) -> list[str]:
        found = re.search(rf"\b{name}=([\d_x\-]+)", window)
        return found.group(1).split("x") if found else []

    def number_of(name: str, default: int) -> int:
        values = field(name)
        return int(values[number].split("_")[0]) if number < len(values) else default

    stride, low = number_of("stride", 1), number_of("pad", 0)
    gap, step = number_of("lhs_dilate", 1), number_of("rhs_dilate", 1)
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * step - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * gap) & (at % gap == 0)))
