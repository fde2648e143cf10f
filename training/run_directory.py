"""The directory of a run: what was asked for, on what it ran, and where everything else is.

`config.json` is the resolved configuration. `environment.json` is a list with one entry for every launch: the command,
versions, devices, the state of the code. Only process 0 writes.
"""

import contextlib
import dataclasses
import json
import platform
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from common import hosts, remote, roll_call
from common.errors import UserError
from common.files import write_atomically
from common.lock import locked
from training.config import SECTIONS, Config, complete, flatten
from training.optimizer import schedule

# Keys (with all below them) that a run may be resumed with other values of. Of these, `steps` (through the schedule),
# `implementation` and `mesh` (through rounding) change the numbers that follow; every change is recorded. Where the data lies may
# change, too: whether it is the same data is asked of its fingerprint.
WHERE = ("task.corpus", "task.data_dir", "task.file", "task.cache_dir", "task.download")
RESUMABLE = (
    *WHERE,
    "expect",
    "mesh",
    "train.steps",
    "train.implementation",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep",
    "train.profile_step",
    "train.watchdog_minutes",
    "train.data_workers",
)


class RunDirectoryError(UserError):
    """The run directory cannot be used; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def profile(self) -> Path:
        return self.root / "profile"


def locate(workdir: str | Path, option: str = "--workdir") -> Path:
    """The absolute path of a directory that a user has named, `~` expanded, or the address of one on an object store.

    Raises:
      RunDirectoryError: for an empty name.
      UserError: for an address of a store that is not known, or whose package is not installed.
    """
    if not str(workdir).strip():
        raise RunDirectoryError(f"{option} is empty: give a directory")
    if re.match(r"\w+:/[^/]", str(workdir)):
        raise RunDirectoryError(f"{option}={workdir} is like an address, which has two strokes: gs://BUCKET/FOLDER")
    try:
        return remote.at(workdir)
    except UserError as error:
        raise RunDirectoryError(f"{option}: {error}") from None
    except RuntimeError as error:  # ~nobody
        raise RunDirectoryError(f"{option}={workdir}: {error}") from None


@contextlib.contextmanager
def open_run(
    config: Config,
    workdir: str | Path,
    *,
    allow_other_data: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Iterator[RunDirectory]:
    """Makes a run directory, or checks that the one that is there belongs to this configuration, and holds its lock.

    To be called by all processes. No file but the lock is changed where an error is raised.

    Args:
      config: the resolved configuration.
      workdir: made if it does not exist.
      allow_other_data: go on with a run whose data was other than it is now; `environment.json` records it.
      notes: what else `environment.json` is to record of this launch.

    Raises:
      RunDirectoryError: if the directory cannot be written; if it holds a run with another configuration (but for the keys
        in `RESUMABLE`; a change of these is printed, recorded in `environment.json` and takes over in `config.json`), one that is
        past the last step that is asked for, or one of other data.
      UserError: if another process is at work in it; of several processes of one run, if they differ in their configuration or
        data, or do not share the directory.
    """
    run, fingerprint = RunDirectory(locate(workdir)), config.task.fingerprint()
    if remote.scheme(run.root) == "s3" and jax.process_count() > 1:
        raise RunDirectoryError(
            f"--workdir={workdir}: several processes write no checkpoint together to s3://; give one on gs:// or on a disk that "
            "all see"
        )
    hosts.agree("configuration and data", described(config, fingerprint), {"task": config.task.name})
    if jax.process_index() != 0:
        hosts.share(run.root)
        _wait()
        yield run
        return
    _make(run)
    hosts.share(run.root)
    with locked(run.root, "run"):
        changes = _changes(run, config)
        tokenizer = getattr(config.task.tokenizer, "fingerprint", None)
        other = check_data(run.root, fingerprint, allow_other_data, tokenizer)
        _tell(run, config, changes)
        launches = recorded_launches(run.root)
        launch = environment() | {"config_changes": changes, "fingerprint": fingerprint, **(notes or {})}
        launch |= {} if tokenizer is None else {"tokenizer": tokenizer}
        if other is not None:
            launch["fingerprint_before"] = other
        with writing(run.root):
            write_atomically(run.environment, json.dumps([*launches, launch], indent=2))
            write_atomically(run.config, json.dumps(config.raw, indent=2))
        if jax.process_count() > 1:
            _wait()
        yield run


def described(config: Config, fingerprint: str) -> dict[str, str]:
    """What all processes of a run must have in common. Where its data lies may differ from host to host."""
    keys = {key: value for key, value in flatten(config.raw).items() if not key.startswith(WHERE)}
    return {"data (fingerprint)": fingerprint[:12]} | {f"config.{key}": str(value) for key, value in keys.items()}


def _make(run: RunDirectory) -> None:
    # Orbax takes the path for a pattern of names, and writes checkpoints there that it cannot read again; or for an address.
    name = str(run.root) if not remote.is_address(run.root) else str(run.root).partition("://")[2]
    if found := re.search(r"\[[^/]+\]|\\|[\udc80-\udcff]|\b(gs|s3):/", name):
        raise RunDirectoryError(
            f"{run.root}: there can be no checkpoints in a directory with {found[0]!r} in its path: choose another --workdir"
        )
    for folder in (run.root, *run.root.parents):
        if folder.name == "checkpoints" and (folder.parent / "config.json").exists():
            raise RunDirectoryError(
                f"{run.root} lies in the checkpoints of the run {folder.parent}, which deletes old ones: to go on with it give "
                "--workdir its own directory; to start from one of its checkpoints give that as --init_from"
            )
    try:
        if remote.is_address(run.root):
            with remote.spoken(run.root):
                mark = run.root / f".written-{uuid.uuid4().hex}"
                mark.write_bytes(b"")
                mark.unlink()
            return
        run.root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run.root).close()
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write to {run.root} ({error.strerror or error}): choose another --workdir or make it writable"
        ) from error


def _wait() -> None:
    if hosts.joined():
        return hosts.wait("run directory")
    multihost_utils.sync_global_devices("run directory")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system (a full disk, say) into a RunDirectoryError."""
    try:
        with remote.spoken(path):
            yield
    except OSError as error:
        raise RunDirectoryError(f"cannot write to {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an error of an object store (it cannot be reached, or lets nobody in) into a RunDirectoryError."""
    try:
        with remote.spoken(path):
            yield
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror or error}") from error


