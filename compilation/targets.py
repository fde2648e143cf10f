"""Devices that need not be here: a name such as "v5e:16x16" or "h100:8" becomes the devices that a mesh is made of.

TPUs are known to libtpu, which holds Google's compiler and runs on any x86 machine with Linux. GPUs are known to JAX's CUDA
plugin, which is told what a GPU is like: the descriptions below are from NVIDIA's data sheets and from what the driver reports of
such a device. Both need no device and no driver. Neither comes with our requirements, see requirements-aot.txt.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies

from common.errors import UserError, near

GIB = 2**30
PER_HOST = 8  # GPUs of a host
TAKEN = 0.75  # of a GPU's memory, by JAX's allocator


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A generation of TPUs.

    Attributes:
      memory: bytes of a device that a program may use, as its compiler refuses more ("available HBM").
      dimensions: of its topologies.
      options: for libtpu. A v4 has two cores that are one device (a "megacore") wherever JAX runs on it.
    """

    memory: float
    dimensions: int
    options: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, in the words of XLA's description of it.

    Attributes:
      name: as the driver gives it.
      memory: bytes.
      bandwidth: of the memory, bytes per second.
      cores: streaming multiprocessors.
      units: that a core has for float32.
      clock: GHz.
      cache: level 2, bytes.
      shared: memory that the blocks on a core share, bytes; `block` is the most that one of them may have.
      capability: compute capability.
    """

    name: str
    memory: int
    bandwidth: int
    cores: int
    units: int
    clock: float
    cache: int
    shared: int
    block: int
    capability: tuple[int, int]

    def description(self) -> str:
        """The text of a `xla.GpuTargetConfigProto`."""
        major, minor = self.capability
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  shared_memory_per_block_optin: {self.block}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


TPUS = {
    "v4": Tpu(30.75 * GIB, 3, {"chip_config_name": "megacore"}),
    "v5e": Tpu(15.75 * GIB, 2),
    "v5p": Tpu(95.73 * GIB, 3),
    "v6e": Tpu(31.24 * GIB, 2),
    "tpu7x": Tpu(94.74 * GIB, 3),  # a chip is two devices
}
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 84_987_740_160, 2_039 * 10**9, 108, 64, 1.41, 40 * 2**20, 167_936, 166_912, (8, 0)
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 84_929_347_584, 3_352 * 10**9, 132, 128, 1.98, 50 * 2**20, 233_472, 232_448, (9, 0)
    ),
    "h200": Gpu("NVIDIA H200", 150_110_011_392, 4_800 * 10**9, 132, 128, 1.98, 50 * 2**20, 233_472, 232_448, (9, 0)),
    "b200": Gpu("NVIDIA B200", 191_514_345_472, 8_000 * 10**9, 148, 128, 1.965, 126 * 2**20, 233_472, 232_448, (10, 0)),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as it was asked for, such as "v5e:16x16".
      devices: of the whole topology; they compute nothing.
      memory: bytes that each of them has for a program.
      remark: on these bytes.
    """

    name: str
    devices: Sequence[jax.Device]
    memory: float
    remark: str = ""

    @property
    def kind(self) -> str:
        """What its maker calls the device."""
        return self.devices[0].device_kind


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """The kind of device and its numbers, checked: ("v5e", (16, 16)) of "v5e:16x16".

    Raises:
      UserError: for a kind that is not known, or numbers that it does not come in.
    """
    kind, _, numbers = text.partition(":")
    if kind not in TPUS and kind not in GPUS:
        raise UserError(f"--compile_for={text}: there is no device {kind!r}; {near(kind, (*TPUS, *GPUS))}")
    sizes = tuple(map(int, numbers.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", numbers) else ()
    if kind in TPUS and len(sizes) != (wanted := TPUS[kind].dimensions):
        example = "x".join(["4"] * wanted)
        raise UserError(f"--compile_for={text}: a topology of {kind} has {wanted} sizes, as in {kind}:{example}")
    if kind in GPUS and (len(sizes) != 1 or (sizes[0] > PER_HOST and sizes[0] % PER_HOST)):
        raise UserError(
            f"--compile_for={text}: say how many, as in {kind}:8; more than {PER_HOST} come in hosts of {PER_HOST}"
        )
    return kind, sizes


def find(text: str) -> Target:
    """The devices of a name, "v5e:16x16" or "h100:8".

    Raises:
      UserError: for a name that is not known, and where the compiler for it is not installed.
    """
    kind, sizes = parse(text)
    return _tpus(text, kind, sizes) if kind in TPUS else _gpus(text, kind, sizes[0])


def missing(kind: str) -> str | None:
    """What has to be installed to compile for a kind of device, as a sentence; None where nothing has."""
    if kind in TPUS:
        if importlib.util.find_spec("libtpu") is None:
            return (
                f"the compiler for TPUs is not installed: pip install 'jax[tpu]=={jax.__version__}' (libtpu, 200 MB; it is "
                "Google's, and its licence is that of the Google Cloud Platform, https://cloud.google.com/terms)"
            )
        return None
    if any(importlib.util.find_spec(f"jax_{cuda}_plugin") is not None for cuda in ("cuda12", "cuda13")):
        return None
    packages = " ".join(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
    return f"the compiler for NVIDIA's GPUs is not installed: pip install {packages} (400 MB)"


def _tpus(text: str, kind: str, sizes: tuple[int, ...]) -> Target:
    _check_installed(text, kind)
    # libtpu ends the process for a flag that it does not know. This machine's compiler, which has others, has read them by now.
    jax.devices("cpu")
    os.environ.pop("XLA_FLAGS", None)
    # Another process of this machine may have loaded the library; nothing is done with a device.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    tpu = TPUS[kind]
    options = dict(tpu.options)
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    with _heard():
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=text, **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"--compile_for={text}: libtpu has no such topology: {str(error).splitlines()[0]}"
            ) from error
    return Target(text, devices, tpu.memory)


def _gpus(text: str, kind: str, count: int) -> Target:
    _check_installed(text, kind)
    hosts, each = (count // PER_HOST, PER_HOST) if count > PER_HOST else (1, count)
    gpu = GPUS[kind]
    with _heard():
        description = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{each}", target_config=gpu.description()
        )
    remark = (
        f"three quarters of {gpu.memory / GIB:.1f} GiB, which JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more"
    )
    return Target(text, description.devices, TAKEN * gpu.memory, remark)


def _check_installed(text: str, kind: str) -> None:
    if reason := missing(kind):
        raise UserError(f"--compile_for={text}: {reason}")


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Keeps from the terminal what a library writes to the process's standard error, unless what is done inside fails.

    libtpu complains there that this machine has no TPU.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, UserError):
                file.seek(0)
                os.write(kept, file.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
