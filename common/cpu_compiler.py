"""XLA's compiler for CPUs, kept from a library that computes wrong numbers.

XLA hands whole groups of products, maps and sums to YNNPACK. Where an operand of a product in such a group is one number
everywhere, as the state before the first token is, what is summed behind that product is wrong, or NaN: a model of 64 rows
was right in training, where the groups are others, and wrong in validation. Without these groups a training step takes up to
7 % longer. tests/common/test_cpu_compiler.py has the smallest such program that we know.
"""

import glob
import os
import sys
import warnings
from importlib.metadata import version

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# XLA ends the process for a flag that it does not know, and so the versions that know it have to be named.
VERSIONS = ("0.10.", "0.11.", "0.12.")


def avoid_wrong_products() -> None:
    """Has XLA make all code by itself. To be called before it is used first; what the variable XLA_FLAGS says takes precedence.

    Warns where a CPU has been used already: XLA has read its flags then. A machine that has TPUs is left alone: libtpu, too, ends
    the process for flags that it does not know.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    has_tpus = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if FLAG in flags or not version("jaxlib").startswith(VERSIONS) or has_tpus:
        return
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=".strip()
    if _cpu_was_used():
        warnings.warn(
            "JAX was used before this was imported, and so its compiler for CPUs hands groups of products to a library that "
            "computes some of them wrongly (common/cpu_compiler.py). Import it before JAX computes anything, or start Python "
            f"with XLA_FLAGS={FLAG}= in its environment.",
            RuntimeWarning,
            stacklevel=2,
        )


def _cpu_was_used() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")  # JAX says it nowhere else
    return bridge is not None and bridge.backends_are_initialized() and bridge.get_backend().platform == "cpu"