def recorded_data(workdir: str | Path, what: str = "fingerprint") -> str | None:
    """The fingerprint of the data of a run's last launch, or of its "tokenizer"; None if there is no record of it, as in runs of
    older code (whose fingerprints under "data" were made in another way), and of bytes.

    Raises:
      RunDirectoryError: if the record is damaged.
    """
    recorded = [launch[what] for launch in recorded_launches(workdir) if what in launch]
    return recorded[-1] if recorded else None


def recorded_launches(workdir: str | Path) -> list[dict[str, Any]]:
    """What `environment.json` holds; nothing before the first launch. Raises a RunDirectoryError if it is damaged."""
    path = RunDirectory(remote.at(workdir)).environment
    launches = read(path) if path.exists() else []
    if not isinstance(launches, list) or not all(isinstance(launch, dict) for launch in launches):
        raise RunDirectoryError(
            f"{path} is damaged: it is no list of launches, which say what data the run was trained on; give it back, or "
            "delete it and do without"
        )
    return launches


def check_data(workdir: Path, fingerprint: str, allow_other: bool, tokenizer: str | None = None) -> str | None:
    """Compares the data of a run with what is here.

    Args:
      workdir: of the run.
      fingerprint: of the data that is here.
      allow_other: whether other data is said instead of refused.
      tokenizer: the fingerprint of the one that is here, which that of token ids without their text knows nothing of.

    Returns:
      the fingerprint of the run's own data where it is another one.

    Raises:
      RunDirectoryError: if it is another one, or only its tokenizer is.
    """
    own, trained = recorded_data(workdir), recorded_data(workdir, "tokenizer")
    if own is None and saved_steps(RunDirectory(workdir).checkpoints):
        print(f"{workdir} has no record of its data: whether it is what is here now cannot be told", flush=True)
    if own == fingerprint and None not in (trained, tokenizer) and trained != tokenizer:
        what = f"the tokenizer of {workdir} (fingerprint {trained[:12]}) is not the one that is here now ({tokenizer[:12]})"
        if not allow_other:
            raise RunDirectoryError(
                f"{what}: the file that task.tokenizer names was replaced, or another version of the package `tokenizers` reads "
                "it. Give back the tokenizer of the run, use a new --workdir, or go on knowingly with --allow_other_data"
            )
        print(f"{what}; going on with it", flush=True)
    if own is None or own == fingerprint:
        return None
    what = f"the data of {workdir} (fingerprint {own[:12]}) is not the data that is here now ({fingerprint[:12]})"
    if not allow_other:
        raise RunDirectoryError(
            f"{what}: a text was changed or cut, a tokeniser retrained, or another Python or program makes the rows. Give back "
            "the data of the run, use a new --workdir, or go on knowingly with --allow_other_data"
        )
    print(f"{what}; going on with it", flush=True)
    return own


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The configuration of the run in a directory. Raises RunDirectoryError if there is none, or it is damaged."""
    run = RunDirectory(locate(workdir))
    with reading(run.root):
        if not run.config.is_file():
            raise RunDirectoryError(f"{run.root} is not a run directory: it has no config.json")
        raw = read(run.config)
    sections = [name for name in SECTIONS if name != "seed"]
    missing = [name for name in sections if not isinstance(raw, dict) or not isinstance(raw.get(name), Mapping)]
    if missing and isinstance(raw, dict) and ("model_type" in raw or "architectures" in raw):
        raise RunDirectoryError(
            f"{run.root} is no run but a checkpoint in Hugging Face's format: train.py takes it as --init_from=hf:{run.root}, "
            f"and eval.py as --hf={run.root}"
        )
    if missing:
        raise RunDirectoryError(
            f"{run.config} is damaged: it has no section {' and no section '.join(missing)}; give back the one that the run was "
            "made with"
        )
    return raw


def environment() -> dict[str, Any]:
    """What this process runs on: command, versions, devices, and the commit of the code if it is a git checkout."""
    device = jax.devices()[0]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: roll_call.version(name) for name in roll_call.PACKAGES},
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": _git(Path(__file__).parent.parent),
    }


def _changes(run: RunDirectory, config: Config) -> dict[str, dict[str, Any]]:
    """The resumable keys that differ from the run's config, with both values; raises for other keys."""
    if run.checkpoints.exists() and not run.checkpoints.is_dir():
        raise RunDirectoryError(f"{run.checkpoints} is no directory: move it away, or use a new --workdir")
    if not run.config.exists():
        for path in (run.checkpoints, run.metrics):
            if path.exists():
                raise RunDirectoryError(
                    f"{run.root} has {path.name} but no config.json: give it back or use a new --workdir"
                )
        return {}
    old, new = flatten(complete(read_config(run.root), config.raw)), flatten(config.raw)
    differing = [key for key in sorted({*old, *new}) if old.get(key, "absent") != new.get(key, "absent")]
    changes = {key: {"from": old.get(key, "absent"), "to": new.get(key, "absent")} for key in differing}
    fixed = {k: v for k, v in changes.items() if not any(f"{k}.".startswith(f"{name}.") for name in RESUMABLE)}
    if fixed:
        raise RunDirectoryError(
            f"{run.root} holds a run with another configuration ({'; '.join(_described(fixed))}): "
            "use a new --workdir, or the configuration of that run"
        )
    done, steps = _newest(run), config.train.steps
    if done > steps:
        raise RunDirectoryError(
            f"{run.root} has step {done} already, and train.steps={steps} asks for fewer: use a new --workdir, or more steps"
        )
    return changes


