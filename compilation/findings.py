"""A step compiled for its devices, and what the compiler says of it."""

import dataclasses
import importlib.metadata
import math
import re
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax

from common.errors import UserError
from compilation import hlo
from compilation.steps import Step
from compilation.targets import GIB, GPUS, Target
from ops import dispatch
from training import sharding

LONG = 1000  # trips of a loop that are worth a line
LARGE = 2**20  # bytes of an array that are worth a line
LONG_ROWS = 2**14  # tokens of a row that is worth being split
MOST = 8  # lines of a list


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      capacity: what a program may use.
      peak: what this one uses at most, as its compiler plans; where it refuses, what it says that is needed.
      held: arguments by what they are, as split by the mesh; the compiler's padding is not in it.
      temporaries: the compiler's: activations, gradients and everything else that begins and ends in the step.
      results: of the step that do not take the place of an argument.
      program: the machine code.
      remark: on the capacity.
    """

    capacity: float
    peak: float
    held: dict[str, float]
    temporaries: float | None = None
    results: float | None = None
    program: float | None = None
    remark: str = ""

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything that is said of a step. Lists are whole; a page shows the beginning of them.

    Attributes:
      step, target, device, devices, mesh: what was compiled for what.
      task, pattern, parameters, rows, length, dtype: the model and its batch.
      forms: of the primitives, as they were chosen.
      memory: of one device.
      traffic, sent, products, kernels, loops, arrays: see `compilation.hlo`; empty where the compiler refused.
      gathered: the collectives that collect what is no parameter from devices with other rows of the batch.
      collected: the collectives over `sequence` that bring a device activations of whole rows.
      whole: parameters that the mesh does not split although it could.
      suggestions: what would make it fit.
      refusal: what the compiler said where it refused.
      seconds: of tracing, lowering and compiling, by the clock of the wall; "processor" of all of them.
      versions: of the compilers.
    """

    step: str
    target: str
    device: str
    devices: int
    mesh: dict[str, int]
    task: str
    pattern: tuple[str, ...]
    parameters: int
    rows: int
    length: int
    dtype: str
    forms: dict[str, list[str]]
    memory: Memory
    traffic: list[hlo.Traffic]
    sent: list[hlo.Sent]
    products: list[hlo.Products]
    kernels: list[hlo.Kernel]
    loops: list[hlo.Loop]
    arrays: list[hlo.Large]
    gathered: list[hlo.Sent]
    collected: list[hlo.Sent]
    whole: list[sharding.Whole]
    suggestions: list[str]
    refusal: str
    seconds: dict[str, float]
    versions: dict[str, str]

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {"fits": self.memory.fits}


def compile_step(step: Step, target: Target, **options: Any) -> Findings:
    """Compiles a step for the devices that its model is built on.

    Args:
      step: what is compiled.
      target: the devices.
      **options: of the compiler.

    Raises:
      UserError: where the model refuses its inputs or the mesh when it is traced.
    """
    began, cpu = time.perf_counter(), time.process_time()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    refusal, compiled = "", None
    with jax.set_mesh(step.built.mesh), dispatch.implementation(step.config.train.implementation) as choice:
        try:
            traced = step.function.trace(*step.arguments)
        except RuntimeError as error:  # of JAX, before it writes down a call of cuDNN
            if "cuDNN not found" not in str(error):
                raise
            raise UserError(
                f"--compile_for={target.name}: this model's attention is cuDNN's on GPUs, and cuDNN is not installed: pip "
                "install nvidia-cudnn-cu13 (450 MB), or choose the portable form, train.implementation=attention=blockwise"
            ) from error
        lap("trace")
        lowered = traced.lower()
        lap("lower")
        try:
            compiled = lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
        lap("compile")
    seconds["processor"] = time.process_time() - cpu
    mesh = dict(step.built.mesh.shape)
    program = hlo.Program("" if compiled is None else _text(compiled, target))
    sent = program.sent(mesh)
    memory = _memory(step, target, compiled, refusal)
    config, params = step.config, step.built.abstract["params"]
    return Findings(
        step=step.name,
        target=target.name,
        device=target.kind,
        devices=len(target.devices),
        mesh=mesh,
        task=config.task.name,
        pattern=config.model.pattern,
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        rows=step.rows,
        length=config.task.spec.length,
        dtype=config.train.compute_dtype,
        forms={name: sorted(forms) for name, forms in sorted(choice.taken.items())},
        memory=memory,
        traffic=hlo.traffic(sent),
        sent=sent,
        products=program.products(),
        kernels=program.kernels(),
        loops=[loop for loop in program.loops if loop.trips > LONG or loop.trips == hlo.UNKNOWN],
        arrays=program.large(LARGE),
        gathered=list(_gathered(step, sent)),
        collected=list(of_whole_rows(sent, _own_rows(step) * config.task.spec.length, sizes_of_parameters(step))),
        whole=sharding.left_whole(params, step.built.metadata, step.built.mesh),
        suggestions=[] if memory.fits else list(_suggestions(step, memory)),
        refusal=refusal,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        versions=_versions(target),
    )


