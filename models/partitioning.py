"""Logical axis names of activations.

A model says what the dimensions of an activation are (`constrain(q, "batch", "length", "heads", None)`); who runs the
model says what to do about it. Outside `constraints` nothing happens, so a model needs no mesh.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from jaxtyping import Array, Shaped

Constraint = Callable[[Array, tuple[str | None, ...]], Array]

_constraint: contextvars.ContextVar[Constraint | None] = contextvars.ContextVar("constraint", default=None)


@contextlib.contextmanager
def constraints(constraint: Constraint) -> Iterator[None]:
    """Makes `constrain` call `constraint(x, axes)` while tracing inside."""
    token = _constraint.set(constraint)
    try:
        yield
    finally:
        _constraint.reset(token)


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Says which logical axis each dimension of an activation is; returns x, its values unchanged.

    Args:
      x: an activation.
      *axes: a name of `training.sharding.RULES` for each dimension ("batch", "length", "activation", "heads",
        "kv_heads", "mlp", "vocab", "state"), or None for a dimension that is never split.

    Raises:
      ValueError: if `axes` does not name every dimension.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"an activation of shape {x.shape} needs {x.ndim} axis names, got {axes}")
    constraint = _constraint.get()
    return x if constraint is None else constraint(x, axes)
