"""The first signal asks, the second one acts, and the old handlers come back."""

import errno
import signal

import jax
import pytest
from jax.experimental import multihost_utils

from training import stopping
from training.stopping import GracefulStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(number, capfd, monkeypatch):
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)
    seen = []
    before = signal.signal(number, lambda *_: seen.append("old handler"))
    try:
        old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        with GracefulStop() as stop:
            assert not stop.requested(1)
            signal.raise_signal(number)
            assert stop.requested(2) and stop.requested(3) and not seen
            printed = capfd.readouterr().err
            assert printed == f"{number.name}: stopping after this step; once more to stop at once\n"
            signal.raise_signal(number)
            assert seen == ["old handler"]
        assert {n: signal.getsignal(n) for n in old} == old
    finally:
        signal.signal(number, before)


def test_signals_that_come_together_are_one():
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it was told to stop once"))
    try:
        with GracefulStop() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert stop.requested(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_second_interrupt_is_a_keyboard_interrupt(monkeypatch):
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), GracefulStop():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_cannot_be_told_of_is_heeded(monkeypatch):
    """Where the disk of what is printed is full, the run is saved all the same."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with GracefulStop() as stop:
        monkeypatch.setattr("os.write", full)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
        assert stop.requested(1)


def test_joined_processes_ask_jax(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 3)
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert signal.getsignal(signal.SIGTERM) is before  # JAX's own must stay
        assert [stop.requested(step) for step in (1, 2, 3)] == [False, False, True]