def _described(changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"{key}: {change['from']!r} -> {change['to']!r}" for key, change in changes.items()]


def _tell(run: RunDirectory, config: Config, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what a run goes on with that it had not before."""
    if changes:
        print(f"resuming {run.root} with {'; '.join(_described(changes))}", flush=True)
    done = _newest(run)
    if "train.steps" in changes and done:
        before, after = (
            float(schedule(config.optimizer, total)(min(done, total - 1)))
            for total in (changes["train.steps"]["from"], config.train.steps)
        )
        if after > before * 1.001:
            print(
                f"the learning rate goes back up at step {done}, from {before:.3g} to {after:.3g}: the schedule is now that of "
                f"{config.train.steps} steps",
                flush=True,
            )


def _newest(run: RunDirectory) -> int:
    """The step of the newest checkpoint; 0 without any."""
    return max(saved_steps(run.checkpoints), default=0)


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a finished checkpoint, in order: on an object store those that say so."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if re.fullmatch("[0-9]+", path.name) and path.is_dir()]
    if remote.is_address(checkpoints):
        found = [path for path in found if (path / remote.COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


def read(path: Path) -> Any:
    """What a JSON file of a run holds. Raises RunDirectoryError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read as JSON: {error}") from error


def _git(directory: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; None outside of a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
