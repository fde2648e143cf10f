"""What a model costs: parameters, floating-point operations and carry, derived from the traced model.

Operations are counted in the jaxpr (the compiler's own count takes a loop's body once). A multiply-add is two. Only
matrix products, convolutions, triangular solves and Fourier transforms count; elementwise work, reductions and scans
made of it do not, so a recurrence is counted in its matmul form: trace inside `ops.dispatch.matmul_form()` for
numbers that do not depend on the platform.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters import partial_eval
from jaxtyping import PyTree


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
      matmul: in matrix products (dense and ragged), convolutions and triangular solves.
      fft: in Fourier transforms of N points: 5 N log2 N for complex, half of it for real input or output.
      unknown_loops: loops whose number of turns is not known before running (`while`); their bodies are counted once,
        so the other numbers are lower bounds unless this is 0.
    """

    matmul: int = 0
    fft: int = 0
    unknown_loops: int = 0

    @property
    def total(self) -> int:
        """matmul + fft."""
        return self.matmul + self.fft

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matmul + other.matmul, self.fft + other.fft, self.unknown_loops + other.unknown_loops)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.matmul * times, self.fft * times, self.unknown_loops)


def flops(fn: Callable, *args: Any) -> Flops:
    """Counts the operations of `fn(*args)`; nothing is computed.

    What does not reach the results is not counted. What rematerialisation computes twice is counted twice, so the count
    of a training step is that of the hardware; for the utilisation of a model (MFU) take three times the forward pass.
    A conditional counts as its most expensive branch.

    Args:
      fn: a function of arrays.
      *args: arrays, `jax.ShapeDtypeStruct`s or trees of them.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(live)


def parameter_count(params: PyTree) -> int:
    """Number of parameters in a tree of arrays or `jax.ShapeDtypeStruct`s, or in a module."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def active_parameter_count(model: nnx.Module) -> int:
    """Number of parameters of a module that one token uses: of experts and of embeddings of n-grams, its share of them
    (`models.params.param`, `active`)."""
    found = (variable for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return round(sum(math.prod(v.shape) * v.get_metadata().get("active", 1) for v in found))


def carry_bytes(model: nnx.Module, batch: int, capacity: int) -> int:
    """Bytes of `model.initial_carry(batch, capacity)`, which is not allocated."""
    carry = nnx.eval_shape(lambda m: m.initial_carry(batch, capacity), model)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))


@dataclasses.dataclass(frozen=True)
class Summary:
    """The cost of a model, as `summarize` finds it.

    Attributes:
      name: what the table calls the model.
      parameters: number of parameters.
      active_parameters: number of those that one token uses; all, but for mixtures of experts and embeddings of n-grams.
      flops_per_token: floating-point operations of the forward pass for each token.
      carry_bytes: size of one sequence's carry; None for a model that has none.
    """

    name: str
    parameters: int
    active_parameters: int
    flops_per_token: float
    carry_bytes: int | None


def summarize(name: str, model: nnx.Module, inputs: jax.ShapeDtypeStruct, tokens: int, capacity: int | None) -> Summary:
    """Sums up what a model costs.

    Args:
      name: what the table calls the model.
      model: the model, with arrays or abstract (`nnx.eval_shape`).
      inputs: the model's first argument.
      tokens: number of tokens that the inputs hold (for pairs of rows, that of one row).
      capacity: number of tokens that the carry is to hold; None for a model that has no carry.

    Returns:
      the model's parameters, operations (of the forward pass, per token) and carry (per sequence).
    """
    graphdef, variables = nnx.split(model)
    forward = flops(lambda variables, x: nnx.merge(graphdef, variables)(x)[0], variables, inputs)
    carry = None if capacity is None else carry_bytes(model, 1, capacity)
    active = active_parameter_count(model)
    return Summary(name, parameter_count(variables), active, forward.total / tokens, carry)


def table(rows: Sequence[Summary]) -> str:
    """The summaries as aligned text."""
    sparse = any(row.active_parameters < row.parameters for row in rows)  # else one column says it
    active = ("active",) if sparse else ()
    cells = [("name", "parameters", *active, "FLOPs per token", "carry bytes per sequence")]
    for row in rows:
        carry = "-" if row.carry_bytes is None else f"{row.carry_bytes:,}"
        active = (f"{row.active_parameters:,}",) if sparse else ()
        cells.append((row.name, f"{row.parameters:,}", *active, f"{row.flops_per_token:,.0f}", carry))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *rest in cells:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *numbers)))
    return "\n".join(lines)


def _count(jaxpr: Jaxpr) -> Flops:
    return sum((_count_equation(eqn) for eqn in jaxpr.eqns), Flops())


def _count_equation(eqn) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name in _FORMULAS:
        return _FORMULAS[name](eqn)
    inner = [_count(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner, key=lambda count: count.total)
    count = sum(inner, Flops())
    if name == "scan":
        return count * params["length"]
    if name == "while":
        return count + Flops(unknown_loops=1)
    if name == "shard_map":  # the body is what one device does
        return count * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":  # the body is what one point of the grid does
        return count * math.prod(params["grid_mapping"].grid)
    return count


def _dot(eqn) -> Flops:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return Flops(2 * math.prod(out.shape) * math.prod(lhs.shape[i] for i in contracting))


def _ragged_dot(eqn) -> Flops:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    lhs, groups = eqn.invars[0].aval, eqn.invars[2].aval
    count = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs.shape[i] for i in contracting)
    # Where the groups divide the contracted dimension, each output is a sum over its own group's share.
    ragged = set(numbers.lhs_ragged_dimensions) & set(contracting)
    return Flops(count // groups.shape[-1] if ragged else count)


def _convolution(eqn) -> Flops:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    per_output = math.prod(kernel.shape) // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return Flops(2 * math.prod(out.shape) * per_output)


def _triangular_solve(eqn) -> Flops:
    matrix, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return Flops(math.prod(out.shape) * matrix.shape[-1])


def _fft(eqn) -> Flops:
    lengths = eqn.params["fft_lengths"]
    points = math.prod(lengths)
    signal = eqn.invars[0].aval if eqn.params["fft_type"].name != "IRFFT" else eqn.outvars[0].aval
    transforms = math.prod(signal.shape[: signal.ndim - len(lengths)])
    factor = 5 if eqn.params["fft_type"].name in ("FFT", "IFFT") else 2.5
    return Flops(fft=round(transforms * factor * points * math.log2(points)))


_FORMULAS = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "triangular_solve": _triangular_solve,
    "fft": _fft,
}
