"""Stopping at the end of a step when the machine is about to be taken away, or the user presses Ctrl-C."""

import contextlib
import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from common import hosts

TOGETHER = 0.5  # seconds within which signals are one: SLURM sends SIGTERM twice, milliseconds apart, when it preempts


class GracefulStop:
    """Asks the training loop to save and stop when the process gets SIGTERM or SIGINT.

        with GracefulStop() as stop:
            for step in ...:
                ...
                if stop.requested(step):
                    break

    A second signal, if it does not come together with the first one, does what it would have done without this. Where
    processes are joined by `jax.distributed`, SIGTERM is left to JAX's own handler: it makes all processes agree on a step, and
    `requested` becomes true in all of them after that step even if only one got the signal. SIGINT is then handed on to it.
    """

    def __init__(self):
        self._requested = False
        self._since = 0.0
        self._old = {}
        self._noting = contextlib.ExitStack()

    def __enter__(self) -> "GracefulStop":
        if not jax.distributed.is_initialized():
            self._old = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._noting.enter_context(hosts.noting_sigterm())
            self._old = {signal.SIGINT: signal.signal(signal.SIGINT, self._hand_on)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._noting.close()

    @property
    def asked(self) -> bool:
        """Whether this process has got a signal. Of joined processes never: they stop after a step that all agree on."""
        return self._requested

    def requested(self, step: int) -> bool:
        """Whether to save and stop now, after `step`. To be called by all processes after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _hand_on(self, number: int, frame) -> None:
        del frame
        signal.signal(number, self._old[number])  # a second one stops at once
        signal.raise_signal(signal.SIGTERM)

    def _request(self, number: int, frame) -> None:
        del frame
        if self._requested and time.monotonic() - self._since < TOGETHER:
            return
        if self._requested:
            signal.signal(number, self._old[number])
            signal.raise_signal(number)
            return
        self._requested, self._since = True, time.monotonic()
        said = f"{signal.Signals(number).name}: stopping after this step; once more to stop at once\n"
        with contextlib.suppress(OSError):  # on a full disk, say, what matters is that the run is saved
            os.write(2, said.encode())  # print may be running
