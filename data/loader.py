"""Batches of a task, placed on the devices: a pure function of the step.

There is no iterator state to save: the batch of step s holds rows s*B to (s+1)*B-1 of the split, whatever was read
before and however many hosts and devices share the work.
"""

import bisect
import collections
import concurrent.futures.process
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, Shaped

from common import hosts
from common.errors import UserError, check_choice
from data.rows import PLACES, shown
from data.task import REAL, Spec, Task
from data.workers import Workers


class Loader:
    """`loader[step]` is the batch of that step, a dict of global arrays [batch_size, ...]: what `data.rows.shown` leaves.

    Training is endless. Valid and test end after `len(loader)` batches; the last one is filled with rows whose weights
    and segment ids are 0, so that each example counts once whatever the batch size.

    Args:
      task: where the rows come from.
      split: "train", "valid" or "test".
      batch_size: rows of the global batch.
      seed: order and cutting of the training rows.
      sharding: of the [batch, length] arrays. Each host reads only the rows that its devices hold. None places
        everything on the default device.
      workers: processes that make the rows, of the same task; None makes them where they are asked for. For training.

    Raises:
      UserError: for an unknown split, or a batch that does not divide over the sharding.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        batch_size: int,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
        workers: Workers | None = None,
    ):
        check_choice("split", split, task.splits)
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        if sharding is not None:
            _check_divides(sharding, batch_size, task.spec.length)
        self.task, self.split, self.batch_size, self.seed, self.sharding = task, split, batch_size, seed, sharding
        self.finite = split != "train"
        self.workers, self._coming = workers, {}
        # A row of no weight, and so the keys of a batch.
        self._padding = shown(
            {key: np.zeros_like(value) for key, value in self._example(0).items()}, task.spec.segmented
        )

    def __len__(self) -> int:
        """Batches of one pass over the split, the last of them maybe partial."""
        return -(-self.task.num_examples(self.split) // self.batch_size)

    def __getitem__(self, step: int) -> dict[str, Shaped[Array, "B ..."]]:
        """The batch of a step.

        Raises:
          IndexError: before the first batch, and after the last one of valid and test.
          ValueError: for ids that the task's spec does not have, which is a fault of the task.
        """
        if step < 0 or (self.finite and step >= len(self)):
            raise IndexError(f"{self.split} has batches 0 to {len(self) - 1}, batch {step} was asked for")
        rows, (mine, made) = {}, ([], {}) if self.workers is None else self._made(step)

        def block(key, index):
            wanted = range(*index[0].indices(self.batch_size))
            if self.workers is not None:  # rows that follow each other lie so in what was made
                place = bisect.bisect_left(mine, wanted.start)
                block_rows = made[key][place : place + len(wanted)]
            else:
                # Devices that hold the same rows share one reading of them.
                for i in wanted:
                    if i not in rows:
                        rows[i] = self._example(step * self.batch_size + i)
                block_rows = np.stack([rows[i][key] for i in wanted])
            return self._checked(key, block_rows[:, *index[1:]], step * self.batch_size + wanted.start)

        if self.sharding is None:
            return {key: jax.device_put(block(key, (slice(None),))) for key in self._padding}
        return {
            key: jax.make_array_from_callback(
                (self.batch_size, *value.shape), self.sharding, lambda index, key=key: block(key, index)
            )
            for key, value in self._padding.items()
        }

    def _made(self, step: int) -> tuple[list[int], dict[str, np.ndarray]]:
        """The rows of a step that this host needs: their places in the batch, in order, and their arrays [rows, ...]. The workers
        go on to the next steps. Nothing is done here row by row: one process takes what many make."""
        mine = list(range(self.batch_size))
        if self.sharding is not None:
            parts = self.sharding.addressable_devices_indices_map((self.batch_size, self.task.spec.length)).values()
            mine = sorted({i for rows, _ in parts for i in range(*rows.indices(self.batch_size))})
        for ahead in range(step, step + 2 + self.workers.count):
            if ahead not in self._coming:
                indices = [ahead * self.batch_size + i for i in mine]
                self._coming[ahead] = self.workers.rows(self.split, indices, self.seed)
        try:
            return mine, self._coming.pop(step).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a process that makes rows has ended: it was killed, perhaps for want of memory, or has printed why. Run the "
                "same command again, or with another train.data_workers"
            ) from None

    def _example(self, index: int) -> dict[str, np.ndarray]:
        if self.finite and index >= self.task.num_examples(self.split):
            return self._padding
        return self._row(index)

    def _checked(self, key: str, ids: np.ndarray, first: int) -> np.ndarray:
        """Rows of a batch, of which the first has an index; all ids in them are those of the task's spec."""
        size = {"inputs": self.task.spec.vocab_size, "targets": self.task.spec.targets}.get(key)
        # An embedding or a cross-entropy reads other ids as NaN or as their neighbours, without an error.
        if size is not None and np.issubdtype(ids.dtype, np.integer) and (ids.min() < 0 or ids.max() >= size):
            place = tuple(np.argwhere((ids < 0) | (ids >= size))[0])
            raise ValueError(
                f"{self.task.name}: {key} of {self.split} row {first + place[0]} hold the id {ids[place]}, outside 0 to "
                f"{size - 1}; set the task's spec to the number of ids that its data has"
            )
        return ids

    def _row(self, index: int) -> dict[str, np.ndarray]:
        return self.task.example(self.split, index, self.seed)


