"""What a process notes of its end, and what it forgets. Whole runs that are asked to end: tests/distributed."""

import multiprocessing
import os
import signal

import pytest

from adala.preemption import listen, reason_to_end, stop_listening


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_is_noted_and_afterwards_does_what_it_did(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    listen()
    try:
        assert reason_to_end() is None
        os.kill(os.getpid(), number)
        assert reason_to_end() == number.name
    finally:
        stop_listening()
    assert reason_to_end() is None and signal.getsignal(number) == before


def test_a_process_that_is_forked_from_a_rank_has_its_own_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data workers, and whatever else a rank starts: that its parent is no launcher is nothing to end for."""
    monkeypatch.setenv("RANK", "0")
    listen()
    try:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply(reason_to_end) is None
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert reason_to_end() == "its launcher has ended"
    finally:
        stop_listening()
