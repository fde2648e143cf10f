"""A SLURM cluster of one node on this machine, from Debian's packages, for the tests.

    apt-get install munge slurmctld slurmd slurm-client     # SLURM 22.05 or newer
    python -m tests.sweeps.slurm_cluster            # starts one, prints what to export, and stops it on Ctrl-C

All its files are in one folder, its daemons are its own, and it takes over nothing that is installed. It has two partitions:
jobs of `urgent` preempt those of `normal`, which are requeued. It must be run as root, as SLURM's daemons are.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=1000000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=120
MinJobAge=600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=60 State=UP
"""


def missing() -> list[str]:
    """What is not here of what a cluster needs."""
    found = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return found if os.getuid() == 0 else [*found, "root"]


@contextlib.contextmanager
def cluster():
    """A cluster that runs. Yields the environment by which SLURM's commands find it."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.socket()) for _ in range(2)]
        for port in ports:
            port.bind(("127.0.0.1", 0))
        names = dict(zip(("controller", "daemon"), (port.getsockname()[1] for port in ports)))
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, **names))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", "--num-threads=1", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host, "-d", _stepd()],
    ]
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as output:
                options = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
                daemons.append(subprocess.Popen(command, env=environment, start_new_session=True, **options))
            if command[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), folder)
        _until(lambda: "idle" in _ask(["sinfo", "-h", "-o", "%t"], environment), folder)
        yield environment
    finally:
        _ask(["scancel", "--state=RUNNING", "--signal=KILL", "--full", "--user=root"], environment)
        _ask(["scancel", "--user=root"], environment)
        with contextlib.suppress(TimeoutError):
            _until(lambda: not _ask(["squeue", "-h"], environment).strip(), folder, 10)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _stepd() -> str:
    """The program of a job's step: where there are no system units, Debian's slurmd looks for it in vain."""
    found = shutil.which("slurmstepd-wlm", path=PATH) or shutil.which("slurmstepd", path=PATH)
    return found or "/usr/sbin/slurmstepd-wlm"


def _ask(command, environment) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _until(condition, folder, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.out")))
            raise TimeoutError(f"the cluster does not come up:\n{logs}")
        time.sleep(0.2)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # either wakes what pauses below
    with cluster() as environment:
        print(f"export SLURM_CONF={environment['SLURM_CONF']}; Ctrl-C stops the cluster", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
