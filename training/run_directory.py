"""The directory of a run: what was asked for, on what it ran, and where everything else is.

`config.json` is the resolved configuration. `environment.json` is a list with one entry for every launch: the command,
versions, devices, the state of the code. Only process 0 writes.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from common.errors import UserError
from common.files import write_atomically

# Keys (with all below them) that a run may be resumed with other values of. Of these, `steps` (through the schedule),
# `implementation` and `mesh` (through rounding) change the numbers that follow; every change is recorded.
RESUMABLE = (
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
)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy")


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


def open_run(
    workdir: str | Path, config: Mapping[str, Any], *, environment_extra: Mapping[str, Any] | None = None
) -> RunDirectory:
    """Makes a run directory, or checks that the one that is there belongs to this configuration.

    To be called by all processes. No file is changed where an error is raised.

    Args:
      workdir: made if it does not exist.
      config: the resolved configuration, as JSON holds it.
      environment_extra: what this launch's entry in `environment.json` should say besides, such as the fingerprint of
        the data.

    Raises:
      RunDirectoryError: if the directory cannot be written, or holds a run with another configuration (but for the keys
        in `RESUMABLE`; a change of these is printed, recorded in `environment.json` and takes over in `config.json`).
    """
    run = RunDirectory(Path(workdir).absolute())
    if jax.process_index() == 0:
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run.root).close()
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write to {run.root} ({error.strerror}): choose another --workdir or make it writable"
            ) from error
        config = json.loads(json.dumps(config))  # as it is read back: lists for tuples
        changes = _changes(run, config)
        launches = _read(run.environment) if run.environment.exists() else []
        launches.append(environment() | {"config_changes": changes} | dict(environment_extra or {}))
        write_atomically(run.environment, json.dumps(launches, indent=2))
        write_atomically(run.config, json.dumps(config, indent=2))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run directory")
    return run


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The configuration of the run in a directory. Raises RunDirectoryError if there is none."""
    run = RunDirectory(Path(workdir).absolute())
    if not run.config.is_file():
        raise RunDirectoryError(f"{run.root} is not a run directory: it has no config.json")
    return _read(run.config)


def environment() -> dict[str, Any]:
    """What this process runs on: command, versions, devices, and the commit of the code if it is a git checkout."""
    device = jax.devices()[0]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": _git(Path(__file__).parent.parent),
    }


def _changes(run: RunDirectory, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The resumable keys that differ from the run's config, with both values; raises for other keys."""
    if not run.config.exists():
        if run.checkpoints.exists():
            raise RunDirectoryError(
                f"{run.root} has checkpoints but no config.json: give it back or use a new --workdir"
            )
        return {}
    old, new = _flatten(_read(run.config)), _flatten(config)
    differing = [key for key in sorted({*old, *new}) if old.get(key, "absent") != new.get(key, "absent")]
    changes = {key: {"from": old.get(key, "absent"), "to": new.get(key, "absent")} for key in differing}
    text = {key: f"{key}: {change['from']!r} -> {change['to']!r}" for key, change in changes.items()}
    fixed = [key for key in differing if not any(f"{key}.".startswith(f"{name}.") for name in RESUMABLE)]
    if fixed:
        raise RunDirectoryError(
            f"{run.root} holds a run with another configuration ({'; '.join(text[key] for key in fixed)}): "
            "use a new --workdir, or the configuration of that run"
        )
    if changes:
        print(f"resuming {run.root} with {'; '.join(text.values())}", flush=True)
    return changes


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; lists and empty sections count as values."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read as JSON: {error}") from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(directory: Path) -> dict[str, Any] | None:
    """The commit and whether files differ from it; None outside of a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
