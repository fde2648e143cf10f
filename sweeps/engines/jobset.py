"""Kubernetes (GKE): writes a JobSet for each cell, to be given to `kubectl apply`."""

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.console import say
from common.errors import UserError
from common.files import write_atomically
from sweeps import cells
from sweeps.engine import Engine, Seen, passed_environment

FILE = "jobset.yaml"
OPTIONS = {
    "image": "of the containers, which holds this code and what it needs",
    "code": "where it is in the image, /mixology by default",
    "python": "of the image, python by default",
    "mount": "a folder of this machine, which the pods have at the same path; the sweep's directory is in it",
    "bucket": "of Cloud Storage that is this folder (the driver for Cloud Storage FUSE mounts it in the pods)",
    "claim": "a persistent volume claim that is this folder, in place of a bucket",
    "queue": "of Kueue, which then admits the JobSets",
    "topology": "of the TPU slice, such as 4x4",
    "namespace": "of Kubernetes",
    "account": "the service account of the pods",
    "cpu": "of each host, as Kubernetes writes it",
    "memory": "of each host, as Kubernetes writes it",
}
GRACE = 120  # seconds to save in
PORT = 8476


class JobSet(Engine):
    """Writes a JobSet for each cell that has something left to do, into one file in the sweep's directory.

    Cells that are stopped (exit status 75), preempted or lose their node are restarted as a whole, `--retries` times; one that
    ends with 1 has failed, and is not. A cell's directory says how far it is: nothing is asked of Kubernetes. To apply the file
    again starts nothing twice, since a cell keeps its name.
    """

    waits = False
    known_options = OPTIONS

    def check(self) -> None:
        for key in ("image", "mount"):
            if key not in self.options:
                raise UserError(f"--engine=jobset needs --option {key}=...: {OPTIONS[key]}")
        if ("bucket" in self.options) == ("claim" in self.options):
            raise UserError("--engine=jobset needs either --option bucket=NAME or claim=NAME, which the pods mount")
        if not self.workdir.is_relative_to(self.options["mount"]):
            raise UserError(
                f"--workdir={self.workdir} is not in mount={self.options['mount']}, which is all that the pods see"
            )
        if self.workers is not None:
            raise UserError("--engine=jobset knows no --workers: a Kueue queue says how many run at the same time")

    def submit(self, given: Sequence[Path], retries: int) -> list[str]:
        made = [self.jobset(cell, retries) for cell in given]
        path = self.workdir / FILE
        text = "".join("---\n" + yaml.safe_dump(one, sort_keys=False, width=120) for one in made)
        write_atomically(path, f"# Written by sweep.py. kubectl apply -f {path}\n{text}")
        say(
            f"kubectl apply -f {path}\nstarts {len(made)} cells; those that are at work already stay as they are. What has given "
            f"up is started anew after kubectl delete -f {path}"
        )
        return [one["metadata"]["name"] for one in made]

    def states(self, given: Mapping[str, Path]) -> dict[str, Seen]:
        return dict.fromkeys(given, Seen("unknown"))

    def cancel(self, given: Mapping[str, Path]) -> None:
        raise UserError(f"this engine asks nothing of Kubernetes: kubectl delete -f {self.workdir / FILE}")

    def command(self, cell: Path) -> list[str]:
        return [
            self.options.get("python", "python"),
            f"{self.options.get('code', '/mixology')}/sweep.py",
            f"--cell={cell}",
        ]

    def jobset(self, cell: Path, retries: int) -> dict[str, Any]:
        """The JobSet of a cell.

        Raises:
          UserError: if the pods would not find the directory that its relative paths begin in.
        """
        cwd = cells.load(cell).cwd
        if cwd is not None and not Path(cwd).is_relative_to(self.options["mount"]):
            raise UserError(
                f"{cwd} is not in the pods: start the sweep in the project's own directory, or in a folder of mount"
            )
        name = _name(cell)
        metadata: dict[str, Any] = {"name": name}
        if "namespace" in self.options:
            metadata["namespace"] = self.options["namespace"]
        if "queue" in self.options:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": self.options["queue"]}
        if "topology" in self.options:  # all hosts of a cell in one slice, which is one node pool
            metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        spec: dict[str, Any] = {
            # A Job fails by its pod failure policy where a cell has failed; for all else it is restarted.
            "failurePolicy": {
                "maxRestarts": retries,
                "rules": [{"name": "failed", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "cell", "replicas": 1, "template": {"spec": self._job(name, cell)}}],
        }
        return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}

    def _job(self, name: str, cell: Path) -> dict[str, Any]:
        hosts = self.resources.hosts
        made: dict[str, Any] = {
            "parallelism": hosts,
            "completions": hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,
        }
        if self.resources.minutes is not None:
            made["activeDeadlineSeconds"] = 60 * self.resources.minutes
        made["podFailurePolicy"] = {
            "rules": [
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"containerName": "cell", "operator": "In", "values": [1]}},
            ]
        }
        template: dict[str, Any] = {"spec": self._pod(name, cell)}
        if "bucket" in self.options:
            template = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, **template}
        return {**made, "template": template}

    def _pod(self, name: str, cell: Path) -> dict[str, Any]:
        kind, count = self.resources.kind, self.resources.count
        tpu = kind.startswith("tpu")
        needs = {key: self.options[key] for key in ("cpu", "memory") if key in self.options}
        if count:
            needs["google.com/tpu" if tpu else "nvidia.com/gpu"] = int(count)
        environment = [{"name": key, "value": value} for key, value in sorted(passed_environment().items())]
        if self.resources.hosts > 1 and not tpu:  # the hosts of a TPU slice are found by JAX itself
            index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
            environment += [
                {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-cell-0-0.{name}:{PORT}"},
                {"name": "JAX_NUM_PROCESSES", "value": f"{self.resources.hosts}"},
                {"name": "JAX_PROCESS_ID", "valueFrom": index},
            ]
        if "bucket" in self.options:
            driver = {
                "driver": "gcsfuse.csi.storage.gke.io",
                "volumeAttributes": {"bucketName": self.options["bucket"]},
            }
            volume: dict[str, Any] = {"name": "sweep", "csi": driver}
        else:
            volume = {"name": "sweep", "persistentVolumeClaim": {"claimName": self.options["claim"]}}
        container: dict[str, Any] = {"name": "cell", "image": self.options["image"], "command": self.command(cell)}
        if environment:
            container["env"] = environment
        if needs:
            container["resources"] = {"requests": needs, "limits": dict(needs)}
        container["volumeMounts"] = [{"name": "sweep", "mountPath": self.options["mount"]}]
        selector = {}
        if kind:
            selector["cloud.google.com/" + ("gke-tpu-accelerator" if tpu else "gke-accelerator")] = kind
        if "topology" in self.options:
            selector["cloud.google.com/gke-tpu-topology"] = self.options["topology"]
        pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE}
        if "account" in self.options:
            pod["serviceAccountName"] = self.options["account"]
        if selector:
            pod["nodeSelector"] = selector
        return {**pod, "containers": [container], "volumes": [volume]}


def _name(cell: Path) -> str:
    """The name of a cell's JobSet, the same each time: names of its pods, which are longer, have at most 63 characters."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{cell.parent.name}-{cell.name}".lower())[:36].strip("-")
    return f"{words if words[:1].isalpha() else f's-{words}'}-{zlib.crc32(str(cell).encode()):08x}"
