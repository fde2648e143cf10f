"""Checkpoints of a run: written in the background, checked when read, independent of the mesh.

`<directory>/<step>/state` holds the training state and `<directory>/<step>/metadata` a JSON record of what was saved:
the caller's metadata, the score, and the type and checksum of every leaf. A checkpoint counts only if all of it is
there and unchanged. A step that does not is reported and kept aside as `<step>.damaged`; nothing is deleted but
checkpoints that newer intact saves have made superfluous and the leftovers of saves that were interrupted.

On an object store a checkpoint counts that has `commit_success.txt`, which is written last. Orbax writes to gs:// itself, and
not to s3://: there a checkpoint is made in a folder of this machine and copied before the run goes on, by one process.

Orbax is used here and nowhere else.
"""

import contextlib
import itertools
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from common import quiet, remote
from common.console import say
from common.errors import UserError, check_range
from common.files import write_atomically
from training.checksums import checksums, named_leaves
from training.run_directory import saved_steps
from training.state import nest


class CheckpointError(UserError):
    """A checkpoint could not be written, found or read; the message is one sentence for the user."""


class _Damaged(Exception):
    """A checkpoint is incomplete or not what was written; the message says in what."""


# The tree that is to be read, made of the types of the leaves that a checkpoint has, by path.
_Wanted = Callable[[dict[str, str]], Any]


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: Any
    metadata: dict
    step: int