class Lanes(Loader):
    """Batches of contiguous text: row b of a batch goes on where row b of the batch before has ended.

    The text is cut into `batch_size` lanes of equal length, and each row reads its own from the beginning to the end, and then
    again; each time it begins a little later, by an offset below the length of a row, so that rows are cut elsewhere. Batches
    have "restart" [batch], whether a row begins anew, and no positions, which follow from what was before.

    Args:
      task: which is `contiguous`.
      batch_size, seed, sharding: as for `Loader`.

    Raises:
      UserError: as `Loader`; if a lane is shorter than two rows.
    """

    def __init__(self, task: Task, batch_size: int, seed: int, sharding: jax.sharding.Sharding | None = None):
        length = task.spec.length
        self._lane = task.num_tokens("train") // batch_size
        # Rows of a lane behind any offset.
        self.steps = self._lane // length - 1
        if self.steps < 1:
            raise UserError(
                f"the text has {self._lane:,} {task.spec.unit}s for each of {batch_size} rows, and train.carry needs "
                f"{2 * length:,}: give a longer text, or a smaller task.length or train.batch_size"
            )
        super().__init__(task, "train", batch_size, seed, sharding)

    def _row(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, self.batch_size)
        epoch, i = divmod(step, self.steps)
        offset = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]) % self.task.spec.length
        length = self.task.spec.length
        example = self.task.stretch("train", row * self._lane + offset + i * length, length)
        del example["positions"]
        return {**example, "restart": np.asarray(i == 0)}


def _check_divides(sharding: jax.sharding.Sharding, batch_size: int, length: int) -> None:
    # Every number of shards divides the number of devices, so an array of that size shows how an axis is cut.
    n = sharding.num_devices
    shards = [n // size for size in sharding.shard_shape((n, n))]
    for what, size, count in zip(("batch_size", "length"), (batch_size, length), shards, strict=True):
        if size % count:
            raise UserError(
                f"{what}={size} does not divide over the {count} parts that the mesh cuts it into; make it a multiple of {count}"
            )


def batch_shapes(spec: Spec, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch of a task looks like, without one: the shapes and types of `Loader`'s arrays."""
    of = (rows, 2) if spec.objective == "pair_classification" else (rows,)
    inputs = (*of, spec.length) if spec.channels is None else (rows, spec.length, spec.channels)
    places = {"causal_lm": (spec.length,), "token_labels": (spec.length,), "token_regression": (spec.length,)}
    scored = (rows, *places.get(spec.objective, ()))
    real = spec.objective in REAL
    shapes = {
        "inputs": (inputs, np.int32 if spec.channels is None else np.float32),
        "targets": ((*scored, spec.targets) if real else scored, np.float32 if real else np.int32),
        "weights": (scored, np.float32),
        **{key: ((*of, spec.length), np.int32) for key in PLACES if spec.segmented},
    }
    return {key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}


def prefetch(loader: Loader, start_step: int = 0, depth: int = 2) -> Iterator[dict[str, Shaped[Array, "B ..."]]]:
    """Yields the loader's batches from `start_step` on, made and placed by a background thread up to `depth` ahead.

    An error in the making of a batch is raised where that batch would have been yielded. Closing the generator, or
    leaving it for good, ends the thread, and waits for it unless this process is one of several: when one of those ends, all
    do, and none is to wait for a row that a disk may never give.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be at least 1")
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    pending = collections.deque()
    step = start_step
    try:
        while True:
            while len(pending) <= depth and not (loader.finite and step >= len(loader)):
                pending.append(pool.submit(loader.__getitem__, step))
                step += 1
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=not hosts.joined(), cancel_futures=True)
