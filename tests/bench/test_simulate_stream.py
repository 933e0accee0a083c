"""The simulation of many ranks, on a few: what it claims holds, and it would say so if it did not."""

import subprocess
import sys

import numpy as np
import pytest
import simulate_stream

from adala.data.order import Cut
from adala.data.positions import Intervals
from adala.data.shuffle import SlidingBuffer

TINY = ["--ranks", "8", "--workers", "4", "--shards", "60", "--shuffle_buffer", "50"]


@pytest.mark.parametrize("seed", range(3))
def test_every_claim_holds(seed: int) -> None:
    # In a process of its own: the memory that it claims would be that of all tests before it.
    command = [sys.executable, simulate_stream.__file__, *TINY, "--seed", str(seed)]
    ended = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = ended.stdout
    assert ended.returncode == 0, said
    assert said.count("  yes  ") == 12 and "NO" not in said
    assert said.count("exactly once") == 2 and "on 6 ranks x 1 workers, 2 micro-batches of 4 a step" in said


def test_a_buffer_that_mistakes_what_it_held_is_found(capsys, monkeypatch) -> None:
    """When the world changes, one sample that was emitted is taken for one that was not."""
    left_after = SlidingBuffer.left_after

    def mistaken(buffer: SlidingBuffer, emitted: int) -> Intervals:
        left = set(left_after(buffer, emitted))
        gone = set(range(buffer.length)) - left
        return Intervals.of(np.array(sorted(left - {min(left)} | {min(gone)} if left and gone else left)))

    monkeypatch.setattr(SlidingBuffer, "left_after", mistaken)
    assert simulate_stream.main(TINY) == 1
    said = capsys.readouterr().out
    assert said.count("  yes  every one of") == 1 == said.count("  NO   every one of")


def test_ranges_that_overlap_are_found(capsys, monkeypatch) -> None:
    bounds = Cut.bounds

    def moved(cut: Cut, number: int) -> tuple[int, int]:
        begin, end = bounds(cut, number)
        return (begin - 1, end - 1) if number == 3 else (begin, end)

    monkeypatch.setattr(Cut, "bounds", moved)
    assert simulate_stream.main(TINY) == 1
    said = capsys.readouterr().out
    assert "  NO   every one of" in said and "  NO   every shard" in said and "  NO   each source" in said


def test_ranks_that_do_not_divide_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        simulate_stream.main(["--ranks", "6"])
    assert "--ranks must be a multiple of 4" in capsys.readouterr().err
    assert simulate_stream.main(["--ranks", "1024", "--shards", "3"]) == 1
    assert "fewer than three steps an epoch" in capsys.readouterr().err
