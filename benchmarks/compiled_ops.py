"""The primitives in `ops/`, compiled for devices that are not here: what their compilers make of each form.

    python -m benchmarks.compiled_ops --json=compiled.json
    python -m benchmarks.compiled_ops --primitives=linear_recurrence,selective_scan --devices=v5e --modes=fwdbwd

It needs requirements-aot.txt, and no device. All arrays are of one --type, by default bfloat16, as in `benchmarks.device`.
Columns, for one device and one call, forward or forward and backward with the gradients of all inputs:

- compile s: of the processors, from tracing to machine code.
- MB moved: read from and written to the main memory, see `compilation.moved`; and "fused": what one kernel would have to move at
  the least, which is all inputs and outputs once.
- GFLOP: of matrix products; and the share of them that has an operand which is not bfloat16.
- temporaries: MB, as the compiler plans.
- loops: the most trips of a loop. A loop over tokens is slow on these devices, whatever it moves.

Names whose programs are the same share a row, and "(auto)" marks what the primitive picks by itself. There are no times of calls,
which a compiler does not know.
"""

import functools
import json
import math
import time
from collections.abc import Iterator

from common import command
from common.console import say
from common.errors import check_choice, check_range

MODES = ("fwd", "fwdbwd")
DEVICES = ("v5e", "h100")
TYPES = ("bfloat16", "float32")
MB = 1e6


def single(kind: str) -> str:
    """The name of one device of a kind: "v5e:1x1", "h100:1"."""
    from compilation.targets import TPUS

    return f"{kind}:" + "x".join(["1"] * (TPUS[kind].dimensions if kind in TPUS else 1))


def programs(
    case, length: int, batch: int, mode: str, device, wanted: set[str] | None = None, dtype: str = "bfloat16"
) -> Iterator[tuple[list[str], object, float]]:
    """The different programs of a case for a device: (who is called so, the lowered program, seconds of tracing it).

    Args:
      case: of `benchmarks.cases`.
      length, batch: of the sequences.
      mode: "fwd" or "fwdbwd".
      device: a `jax.Device`.
      wanted: the forms, beside what the primitive picks by itself; all by default.
      dtype: of all arrays.
    """
    import jax

    from benchmarks.cases import case_arrays
    from benchmarks.ops import differentiated
    from ops import dispatch

    place = jax.sharding.SingleDeviceSharding(device)

    def described(x):
        of_tokens = x.ndim >= 3 and x.shape[1] == length
        return jax.ShapeDtypeStruct((batch, *x.shape[1:]) if of_tokens else x.shape, dtype, sharding=place)

    inputs, cotangents = ([described(x) for x in arrays] for arrays in case_arrays(case, length))
    forms = dispatch.offered(device.platform).get(case.primitive, ())
    forms = [form for form in forms if wanted is None or form in wanted]
    found: dict[str, tuple[list[str], object, float]] = {}
    for form in ("auto", *forms):
        function = differentiated(functools.partial(case.function, form), length, mode)
        begin = time.process_time()
        with dispatch.platform(device.platform):
            try:
                lowered = jax.jit(function).trace(cotangents, *inputs).lower()
            except ValueError:  # not offered
                if form == "auto":
                    raise
                continue
        found.setdefault(lowered.as_text(), ([], lowered, time.process_time() - begin))[0].append(form)
    yield from found.values()


def measured(names: list[str], lowered, traced: float) -> dict:
    """What the compiler says of a program."""
    import jax

    from compilation.hlo import Program
    from compilation.moved import moved

    row = {"form": "/".join(n for n in names if n != "auto") or "auto", "auto": "auto" in names}
    begin = time.process_time()
    try:
        compiled = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return row | {"refused": str(error).splitlines()[0][:200]}
    seconds = traced + time.process_time() - begin
    program, plan = Program(compiled.as_text()), compiled.memory_analysis()
    products = program.products()
    flops = sum(one.flops for one in products)
    return row | {
        "compile_seconds": round(seconds, 1),
        "moved_bytes": moved(program),
        "fused_bytes": fused(lowered),
        "flops": flops,
        "flops_not_bf16": sum(one.flops for one in products if one.operands != "bf16"),
        "temporary_bytes": plan.temp_size_in_bytes,
        "trips": max((loop.trips for loop in program.loops), default=0),
        "products": [vars(one) for one in products],
        "kernels": [vars(one) for one in program.kernels()],
    }


