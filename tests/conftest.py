"""Test session set-up: CPU, eight fake devices, cheap compilation."""

import os
import pathlib
from importlib.metadata import version

from common import cpu_compiler

# Compilation dominates these tests; unoptimised machine code computes the same mathematics.
CHEAP = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10.") and "FUSION_EMITTERS" not in os.environ:  # later ones have no such choice
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")  # compiles in half the time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [*CHEAP, "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")]
)
cpu_compiler.avoid_wrong_products()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

from tests import typechecking  # noqa: E402

# Every call of a function with annotations is checked against them, shapes included. Both lines take effect on what is
# imported after them. NumPy's arrays are as good as JAX's, as they are to JAX.
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook(["ops", "models"], f"{typechecking.__name__}.check")


CORE = ("common", "models", "ops")  # rooms


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        choices=("core", "rest", "all"),
        default="all",
        help="core: primitives, models, and one mixer of each primitive, which take minutes; rest: the other tests; all: both",
    )


def pytest_collection_modifyitems(config, items):
    part, here = config.getoption("--part"), pathlib.Path(__file__).parent
    if part == "all":
        return
    parts = {"core": [], "rest": []}
    for item in items:
        of_core = item.path.relative_to(here).parts[0] in CORE and not item.get_closest_marker("rest")
        parts["core" if of_core else "rest"].append(item)
    items[:] = parts.pop(part)
    config.hook.pytest_deselected(items=[item for left_out in parts.values() for item in left_out])


@pytest.fixture
def unchecked():
    """Annotations are not checked: for tests of what functions say themselves when shapes do not fit."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


if not flags.FLAGS.is_parsed():  # grain reads absl flags
    flags.FLAGS.mark_as_parsed()
