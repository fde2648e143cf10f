"""How many bytes a compiled program reads from and writes to its device's main memory.

XLA's own count (`cost_analysis`) is none for GPUs, counts a loop's body once, and counts what stays in a TPU core's memory. Here
every instruction counts as often as it is executed, with what it reads of its operands and what it writes. An array of which
only a piece is read or written counts as that piece. What a cache would save is not known, nor what tiles are padded with.
"""

import re
from collections.abc import Mapping

from compilation.hlo import MARKS, VIEWS, Instruction, Program

# Instructions that read as much of their first operand as they return.
PIECES = ("dynamic-slice", "slice", "gather")


def moved(program: Program) -> float:
    """Bytes that are read and written in one run of the program."""
    inside = {  # what one instruction does as a whole
        called
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.operation in ("fusion", "custom-call") or instruction.operation.endswith("-start")
        for called in re.findall(r"(?:calls|called_computations=\{)=?%?([\w.\-]+)", instruction.attributes)
    }
    total = 0.0
    for name, instructions in program.computations.items():
        if name in inside or not program.executions[name]:
            continue
        by_name = {instruction.name: instruction for instruction in instructions}
        total += program.executions[name] * sum(_bytes(program, one, by_name) for one in instructions)
    return total


def _bytes(program: Program, instruction: Instruction, by_name: Mapping[str, Instruction]) -> float:
    """What one execution of an instruction reads and writes."""
    if instruction.operation in VIEWS or instruction.operation.endswith("-done"):
        return 0
    if instruction.kind == "custom-call" and MARKS.search(instruction.attribute(r'custom_call_target="([^"]*)"') or ""):
        return 0
    operands = [by_name[name] for name in instruction.operands if name in by_name]
    if instruction.operation == "fusion":
        body = program.computations[instruction.attribute(r"calls=%?([\w.\-]+)")]
        read = sum(
            min(_read(program, body, number), size) for number, size in enumerate(_main(x) for x in operands) if size
        )
        return read + (min(_written(program, body), _main(instruction)) if _main(instruction) else 0)
    if instruction.operation == "dynamic-update-slice":
        return _main(operands[1]) + (operands[1].shapes[0].bytes if _main(instruction) else 0)
    results = list(instruction.shapes)
    if instruction.operation.endswith("-start"):  # its result is operands and results
        for shape in (shape for x in operands for shape in x.shapes):
            if shape in results:
                results.remove(shape)
    written = sum(shape.bytes for shape in results if shape.in_memory)
    if instruction.kind in PIECES:
        return written + (sum(shape.bytes for shape in results) if _main(operands[0]) else 0)
    return written + sum(_main(x) for x in operands)


def _main(instruction: Instruction) -> float:
    """Bytes of its arrays that lie in the device's main memory."""
    return sum(shape.bytes for shape in instruction.shapes if shape.in_memory)


def _read(program: Program, body: list[Instruction], number: int) -> float:
    """What a fusion reads of one of its parameters."""
    names = {i.name for i in body if i.operation == "parameter" and re.match(rf"{number}(?!\d)", i.attributes)}
    total = 0.0
    for one in body:
        if not names & set(one.operands):
            continue
        if one.operation in ("bitcast", "reshape"):
            names.add(one.name)
        elif one.operation in PIECES and one.operands[0] in names:
            total += sum(shape.bytes for shape in one.shapes)
        elif one.operation == "dynamic-update-slice" and one.operands[0] in names:
            continue
        elif one.operation == "fusion":
            inner = program.computations[one.attribute(r"calls=%?([\w.\-]+)")]
            total += sum(_read(program, inner, place) for place, name in enumerate(one.operands) if name in names)
        else:
            return float("inf")  # all of it
    return total


def _written(program: Program, body: list[Instruction]) -> float:
    """What a fusion writes: of an array that it only changes a piece of, the piece."""
    by_name = {instruction.name: instruction for instruction in body}

    def of(one: Instruction) -> float:
        if one.operation == "dynamic-update-slice":
            return sum(shape.bytes for shape in by_name[one.operands[1]].shapes)
        if one.operation in ("bitcast", "reshape", "tuple"):
            return sum(of(by_name[name]) for name in one.operands)
        if one.operation == "fusion":
            return _written(program, program.computations[one.attribute(r"calls=%?([\w.\-]+)")])
        return sum(shape.bytes for shape in one.shapes)

    return of(body[-1])