class Checkpoints:
    """The checkpoints of one run.

    All processes of a run call all methods together. No method creates or changes anything on disk except `save` and
    `restore` without a step.

    Args:
      directory: where the checkpoints are or will be; made by the first save.
      keep: how many of the newest checkpoints to keep. With one, damage to it leaves nothing to go back to.
        The one with the best score is always kept as well.
      higher_is_better: which score is the best.

    Raises:
      UserError: if `keep` is not at least 1.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, higher_is_better: bool = False):
        check_range("keep", keep, 1)
        self.directory = remote.at(directory)
        self._copied = remote.scheme(self.directory) == "s3"
        self._keep = keep
        self._sign = -1 if higher_is_better else 1
        self._scores: dict[int, float | None] = {}
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint, in order. Damaged ones are among them until they are read."""
        return saved_steps(self.directory)

    def check_there(self, step: int) -> None:
        """Raises a CheckpointError, with the steps that are there, if a step has no checkpoint."""
        if step not in (steps := self.steps()):
            raise CheckpointError(f"there is no checkpoint {step} in {self.directory}; there are {steps or 'none'}")

    def best_step(self) -> int | None:
        """The step with the best score, the later one of equals; None if no checkpoint has a score."""
        return self._best(self.steps())

    def improves(self, score: float) -> bool:
        """Whether a score is better than those of all checkpoints; one that is not finite is never."""
        best = self._best([*{*self.steps(), *self._scores}])  # the write of one may be under way
        return math.isfinite(score) and (best is None or self._sign * score < self._sign * self._scores[best])

    def save(self, step: int, state: Any, metadata: dict, score: float | None = None) -> None:
        """Starts to write a checkpoint; returns when `state` may be donated or changed.

        The write is finished by `wait`, `close` or the next save. Saving a step again with the same state does no more than to
        add a score where it had none.

        Args:
          step: the number of steps that led to `state`.
          state: a pytree of `jax.Array`s of any dtype, typed random keys included. `restore_params` needs it to be a
            dict with the key "params".
          metadata: what else to keep, as JSON holds it.
          score: what the best checkpoint is chosen by; what is not finite is never best.

        Raises:
          CheckpointError: if the step exists with another state, or this or the previous write failed.
        """
        self.wait()
        record = {
            "step": step,
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "metadata": metadata,
            "leaves": {
                path: {"type": type_, "checksum": checksum}
                for (path, type_), checksum in zip(_types(state).items(), checksums(state).values(), strict=True)
            },
        }
        record = json.loads(json.dumps(record))  # as it will be read: text keys, lists for tuples
        if step in self.steps():
            try:
                known = self._record(step)
                if known["leaves"] == record["leaves"]:
                    if record["score"] is not None and self._score(known) is None:
                        self._rate(step, known | {"score": record["score"]})
                    return
            except _Damaged as damage:
                self._set_aside(step, str(damage))
            else:
                raise CheckpointError(
                    f"checkpoint {step} in {self.directory} holds another state: move it away or use a new workdir"
                )
        self._scores[step] = record["score"]
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            metadata=ocp.args.JsonSave({"record": record, "crc32": _seal(record)}),
        )
        with _writing(self.directory):
            if self._copied:
                return self._copy(step, items)
            if self._manager is None:
                options = ocp.CheckpointManagerOptions(
                    preservation_policy=_NewestAndBest(self._keep, self._best),
                    lightweight_initialize=True,  # what is to be known of old steps is in their records
                    cleanup_tmp_directories=True,
                )
                self._manager = ocp.CheckpointManager(
                    self.directory,
                    options=options,
                    item_handlers={"state": _writer(), "metadata": ocp.JsonCheckpointHandler()},
                )
            self._manager.save(step, args=items, force=True)

    def _rate(self, step: int, record: dict) -> None:
        """Gives a checkpoint that was saved before it was evaluated the record with its score."""
        if jax.process_index() == 0:
            with _writing(self.directory):
                text = json.dumps({"record": record, "crc32": _seal(record)})
                write_atomically(self.directory / str(step) / "metadata" / "metadata", text)
        self._scores[step] = record["score"]

    def _copy(self, step: int, items: ocp.args.Composite) -> None:
        """Makes a checkpoint on this machine, copies it to the object store, and takes away there what is superfluous."""
        handler = ocp.CompositeCheckpointHandler(state=_writer(), metadata=ocp.JsonCheckpointHandler())
        with tempfile.TemporaryDirectory(prefix="mixology-") as folder, ocp.Checkpointer(handler) as writer:
            writer.save(Path(folder, "made"), args=items)
            target = self.directory / str(step)
            target.rmtree(missing_ok=True)  # what a copy that was cut off has left
            remote.upload(Path(folder, "made"), target)
        steps = self.steps()
        kept = _kept(steps, self._keep, self._best)
        for path in [self.directory / str(old) for old in steps if old not in kept]:
            (path / remote.COMMITTED).unlink()
            path.rmtree()

    def wait(self) -> None:
        """Returns when the checkpoint being written, if any, is on disk. Raises CheckpointError if that failed."""
        if self._manager is not None:
            with _writing(self.directory):
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last write and frees the threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Reads a whole state.

        Args:
          abstract_state: the tree that was saved, of `jax.ShapeDtypeStruct`s with the shardings to restore to.
          step: which checkpoint. None is the newest intact one; newer ones that are damaged are then reported, one
            line each, and renamed to `<step>.damaged`, so that the run can save these steps again.

        Raises:
          CheckpointError: if there is no intact checkpoint, or it is of another model.
          ValueError: if a leaf of `abstract_state` has no sharding.
        """
        self.wait()
        if step is not None:
            return self._read_step(step, lambda saved: abstract_state)
        restored, damaged = self._read_newest(lambda saved: abstract_state)
        for bad, reason in damaged.items():
            self._set_aside(bad, f"{reason}; going on from checkpoint {restored.step}")
        return restored

    def restore_params(self, abstract_params: Any, step: int | str = "latest") -> Restored:
        """Reads only `state["params"]`, and changes nothing on disk.

        Args:
          abstract_params: the tree that was saved under "params", as for `restore`.
          step: a step, "best", or "latest", which is the newest checkpoint whose parameters are intact.

        Returns:
          The parameters (as `state`), the metadata and the step.

        Raises:
          CheckpointError, ValueError: as for `restore`; also if no checkpoint has a score to be best by.
        """
        return self._restore_params(lambda saved: {"params": abstract_params}, step)

    def restore_any_params(self, sharding: jax.sharding.Sharding, step: int | str = "latest") -> Restored:
        """Reads `state["params"]`, whatever model they are of, and changes nothing on disk.

        Args:
          sharding: to restore to.
          step: as for `restore_params`.

        Returns:
          As `restore_params`.

        Raises:
          CheckpointError: as for `restore_params`.
        """
        return self._restore_params(lambda saved: _abstract(saved, sharding), step)

    def _restore_params(self, abstract: _Wanted, step: int | str) -> Restored:
        self.wait()
        if step == "latest":
            restored, damaged = self._read_newest(abstract, prefix="params/")
            for bad, reason in damaged.items():
                say(f"checkpoint {bad} is damaged ({reason}); using checkpoint {restored.step}")
        else:
            if step == "best" and (step := self.best_step()) is None:
                raise CheckpointError(f"no checkpoint in {self.directory} has a score to be the best by")
            restored = self._read_step(step, abstract, prefix="params/")
        return restored._replace(state=restored.state["params"])

    def _best(self, steps: Sequence[int]) -> int | None:
        for step in steps:
            if step not in self._scores:
                try:
                    self._scores[step] = self._score(self._record(step))
                except _Damaged as damage:
                    self._scores[step] = None
                    say(f"checkpoint {step} is damaged ({damage}): whether it is the best cannot be told")
        ranked = [step for step in steps if self._scores[step] is not None]
        return min(ranked, key=lambda step: (self._sign * self._scores[step], -step), default=None)

    def _score(self, record: dict) -> float | None:
        if "score" in record:
            return record["score"]
        metric = record["metric"]  # so earlier code called it, and wrote minus the score where a higher one is better
        return None if metric is None else self._sign * metric

    def _record(self, step: int) -> dict:
        """The metadata record of a step."""
        try:
            sealed = ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "metadata")
            record, seal = sealed["record"], sealed["crc32"]
        except (OSError, ValueError, KeyError, TypeError):
            raise _Damaged("no readable metadata: incomplete, or written by another program") from None
        if _seal(record) != seal:
            raise _Damaged("its metadata has changed since it was written")
        return record

    def _read_newest(self, abstract: _Wanted, prefix: str = "") -> tuple[Restored, dict[int, str]]:
        """Reads the newest intact checkpoint; also returns the newer ones and what is wrong with them."""
        damaged = {}
        for step in reversed(self.steps()):
            try:
                return self._read(step, abstract, prefix), damaged
            except _Damaged as damage:
                damaged[step] = str(damage)
        if not damaged:
            raise CheckpointError(f"there are no checkpoints in {self.directory}")
        found = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
        raise CheckpointError(f"there is no intact checkpoint in {self.directory} ({found})")

    def _read_step(self, step: int, abstract: _Wanted, prefix: str = "") -> Restored:
        self.check_there(step)
        try:
            return self._read(step, abstract, prefix)
        except _Damaged as damage:
            raise CheckpointError(f"checkpoint {step} in {self.directory} is damaged: {damage}") from damage

    def _read(self, step: int, abstract: _Wanted, prefix: str) -> Restored:
        """Reads and checks one checkpoint, or those of its leaves whose path begins with `prefix`."""
        damage = None
        try:
            record = self._record(step)
            saved = {path: leaf for path, leaf in record["leaves"].items() if path.startswith(prefix)}
            types = {path: leaf["type"] for path, leaf in saved.items()}
            wanted = abstract(types)
            for path, leaf in named_leaves(wanted).items():
                if leaf.sharding is None:
                    raise ValueError(
                        f"abstract leaf {path} has no sharding: give jax.ShapeDtypeStruct(..., sharding=...)"
                    )
            self._check_model(step, types, _types(wanted))
            state = self._read_arrays(step, wanted, partial=bool(prefix))
        except _Damaged as error:
            damage = error
        # Checksums are a joint computation, so a process that cannot read must take the others back with it.
        if not _everywhere(damage is None):
            raise damage or _Damaged("another process cannot read it")
        for path, checksum in checksums(state).items():
            if checksum != saved[path]["checksum"]:
                raise _Damaged(f"the bytes of {path} have changed since it was written")
        return Restored(state, record["metadata"], step)

    def _check_model(self, step: int, saved: dict[str, str], expected: dict[str, str]) -> None:
        paths = [*expected, *(path for path in saved if path not in expected)]
        differing = [path for path in paths if saved.get(path) != expected.get(path)]
        if differing:
            path = differing[0]
            more = f" ({len(differing) - 1} other leaves differ too)" if len(differing) > 1 else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is of another model: {path} is "
                f"{saved.get(path, 'absent')} in the checkpoint and {expected.get(path, 'absent')} in this model{more}"
            )

    def _read_arrays(self, step: int, abstract: Any, partial: bool) -> Any:
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        try:
            source = self.directory / str(step) / "state"
            with quiet.failures(), remote.fetched(source) if self._copied else contextlib.nullcontext(source) as folder:
                # The handler, not a checkpointer: its barriers would hang where only one process meets the damage.
                return ocp.PyTreeCheckpointHandler().restore(folder, args=arguments)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # a full device says nothing about the checkpoint
        except Exception as error:  # orbax raises bare Exceptions for truncated files
            raise _Damaged(f"its arrays cannot be read: {_first_line(error)}") from None

    def _set_aside(self, step: int, reason: str) -> None:
        """Renames a damaged checkpoint, so that it is no longer a step."""
        source = self.directory / str(step)
        if jax.process_index() == 0:
            names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged-{i}" for i in itertools.count(2)))
            target = next(path for path in (self.directory / name for name in names) if not path.exists())
            remote.move(source, target) if remote.is_address(source) else source.rename(target)
            say(f"checkpoint {step} is damaged, kept as {target.name} ({reason})")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._scores.pop(step, None)
        if self._manager is not None:
            self._manager.reload()


def _writer() -> ocp.PyTreeCheckpointHandler:
    """What writes a state, whose leaves are arrays.

    Orbax would cut what several devices hold alike into a slice for each of them, and compile a program for each shape of a
    slice. Where one process writes all of it, that gains nothing.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    )


