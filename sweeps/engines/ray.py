"""Ray: an actor on each host of a cell, on a cluster that is there."""

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UserError
from sweeps import jobs
from sweeps.cells import LOG
from sweeps.engine import Engine, Seen, passed_environment

OPTIONS = {
    "address": "of the cluster: auto (the default) on one of its machines, HOST:PORT, or ray://HOST:10001",
    "cpus": "cores of each host, 1 by default",
    "slice": "a TPU slice for each cell, VERSION:TOPOLOGY (v5e:4x4)",
}


class Ray(Engine):
    """Cells as detached actors, which go on when the command has ended, on a cluster whose nodes see the sweep's directory.

    A cell over several hosts is a placement group, an actor on each of its nodes. An actor starts the command of a cell, waits,
    and is gone with it; one whose node is lost is lost.
    """

    known_options = OPTIONS

    def check(self) -> None:
        if self.resources.minutes is not None:
            raise UserError("--engine=ray knows no --minutes")
        self._ray = None

    def ray(self):
        """Ray, connected to the cluster."""
        if self._ray is None:
            try:
                import ray
            except ImportError:
                raise UserError("--engine=ray needs Ray: pip install -r requirements-ray.txt") from None
            try:
                ray.init(
                    address=self.options.get("address", "auto"),
                    namespace="mixology",
                    log_to_driver=False,
                    ignore_reinit_error=True,
                    logging_level="ERROR",
                )
            except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
                raise UserError(f"no Ray cluster can be reached ({error}): give --option address=HOST:PORT") from None
            self._ray = ray
        return self._ray

    def submit(self, cells: Sequence[Path], retries: int) -> list[str]:
        return [self._start(cell) for cell in cells]

    def _start(self, cell: Path) -> str:
        ray, name, hosts = self.ray(), f"{cell.name}-{uuid.uuid4().hex[:8]}", self.resources.hosts
        group = self._group(name)
        for index in range(hosts):
            options = {"name": _name(name, index), "lifetime": "detached", "max_restarts": 0, "max_concurrency": 4}
            if group is None:
                options |= self._needs()
            else:
                from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                options |= {"scheduling_strategy": strategy, **self._needs()}
            log = cell / (LOG if index == 0 else f"log.{index}.txt")
            code = jobs.folder(cell) / "exit_code" if index == 0 else None
            ray.remote(_host()).options(**options).remote(
                _name(name, 0), index, hosts, self.command(cell), passed_environment(), str(log), code and str(code)
            )
        return name

    def _needs(self) -> dict:
        """What each host of a cell takes of its node."""
        needs = {"num_cpus": float(self.options.get("cpus", 1))}
        kind, count = self.resources.kind, self.resources.count
        if kind == "TPU":
            needs["resources"] = {"TPU": int(count)}
        elif count:
            needs["num_gpus"] = int(count)
            if kind:
                needs["accelerator_type"] = kind
        return needs

    def _group(self, name: str):
        """The placement group of a cell over several hosts; None for one host."""
        if "slice" in self.options:
            from ray.util.tpu import slice_placement_group

            version, _, topology = self.options["slice"].partition(":")
            return slice_placement_group(topology, version, name=name, lifetime="detached").placement_group
        if self.resources.hosts == 1:
            return None
        from ray.util.placement_group import placement_group

        needs = self._needs()
        bundle = {"CPU": needs["num_cpus"], "GPU": needs.get("num_gpus", 0), **needs.get("resources", {})}
        if "accelerator_type" in needs:
            bundle[f"accelerator_type:{needs['accelerator_type']}"] = 0.001
        bundles = [{key: amount for key, amount in bundle.items() if amount}] * self.resources.hosts
        return placement_group(bundles, strategy="STRICT_SPREAD", name=name, lifetime="detached")

    def states(self, given: Mapping[str, Path]) -> dict[str, Seen]:
        if not given:
            return {}
        self.ray()
        from ray.util import list_named_actors

        there = set(list_named_actors())
        ended = [name for name in given if _name(name, 0) not in there]
        self._release(ended)
        return {name: Seen("ended" if name in ended else "running") for name in given}

    def cancel(self, given: Mapping[str, Path]) -> None:
        for name, cell in given.items():
            try:
                actor = self.ray().get_actor(_name(name, 0))
            except ValueError:
                continue
            if (jobs.folder(cell) / "alive").exists():  # it has begun: it is told, and saves
                actor.stop.remote()
            else:
                self._ray.kill(actor)
                self._release([name])

    def _release(self, names: Sequence[str]) -> None:
        """Gives back the nodes of jobs whose first process is gone: if it could not do so itself, others would wait for them."""
        if self.resources.hosts == 1 and "slice" not in self.options:
            return
        from ray.util.placement_group import get_placement_group, remove_placement_group

        ray = self.ray()
        for name in names:
            for index in range(1, self.resources.hosts):  # one that waits for its node would stay when the group goes
                with contextlib.suppress(ValueError):  # it has gone
                    ray.kill(ray.get_actor(_name(name, index)))
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(name))


def _name(job: str, index: int) -> str:
    """The name of a host's actor."""
    return job if index == 0 else f"{job}.{index}"


def _host() -> type:
    """The class of the actors. It is made here, so that it goes to the cluster whole, and nothing of ours is imported there."""

    class Host:
        """Runs one process of a cell, and ends with it; the first of several takes the others along."""

        def __init__(self, first, index, hosts, command, environment, log, code):
            import socket
            import threading

            self.process = None
            with socket.socket() as free:
                free.bind(("", 0))
                self.port = free.getsockname()[1]
            arguments = (first, index, hosts, command, environment, log, code)
            threading.Thread(target=self.whole, args=arguments, daemon=True).start()

        def address(self):
            """Where the processes of a cell meet."""
            import ray

            return f"{ray.util.get_node_ip_address()}:{self.port}"

        def stop(self):
            """Tells the process to save and stop."""
            if self.process is not None:
                self.process.terminate()

        def whole(self, *arguments):
            """Runs the process, and ends with it; or where it cannot be run: this node does not see the directory of the cell."""
            import traceback

            try:
                self.run(*arguments)
            except BaseException:
                traceback.print_exc()  # into Ray's own log
            finally:
                os._exit(0)

        def run(self, first, index, hosts, command, environment, log, code):
            import subprocess
            import time

            import ray

            environment = os.environ | environment
            if hosts > 1:
                while True:
                    try:
                        address = ray.get(ray.get_actor(first).address.remote()) if index else self.address()
                        break
                    except ValueError:  # the first one is not there yet
                        time.sleep(0.5)
                found = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": hosts, "PROCESS_ID": index}
                environment |= {f"JAX_{key}": str(value) for key, value in found.items()}

            def bound():
                """The process gets SIGTERM when its node's worker dies: it saves if it can."""
                import ctypes
                import signal

                ctypes.CDLL(None).prctl(1, signal.SIGTERM)

            with open(log, "ab") as output:
                self.process = subprocess.Popen(
                    command, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=bound
                )
            ended = self.process.wait()
            if code is not None:
                with open(code, "w") as file:
                    file.write(f"{ended}\n")
            group = ray.util.get_current_placement_group()
            if group is not None and index == 0:
                time.sleep(5)  # the others end by themselves, as a rule
                ray.util.remove_placement_group(group)

    return Host
