"""SLURM: arrays of `sbatch`, one element for each cell, with `srun` on each of its hosts."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.command import STOPPED
from common.console import say
from common.errors import UserError
from sweeps.cells import LOG
from sweeps.engine import Engine, Seen

LARGEST = 1000  # elements of an array: SLURM's own default limit is 1001
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


class Slurm(Engine):
    """Cells as elements of job arrays, which depend on nothing, on a cluster whose nodes see the sweep's directory.

    SLURM requeues what it preempts, and what loses its node. What stops by itself (before its time is over, say) requeues
    itself. Any option of `sbatch` is an option of the engine: partition, account, mem, cpus-per-task, ...; one without a value
    ends with =.
    """

    def submit(self, cells: Sequence[Path], retries: int) -> list[str]:
        names = []
        for begin in range(0, len(cells), LARGEST):
            some = cells[begin : begin + LARGEST]
            said = _ask(["sbatch", "--parsable", *self.arguments(len(some))], self.script(some, retries))
            job = said.strip().split(";")[0]  # the name of a cluster may follow
            names += [f"{job}_{i}" for i in range(len(some))]
        return names

    def arguments(self, count: int) -> list[str]:
        """The options of `sbatch` for so many cells."""
        at_once = "" if self.workers is None else f"%{self.workers}"
        options = {
            "job-name": self.workdir.name,
            "array": f"0-{count - 1}{at_once}",
            "nodes": f"{self.resources.hosts}",
            "ntasks-per-node": "1",
            "requeue": "",
            "open-mode": "append",
            "output": "/dev/null",  # the script prints into the cell's log
        }
        if self.resources.accelerators is not None:
            options["gpus-per-node"] = self.resources.accelerators
        if self.resources.minutes is not None:
            notice = min(120, 15 * self.resources.minutes)  # seconds to save in
            options |= {"time": f"{self.resources.minutes}", "signal": f"TERM@{notice}"}
        options |= self.options
        return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]

    def script(self, cells: Sequence[Path], retries: int) -> str:
        """What an element of the array runs."""
        log = "" if self.resources.hosts == 1 else " --label"
        command = shlex.join(self.command(Path("CELL"))).replace("--cell=CELL", '--cell="$cell"')
        return "\n".join(
            [
                "#!/bin/bash",
                f"cells=({shlex.join(map(str, cells))})",
                'cell="${cells[$SLURM_ARRAY_TASK_ID]}"',
                f'exec >>"$cell/{LOG}" 2>&1 </dev/null',
                '[ -n "$SLURM_CPUS_PER_TASK" ] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
                # The first process finds the floors when the others have ended, for which some clusters give it seconds.
                f"srun --ntasks={self.resources.hosts} --kill-on-bad-exit=1 --wait=0{log} {command}",
                "code=$?",
                'echo "$code" >"$cell/job/exit_code"',
                f'if [ "$code" = {STOPPED} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {retries} ]; then',
                '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" && sleep 60',
                "fi",
                'exit "$code"',
                "",
            ]
        )

    def states(self, given: Mapping[str, Path]) -> dict[str, Seen]:
        if not given:
            return {}
        try:
            # Without accounting SLURM forgets a job some minutes after its end: then the directory alone says how it was.
            said = _ask(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%F_%K %T"])
        except UserError as error:  # its controller may be busy, or restarted
            say(f"{error}; asking again")
            return dict.fromkeys(given, Seen("running"))
        known = dict(line.split()[:2] for line in said.splitlines() if len(line.split()) > 1)
        return {name: _seen(known.get(name)) for name in given}

    def cancel(self, given: Mapping[str, Path]) -> None:
        if given:
            _ask(["scancel", *given])


def _seen(state: str | None) -> Seen:
    if state is None:
        return Seen("ended", "SLURM knows the job no more")
    if state in WAITING:
        return Seen("queued")
    if state in AT_WORK:
        return Seen("running")
    return Seen("cancelled" if state == "CANCELLED" else "ended", f"SLURM says {state}")


def _ask(command: Sequence[str], text: str | None = None) -> str:
    """What a command of SLURM's prints."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"--engine=slurm needs {command[0]}, which is not here: run it where jobs are submitted"
        ) from None
    if done.returncode:
        raise UserError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