class _NewestAndBest:
    """Which checkpoints orbax may not delete."""

    def __init__(self, keep: int, best: Callable[[Sequence[int]], int | None]):
        self._keep = keep
        self._best = best

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]  # the one just saved is the last
        kept = _kept(steps, self._keep, self._best)
        return [step in kept for step in steps]


def _kept(steps: Sequence[int], keep: int, best: Callable[[Sequence[int]], int | None]) -> set[int | None]:
    """The newest and the best of the steps of checkpoints."""
    return {*steps[-keep:], best(steps)}


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns what goes wrong in a write into a CheckpointError."""
    try:
        yield
    except Exception as error:
        full = "No space left on device" in str(error)
        reason = "there is no space left on the device" if full else _first_line(error)
        raise CheckpointError(f"cannot write a checkpoint to {directory}: {reason}") from error


def _types(tree: Any) -> dict[str, str]:
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in named_leaves(tree).items()}


def _abstract(types: dict[str, str], sharding: jax.sharding.Sharding) -> dict:
    """The tree of nested dicts that `_types` describes."""
    flat = {}
    for path, described in types.items():
        dtype, _, sizes = described.rstrip("]").partition("[")
        shape = tuple(map(int, filter(None, sizes.split(","))))
        flat[tuple(path.split("/"))] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return nest(flat)


def _seal(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _everywhere(condition: bool) -> bool:
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def _first_line(error: BaseException) -> str:
    """The message without the pages after its first line, and without the middle of that where it is long."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-160:]}"
