"""Memory that XLA has given back stays with the process.

A step's temporaries are one block of memory on a CPU, which the C library takes from the system before every step and hands back
behind it: the system then clears all of its pages each time, which takes a sixth of a small model's step. glibc can be told to
keep freed memory; blocks larger than 64 MB it keeps in its main arena only, and so there must be no other. This has to be said
before the threads start that would make arenas of their own.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# The parameters of mallopt(3): its number, our value, and the name of the tunable by which a user may have chosen another.
_PARAMETERS = {
    "mmap_max": (-4, 0),
    "trim_threshold": (-1, 2**31 - 1),
    "arena_max": (-8, 1),
}


def keep_freed_memory() -> None:
    """Tells glibc to; without effect with another C library. What the variable GLIBC_TUNABLES says takes precedence."""
    if not sys.platform.startswith("linux") or (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is None:
        return
    chosen = os.environ.get("GLIBC_TUNABLES", "")
    for name, (parameter, value) in _PARAMETERS.items():
        if f"glibc.malloc.{name}=" not in chosen:
            mallopt(parameter, value)


def only_cpu(platforms: str | None) -> bool:
    """Whether JAX can but choose a CPU, as far as is known before it has looked for devices.

    Args:
      platforms: those that JAX may use, joined by commas (`jax.config.jax_platforms`); None for all that are installed.
    """
    if platforms:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
