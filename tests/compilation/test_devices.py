"""One mixer of each primitive, compiled by the compilers for TPUs and GPUs: `make aot`."""

import pytest
from jax.experimental import topologies

from common.errors import UserError
from compilation import findings, report, steps, targets
from training import command_line, config, sharding

pytestmark = pytest.mark.aot

# The smallest of each: a mixer, a primitive that it uses, and the form of it that accelerators get.
TPU = {
    "attention": ("attention", "splash"),
    "retnet": ("linear_attention", "pallas"),
    "gla": ("linear_attention", "pallas"),
    "delta_net": ("delta_rule", "pallas"),
    "s5": ("linear_recurrence", "pallas"),
    "mamba": ("selective_scan", "pallas"),
    "s4d": (None, None),  # a long convolution, which has no forms
}
GPU = {
    "attention": ("attention", "library"),
    "rwkv7": ("delta_rule", "chunked"),
    "s5": ("linear_recurrence", "blocked"),
}


def compiled(name: str, devices: str, *more: str) -> findings.Findings:
    if reason := targets.missing(devices.partition(":")[0]):
        pytest.skip(reason)
    keys = (
        "model.depth=1",
        "model.remat=elementwise",
        "task.length=128",
        "optimizer.name=adamw",
        "train.compute_dtype=bfloat16",
    )
    if name in ("mamba", "s5", "s4d"):  # which take two blocks for one
        keys = keys[1:]
    keys = [f"--config.{key}" for key in (*keys, "mesh.fsdp=2", *(more or ("mesh.data=2",)))]
    chosen = config.resolve(command_line.parse([f"--config=configs/lm.py:mixer={name}", *keys]), with_data=False)
    target = targets.find(devices)
    return findings.compile_step(steps.train(chosen, target), target)


def check(found: findings.Findings, primitive: str | None, form: str | None) -> None:
    """What holds for every step, on every device."""
    assert "reference" in found.forms["project"]  # on a CPU all are separated, here those of the head
    assert primitive is None or found.forms[primitive] == [form]
    assert found.memory.fits and found.memory.peak > sum(found.memory.held.values())
    assert not found.loops, "a loop over tokens"
    reduced = {axis for t in found.traffic if t.kind in ("all-reduce", "reduce-scatter") for axis in t.axes.split(",")}
    assert {"data", "fsdp"} <= reduced  # gradients are summed over all rows
    assert any(p.operands == "bf16" for p in found.products)
    assert not found.gathered, "rows are sent to devices that have others"
    assert "compiled in" in report.page(found)


@pytest.mark.parametrize("name", TPU)
def test_tpu(name):
    found = compiled(name, "v5e:2x2")
    assert found.device == "TPU v5 lite" and found.devices == 4
    check(found, *TPU[name])
    if name == "attention":
        assert sum("splash" in kernel.name for kernel in found.kernels) == 3  # forward, and both of the backward pass


@pytest.mark.parametrize("name", ["gla", "mamba2", "mamba3", "kimi_delta_attention", "delta_product"])
def test_sums_over_tensor(name):
    """A mixer with maps that `tensor` splits and others that it does not: one sum of the stream's size forward, one backward.

    The embedding has another, and so has the head. What is small beside the stream counts as less than one, and parameters that
    are gathered for less than two.
    """
    found = compiled(name, "v5e:2x2", "mesh.tensor=2", "model.width=512", "model.channel_mixer=none")
    stream = 2 * (found.rows // 2) * found.length * 512
    sent = lambda kind: sum(t.bytes for t in found.traffic if t.kind == kind and t.axes == "tensor")
    assert 4 * stream <= sent("all-reduce") < 5.2 * stream
    assert sent("all-gather") < 2 * stream


@pytest.mark.parametrize("name", GPU)
def test_gpu(name):
    found = compiled(name, "h100:4")
    assert "H100" in found.device and found.devices == 4
    check(found, *GPU[name])
    if name == "attention":
        assert any("cudnn" in kernel.name for kernel in found.kernels)


def test_meshes_of_a_torus():
    """Sizes that are no products of the torus' are a mesh, too; chips of several slices are none."""
    if reason := targets.missing("v5p"):
        pytest.skip(reason)
    devices = targets.find("v5p:4x4x4").devices
    mesh = sharding.make_mesh({"data": 2, "fsdp": 16, "tensor": 2}, devices)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    two = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2).devices
    with pytest.raises(UserError, match="of 2 TPU slices"):
        sharding.make_mesh({"data": -1}, two)


def test_topologies_that_libtpu_does_not_have():
    if reason := targets.missing("v5e"):
        pytest.skip(reason)
    with pytest.raises(UserError, match="libtpu has no such topology"):
        targets.find("v5e:3x7")
