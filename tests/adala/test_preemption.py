"""What a process notes of its end, and what it forgets. Whole runs that are asked to end: tests/distributed."""

import multiprocessing
import os
import signal

import pytest
import torch

from adala.evaluation import Features, fit_probe
from adala.evaluation.knn import knn_top1
from adala.evaluation.linear_probe import draw_batches
from adala.preemption import Preempted, listen, reason_to_end, stop_listening


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


def test_what_a_rank_does_by_itself_ends_where_it_is_asked_to() -> None:
    """Probes, neighbours and features are fitted and computed for minutes."""
    features = Features(torch.randn(64, 8), torch.arange(64) % 2)
    for action in (
        lambda: fit_probe(features, 2),
        lambda: list(draw_batches(torch.arange(8), 2, 1, seed=0)),
        lambda: knn_top1(features, features, [3]),
    ):
        action()
        listen()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Preempted, match="SIGTERM: while"):
                action()
        finally:
            stop_listening()
