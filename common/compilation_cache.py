"""What XLA has compiled is kept in the cache folder, so that the next start of the same program does not compile again.

The folder is keyed by the versions of jax and jaxlib and by the processor, whose instructions the machine code is made for. It is
bounded: what was used longest ago goes first. A damaged entry is compiled anew. JAX's own variables take precedence:
JAX_ENABLE_COMPILATION_CACHE=false is without, and JAX_COMPILATION_CACHE_DIR is elsewhere.
"""

import hashlib
import os
import pathlib
import platform

import jax
import jaxlib

from common.files import NoHome, cache_folder

MAX_BYTES = 2 * 2**30
MINIMUM_SECONDS = 0.2  # what compiles faster is not kept


def use() -> None:
    """Turns the cache on for this process, unless the environment says otherwise or its folder cannot be made."""
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    key = f"jax-{jax.__version__}-jaxlib-{jaxlib.__version__}-{_processor()}"
    try:
        folder = cache_folder() / "compiled" / key
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, NoHome):
        return  # a cache is a convenience
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MINIMUM_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _processor() -> str:
    """A name for the machine's instruction set: machine code for one with more of them does not run on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kinds = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    except OSError:  # not Linux
        kinds = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(repr(kinds).encode()).hexdigest()[:12]}"
