"""Rows made by processes: for tasks whose rows one thread does not make as fast as a device takes them.

A row is a pure function of (seed, split, index), so it does not matter which process makes it: the batches, their order and what
a run resumes with are those without workers. Each worker builds the task anew, by its name and hyperparameters, and makes the
rows of whole batches, several steps ahead.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from data import task as tasks
from data.rows import shown

PARENT = 1.0  # seconds between two looks whether the process that they work for is there

_task: tasks.Task | UserError | None = None  # of a worker; or why there is none


class Workers:
    """Processes that make rows.

    Args:
      name, hyperparameters: of the task, as `data.task.create` takes them.
      count: of the processes.
    """

    def __init__(self, name: str, hyperparameters: Mapping[str, Any], count: int):
        self.count = count
        # Not forked: JAX has threads. Each process imports the task, and no device.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(name, dict(hyperparameters), os.getpid()),
        )

    def rows(self, split: str, indices: Sequence[int], seed: int) -> concurrent.futures.Future:
        """The rows, as a model is shown them, to come: a dict of arrays [len(indices), ...], by key. Errors are the task's."""
        # A process may be started here, and inherits that these signals wait: it ends with the one it works for, which saves.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return self._pool.submit(_rows, split, list(indices), seed)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Ends the processes, whatever they are making."""
        for process in list((self._pool._processes or {}).values()):  # they heed no gentler signal
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _begin(name: str, hyperparameters: Mapping[str, Any], parent: int) -> None:
    global _task
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    try:
        _task = tasks.create(name, **hyperparameters)
    except UserError as error:  # said where rows are asked for; an error here would only say that a process has ended
        _task = error


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT)
    os._exit(1)


def _rows(split: str, indices: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    if isinstance(_task, UserError):
        raise _task
    made = [shown(_task.example(split, index, seed), _task.spec.segmented) for index in indices]
    return {key: np.stack([row[key] for row in made]) for key in made[0]}