def fused(lowered) -> float:
    """Bytes of a program's inputs and outputs."""
    import jax

    leaves = [*jax.tree.leaves(lowered.in_avals), *jax.tree.leaves(lowered.out_info)]
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves))


HEAD = ("form", "mode", "compile s", "MB moved", "fused", "ratio", "GFLOP", "not bf16", "temporaries", "loops")


def cells(row: dict) -> list[str]:
    """A line of the table."""
    name = row["form"] + " (auto)" * (row["auto"] and row["form"] != "auto")
    if "refused" in row:
        return [name, row["mode"], row["refused"], *[""] * (len(HEAD) - 3)]
    share = row["flops_not_bf16"] / row["flops"] if row["flops"] else None
    return [
        name,
        row["mode"],
        f"{row['compile_seconds']:.1f}",
        f"{row['moved_bytes'] / MB:,.0f}",
        f"{row['fused_bytes'] / MB:,.0f}",
        f"{row['moved_bytes'] / row['fused_bytes']:.1f}",
        f"{row['flops'] / 1e9:.1f}",
        "" if share is None else f"{100 * share:.0f} %",
        f"{row['temporary_bytes'] / MB:,.0f}",
        f"{row['trips']:,}" if row["trips"] else "",
    ]


def main(arguments: list[str]) -> None:
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--primitives", help="comma-separated; all by default")
    add("--variants", help="comma-separated settings, such as 'decay per head'; all by default")
    add("--forms", help="comma-separated; all that a primitive offers by default, 'auto' for what it picks by itself")
    add("--devices", default=",".join(DEVICES), help="comma-separated kinds, such as v5e or h100")
    add("--modes", default=",".join(MODES), help="comma-separated")
    add("--type", choices=TYPES, default=TYPES[0], help="of all arrays")
    add("--lengths", type=command.whole_numbers, default=[2048], help="comma-separated")
    add("--batch", type=int, default=8, help="rows of sequences")
    add("--json", type=command.new_file, help="where to keep everything that was found")
    options = parser.parse_args(arguments)
    command.start(platform="cpu", cache=False)
    from benchmarks.cases import CASES
    from compilation import targets

    known = tuple(dict.fromkeys(case.primitive for case in CASES))
    primitives = known if options.primitives is None else options.primitives.split(",")
    wanted = None if options.forms is None else set(options.forms.split(","))
    kinds, modes = options.devices.split(","), options.modes.split(",")
    for name in primitives:
        check_choice("--primitives", name, known)
    cases = [case for case in CASES if case.primitive in primitives]
    variants = options.variants.split(",") if options.variants else [case.variant for case in cases]
    for name in variants:
        check_choice("--variants", name, [case.variant for case in cases])
    cases = [case for case in cases if case.variant in variants]
    for name in kinds:
        check_choice("--devices", name, (*targets.TPUS, *targets.GPUS))
    for name in modes:
        check_choice("--modes", name, MODES)
    check_range("--batch", options.batch, 1)
    check_range("--lengths", min(options.lengths), 2)
    found = []
    for kind in kinds:
        device = targets.find(single(kind)).devices[0]
        for case in cases:
            for length in options.lengths:
                print(f"\n{case.primitive}, {case.variant} ({case.shape}, rows: {options.batch}, T={length}), {kind}\n")
                for line in (HEAD, ["---", "---", *["---:"] * (len(HEAD) - 2)]):
                    print(f"| {' | '.join(line)} |")
                for mode in modes:
                    made = programs(case, length, options.batch, mode, device, wanted, options.type)
                    for names, lowered, traced in made:
                        if wanted is not None and not wanted & set(names):
                            continue
                        place = {"device": kind, "primitive": case.primitive, "variant": case.variant, "length": length}
                        row = place | {"type": options.type, "batch": options.batch, "mode": mode}
                        row |= measured(names, lowered, traced)
                        print(f"| {' | '.join(cells(row))} |", flush=True)
                        found.append(row)
                        if options.json:  # after each row, so that an aborted run leaves what it had
                            options.json.write_text(json.dumps(found, indent=1))
    if options.json:
        say(f"kept as {options.json}")


if __name__ == "__main__":
    command.run(main)
