"""Sweeps on Ray: on a real cluster of two nodes on this machine, which the tests start and stop (make ray)."""

import threading
import time

import numpy as np
import pytest

import sweep as entry
from common.errors import UserError
from sweeps import cells, jobs
from sweeps.driver import drive
from sweeps.engine import Resources
from sweeps.engines.ray import Ray
from training.metrics import read_metrics

SETTINGS = {
    "mixer": "min_gru",
    "task.length": "16",
    "model.width": "16",
    "model.depth": "1",
    "train.batch_size": "8",
    "train.log_every": "2",
    "train.eval_every": "0",
    "train.eval_batches": "2",
    "optimizer.warmup_steps": "1",
}


def test_what_it_does_not_have(tmp_path):
    with pytest.raises(UserError, match="no option adress; did you mean 'address'"):
        Ray(tmp_path, options={"adress": "x"})
    with pytest.raises(UserError, match="knows no --minutes"):
        Ray(tmp_path, Resources(minutes=3))


def test_what_a_host_needs(tmp_path):
    assert Ray(tmp_path, Resources(accelerators="4"))._needs() == {"num_cpus": 1, "num_gpus": 4}
    found = Ray(tmp_path, Resources(accelerators="A100:2"), {"cpus": "8"})._needs()
    assert found == {"num_cpus": 8, "num_gpus": 2, "accelerator_type": "A100"}
    assert Ray(tmp_path, Resources(accelerators="TPU:4"))._needs()["resources"] == {"TPU": 4}


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="pip install -r requirements-ray.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("XLA_FLAGS", "")  # one device for each process
        patch.setenv("JAX_PLATFORMS", "cpu")
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80_000_000}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.second = made.add_node(**node)
        made.wait_for_nodes()
        made.node = node
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    (folder / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 3000, dtype=np.uint8)))
    return folder


def planned(place, name, axes, *more):
    settings = [f"corpus=file:{place / 'text.txt'}", *(f"{k}={v}" for k, v in SETTINGS.items())]
    given = ["--config=configs/lm.py", f"--workdir={place / name}", "--over", *axes, *more, "--set", *settings]
    grid = cells.plan(entry.requested(entry.parser().parse_args(given)))
    for cell in grid:
        cell.save()
    return grid


def steps(cell):
    return max((line["step"] for line in read_metrics(cell.workdir)), default=0)


def until(condition, seconds=1200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.2)


@pytest.mark.ray
def test_a_failing_cell_and_a_lost_node(cluster, place):
    """A cell that fails is told; one whose node is lost resumes on the other, on its own."""
    long, bad = planned(place, "grid", ["mesh.data=1,3"], "--set", "train.steps=2500", "train.checkpoint_every=100")
    engine = Ray(place / "grid", options={"address": cluster.address})
    # The first node is kept busy, so that the cell goes to the second one.
    ray = engine.ray()

    @ray.remote(num_cpus=1)
    class Busy:
        pass

    head = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)
    busy = Busy.options(scheduling_strategy=head).remote()
    ray.get(busy.__ray_ready__.remote())

    driven = threading.Event()

    def lose():
        while steps(long) < 150:
            if driven.wait(0.1):
                return
        ray.kill(busy)
        cluster.remove_node(cluster.second, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    found = {outcome.cell.name: outcome for outcome in drive(engine, [long, bad], retries=1)}
    driven.set()
    thread.join()
    assert found[bad.name].status == "failed" and "mesh" in found[bad.name].error
    assert found[long.name].status == "finished", found[long.name].error
    assert [attempt.status for attempt in jobs.attempts(long.workdir)][-1] == "finished"
    assert len(jobs.attempts(long.workdir)) == 2 and len(jobs.attempts(bad.workdir)) == 1
    assert "resuming" in (long.workdir / "log.txt").read_text()
    cluster.second = cluster.add_node(**cluster.node)
    cluster.wait_for_nodes()


@pytest.mark.ray
def test_a_cell_over_two_hosts(cluster, place):
    """A process on each node; the losses are those of one process. The command may leave, and another one collects."""
    (one,) = planned(place, "one", ["seed=0"], "--set", "train.steps=4")
    (two,) = planned(place, "two", ["seed=0"], "--set", "train.steps=4", "--hosts=2")
    options = {"address": cluster.address}
    (outcome,) = drive(Ray(place / "one", options=options), [one])
    assert outcome.status == "finished", outcome.error
    engine = Ray(place / "two", Resources(hosts=2), options)
    assert list(drive(engine, [two], detach=True)) == []
    engine.ray().shutdown()
    (outcome,) = drive(Ray(place / "two", Resources(hosts=2), options), [two])
    assert outcome.status == "finished", outcome.error
    (attempt,) = jobs.attempts(two.workdir)
    assert attempt.devices == 2 and (two.workdir / "log.1.txt").exists()
    losses = [[line["loss"] for line in read_metrics(cell.workdir) if line["split"] == "train"] for cell in (one, two)]
    assert len(losses[0]) == 2 and np.allclose(*losses, rtol=1e-5)


@pytest.mark.ray
def test_what_a_job_leaves(cluster, place):
    """Nothing: neither one whose node does not see its directory, nor one that is stopped while it waits for room, or has lost
    its first process."""
    from ray.util import list_named_actors, placement_group_table

    options = {"address": cluster.address}
    engine = Ray(place / "left", options=options)
    (job,) = engine.submit([place / "left" / "nowhere"], 0)
    given = {job: place / "left" / "nowhere"}
    until(lambda: engine.states(given)[job].state == "ended")

    def groups():
        return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]

    long, wide = planned(place, "left", ["seed=0,1"], "--set", "train.steps=1000000", "--hosts=2")
    two = Ray(place / "left", Resources(hosts=2), options)
    (job,) = two.submit([long.workdir], 0)
    until(lambda: steps(long) > 2)
    (waits,) = two.submit([wide.workdir], 0)
    assert set(groups()) == {job, waits}
    two.cancel({waits: wide.workdir})
    until(lambda: groups() == [job])
    ray = two.ray()
    ray.kill(ray.get_actor(job))
    given = {job: long.workdir}
    until(lambda: two.states(given)[job].state == "ended" and not groups() and not list_named_actors())
