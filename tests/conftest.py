"""Test session set-up: CPU, eight fake devices, cheap compilation."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Compilation dominates these tests; unoptimised machine code computes the same mathematics.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags

if not flags.FLAGS.is_parsed():  # grain reads absl flags
    flags.FLAGS.mark_as_parsed()