def bytes_on_device(tree: Any) -> float:
    """Bytes of a tree of `jax.ShapeDtypeStruct`s on one device; an array without a sharding counts whole."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * (
            8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize
        )
    return total


def needed(refusal: str) -> float:
    """The bytes that a compiler says are needed where it refuses a program.

    Args:
      refusal: its message, such as "... the total memory required for HLO temporaries (17.20G) exceeds available HBM (15.75G)" or
        "Used 17.20G of 15.75G hbm".

    Returns:
      the bytes, or infinity where the message has no number.
    """
    found = re.search(r"(?:required[^(]*\(|[Uu]sed )([\d.]+)([KMGT])", refusal)
    return float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)] if found else math.inf


def planned(plan: Any) -> int:
    """The bytes of a device that a program takes at most, of its `memory_analysis()`."""
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    total = plan.argument_size_in_bytes + results + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes
    return max(getattr(plan, "peak_memory_in_bytes", 0), total)


def _memory(step: Step, target: Target, compiled: Any, refusal: str) -> Memory:
    held = {name: bytes_on_device(tree) for name, tree in step.held.items()}
    if compiled is None:
        return Memory(target.memory, needed(refusal), held, remark=target.remark)
    plan = compiled.memory_analysis()
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Memory(
        capacity=target.memory,
        peak=planned(plan),
        held=held,
        temporaries=plan.temp_size_in_bytes,
        results=results,
        program=plan.generated_code_size_in_bytes,
        remark=target.remark,
    )


def _gathered(step: Step, sent: list[hlo.Sent]) -> Iterator[hlo.Sent]:
    """Collectives over the axes that split rows which gather or exchange something that has not the size of a parameter.

    Rows do not depend on each other: beside parameters and the sums of their gradients nothing needs to go there.
    """
    shape = step.built.mesh.shape
    split = {axis for axis in sharding.RULES["batch"] if shape[axis] > 1}
    known = sizes_of_parameters(step)
    for collective in sent:
        kinds = ("all-gather", "all-to-all", "ragged-all-to-all", "collective-permute")
        # A small sum over devices may be made by gathering its summands.
        summed = collective.origin.endswith("reduce_sum")
        activation = math.prod(collective.shape.sizes) not in known and not summed
        if collective.kind in kinds and split & set(collective.axes.split(",")) and activation:
            if collective.bytes >= LARGE:
                yield collective


def sizes_of_parameters(step: Step) -> set[float]:
    """The sizes of parameters and of their parts: of a layer, of a gate, of what an axis leaves of them."""
    shape = step.built.mesh.shape
    return {
        math.prod(leaf.shape[first:]) / ways
        for leaf in jax.tree.leaves(step.built.abstract["params"])
        for first in range(len(leaf.shape) + 1)
        for ways in (1, shape["tensor"], shape["fsdp"], shape["tensor"] * shape["fsdp"])
    }


def _own_rows(step: Step) -> int:
    """The rows of a device in one pass."""
    return max(1, step.rows // (step.config.train.accumulation * sharding.batch_ways(step.built.mesh)))


def of_whole_rows(sent: Iterable[hlo.Sent], tokens: int, parameters: Collection[float] = ()) -> Iterator[hlo.Sent]:
    """Collectives over the mesh axis `sequence` that bring a device at least a real number for each token of whole rows.

    What a ring or a neighbour sends is a shard: permutations are not among them.

    Args:
      sent: from `hlo.Program.sent`.
      tokens: of the rows of a device, in all shards.
      parameters: sizes that are those of parameters or of their gradients.
    """
    for one in sent:
        size, real = math.prod(one.shape.sizes), one.shape.dtype.startswith(("f", "bf"))
        if "sequence" in one.axes.split(",") and one.kind != "collective-permute" and real and size >= tokens:
            if size not in parameters:
                yield one


def _suggestions(step: Step, memory: Memory) -> Iterator[str]:
    config, mesh = step.config, step.built.mesh
    if step.name == "train":
        if config.model.remat == "none":
            yield "--config.model.remat=elementwise computes again what is cheap, instead of keeping it of all layers"
        if config.model.remat != "full":
            yield "--config.model.remat=full computes activations again instead of keeping those of all layers"
        own = _own_rows(step)
        spec, ways = config.task.spec, config.train.loss_chunks * mesh.shape["tensor"] * mesh.shape["sequence"]
        logits = 4 * own * spec.length * spec.targets // ways
        whole = any(metric.whole_rows for metric in spec.metrics)
        if config.model.head == "token" and config.model.loss is None and not whole and logits > 0.05 * memory.capacity:
            chunks = 8 * config.train.loss_chunks
            yield f"--config.train.loss_chunks={chunks} makes {amount(logits)} of logits a piece of the length at a time"
        if own > 1:
            least = next(n for n in range(2, own + 1) if own % n == 0)
            times = config.train.accumulation * least
            yield f"--config.train.accumulation={times} computes {own // least} of {own} rows of a device at a time"
    state = memory.held["parameters"] + memory.held.get("optimizer", 0)
    if state > 0.2 * memory.capacity and mesh.shape["data"] > 1:
        ways = mesh.shape["fsdp"] * mesh.shape["data"]
        yield f"--config.mesh.fsdp={ways} --config.mesh.data=1 splits parameters and optimizer over {ways} devices"
    several = mesh.size > 1  # there is nothing to split on one device
    if several and mesh.shape["tensor"] == 1:
        yield "--config.mesh.tensor=2 splits heads and hidden units"
    in_shards = all(mixer.in_shards for mixer in config.model.sketches.values())
    if several and in_shards and config.task.spec.length >= LONG_ROWS:
        yield f"--config.mesh.sequence={2 * mesh.shape['sequence']} splits the rows, each over several devices"
    yield "more devices, or a smaller train.batch_size"


def _text(compiled: jax.stages.Compiled, target: Target) -> str:
    """The compiled program, as jaxlib writes it, which has to know all instructions of the compiler that made it."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        versions = ", ".join(" ".join(pair) for pair in _versions(target).items())
        raise UserError(
            f"--compile_for={target.name}: the step compiles, but what the compiler wrote cannot be read by this jaxlib "
            f"({str(error).splitlines()[0]}). Installed are {versions}; the compiler that belongs to this JAX comes with "
            "pip install -r requirements-aot.txt"
        ) from error


def _versions(target: Target) -> dict[str, str]:
    gpu = target.name.partition(":")[0] in GPUS
    names = ("jax", "jaxlib", *(("jax-cuda13-pjrt", "jax-cuda12-pjrt") if gpu else ("libtpu",)))
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def amount(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
