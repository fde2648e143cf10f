"""Choice of the implementation of a primitive.

Every primitive takes `implementation=`. The default, "auto", lets a run-wide choice (`with implementation("chunked"):`)
decide, and without one the primitive's own policy, which goes by platform and shape. The choice never changes what is
computed, so it is an option of a run and not a hyperparameter of a mixer.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

_run_wide = contextvars.ContextVar("implementation", default="auto")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Makes `name` the choice of every primitive that offers it and is called with "auto" while tracing inside."""
    token = _run_wide.set(name)
    try:
        yield
    finally:
        _run_wide.reset(token)


def choose(requested: str, offered: Sequence[str], policy: str) -> str:
    """Returns the implementation to use.

    Args:
      requested: the caller's `implementation=` argument, "auto" or one of `offered`.
      offered: the implementations that the primitive has.
      policy: what "auto" means for these shapes on this platform.

    Raises:
      ValueError: if `requested` is not offered.
    """
    if requested == "auto":
        requested = _run_wide.get()
        return requested if requested in offered else policy
    if requested not in offered:
        raise ValueError(f"implementation={requested!r} is not offered here; choose 'auto' or one of {tuple(offered)}")
    return requested


def on_cpu() -> bool:
    """Whether computations run on the CPU by default."""
    return jax.default_backend() == "cpu"


def matmul_precision(dtype) -> jax.lax.Precision:
    """Full precision for float32 (and wider) operands, the platform's fast path for bfloat16."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else jax.lax.Precision.DEFAULT
