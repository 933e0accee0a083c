"""Rounds, ratios and crossovers on a clock that only moves when told."""

import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocator import HUGE_PAGES_SETTING
from cases import MECHANISMS, Case, build_model
from timing import (
    Runner,
    compiled,
    crossover,
    doubling_grids,
    fastest_sdpa_backend,
    interleave,
    iterations_for,
    median_interval,
    percentile,
    rounds_within,
    speedup,
    wall_clock,
)
from torch._dynamo import reset
from torch._dynamo.utils import counters

BENCH = Path(__file__).parents[2] / "bench"


class FakeClock:
    """Seconds that pass only in :meth:`work`; the machine slows down by ``drift`` with every call."""

    def __init__(self, drift: float = 1.0):
        self.now, self.pace, self.drift = 0.0, 1.0, drift
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> Runner:
        def call() -> None:
            self.order.append(name)
            self.now += seconds * self.pace
            self.pace *= self.drift

        return Runner(call)


def test_every_round_times_every_case_and_begins_with_another():
    clock = FakeClock()
    cases = {name: clock.work(name, 1.0) for name in "abc"}
    samples = interleave(cases, 4, dict.fromkeys("abc", 1), wall_clock(clock))
    assert "".join(clock.order) == "abc" + "bca" + "cab" + "abc"
    assert samples.seconds == {name: [1.0] * 4 for name in "abc"}


def test_a_sample_is_the_mean_of_its_iterations():
    clock = FakeClock()
    samples = interleave({"a": clock.work("a", 0.25)}, 2, {"a": 8}, wall_clock(clock))
    assert samples.seconds == {"a": [0.25, 0.25]} and len(clock.order) == 16


def test_ratios_survive_a_machine_that_slows_down():
    clock = FakeClock(drift=1.05)
    cases = {
        "softmax": clock.work("softmax", 2.0),
        "other": clock.work("other", 1.0),
        "third": clock.work("third", 4.0),
    }
    samples = interleave(cases, 30, dict.fromkeys(cases, 1), wall_clock(clock))
    alone = percentile(samples.seconds["softmax"], 50) / samples.seconds["other"][0]
    assert samples.against("softmax", "other")[0] == pytest.approx(2.0, rel=0.06)
    assert alone > 10


def test_a_case_that_fails_leaves_the_others_alone():
    clock = FakeClock()
    calls = []

    def fails_at_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("boom")

    cases = {"good": clock.work("good", 1.0), "bad": Runner(fails_at_third)}
    samples = interleave(cases, 5, {"good": 1, "bad": 1}, wall_clock(clock))
    assert samples.seconds["good"] == [1.0] * 5
    assert samples.seconds["bad"][2:] == [None] * 3 and len(calls) == 3
    assert str(samples.errors["bad"]) == "boom"
    assert samples.against("good", "good") == (1.0, 1.0, 1.0)
    assert samples.against("bad", "good") == samples.against("absent", "good") == (None, None, None)


def test_rounds_stop_when_told():
    clock = FakeClock()
    samples = interleave({"a": clock.work("a", 1.0)}, 100, {"a": 1}, wall_clock(clock), lambda done: clock.now >= 7)
    assert samples.rounds == 7


def test_the_budget_decides_how_many_rounds():
    assert rounds_within(60, 10, 30) == 6
    assert rounds_within(1, 10, 30) == 3
    assert rounds_within(1000, 10, 30) == 30
    assert rounds_within(1000, 10, 2) == 2
    assert iterations_for(0.004) == math.ceil(0.05 / 0.004) and iterations_for(3.0) == 1


def test_a_ratio_is_the_median_of_rounds_that_have_both():
    assert speedup([2.0, 4.0, None, 9.0], [1.0, 1.0, 1.0, 3.0]) == (3.0, 2.0, 4.0)
    assert speedup([None], [1.0]) == (None, None, None)


def test_the_interval_of_a_median_holds_it_in_95_of_100_samples():
    generator = torch.Generator().manual_seed(0)
    for n in (10, 30, 100):
        samples = torch.empty(2000, n).exponential_(generator=generator)
        held = [low <= math.log(2) <= high for low, high in map(median_interval, samples.tolist())]
        assert 0.94 <= sum(held) / len(held) <= 0.985
    assert median_interval(range(10)) == (1, 8), "ranks 2 and 9 of ten, as in any table"
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([1.0]) == (1.0, 1.0)


def test_percentiles():
    assert [percentile([4, 1, 3, 2, 5], p) for p in (0, 20, 50, 80, 100)] == pytest.approx([1, 1.8, 3, 4.2, 5])
    assert percentile([None, 2.0, 3.0, None], 50) == 2.5


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(64, 0.5), (128, 2.0)], ("within", 64 * 2**0.5)),
        ([(64, 2.0), (128, 0.5), (256, 2.0)], ("within", 128 * 2**0.5)),
        ([(64, 0.5), (128, 0.9)], ("never", None)),
        ([(64, 1.5), (128, 0.9)], ("never", None)),
        ([(64, 1.0), (128, 1.9)], ("always", None)),
        ([(64, None)], ("unknown", None)),
        ([(64, 0.25), (128, None), (256, 4.0)], ("within", 128)),
    ],
)
def test_crossover(points, expected):
    kind, tokens = crossover(points)
    assert (kind, tokens) == (expected[0], pytest.approx(expected[1]))


def test_grids_double():
    grids = doubling_grids(1024)
    assert [rows * columns for rows, columns in grids] == [64, 128, 256, 512, 1024]
    assert all(columns in (rows, 2 * rows) for rows, columns in grids)


def test_some_sdpa_backend_runs_on_this_machine():
    q, k, v = torch.randn(3, 1, 2, 33, 8).unbind(0)
    assert fastest_sdpa_backend(q, k, v, budget_s=0.01) in ("flash", "math", "efficient", "cudnn")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
def test_large_blocks_are_not_mapped_apart_once_memory_is_kept() -> None:
    """In a process of its own: the setting stays for a process's life. A mapped block would show in mallinfo2."""
    code = """
import ctypes
from allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc.mallinfo2.restype = Info
before = libc.mallinfo2().hblks
libc.malloc(100 << 20)
assert libc.mallinfo2().hblks == before + 1
assert keep_freed_memory()
libc.malloc(100 << 20)
assert libc.mallinfo2().hblks == before + 1
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not HUGE_PAGES_SETTING.exists() or "[never]" in HUGE_PAGES_SETTING.read_text(),
    reason="this system has no huge pages on demand",
)
def test_large_tensors_lie_on_huge_pages() -> None:
    """In a process of its own, as above. Half of them at least: memory may be too cut up for all."""
    code = """
import re
from pathlib import Path
import torch
from allocator import keep_freed_memory, use_huge_pages
assert keep_freed_memory() and use_huge_pages()
held = torch.ones(200 << 20, dtype=torch.uint8)
kib = int(re.search(r"AnonHugePages: *([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
assert kib > 100 << 10, kib
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_compiled_graph_serves_all_blocks_of_a_network_and_no_other():
    """Also for the tenth network: what torch.compile keeps for one function is limited to eight."""
    reset()
    counters.clear()
    for count, mechanism in enumerate(MECHANISMS, start=1):
        model = build_model(Case("test_vit", mechanism=mechanism, image_size=(64, 96), softmax="math"))
        twin, images = compiled(model, backend="eager"), torch.randn(2, 3, 64, 96)
        assert len(twin.blocks) == 6
        with torch.inference_mode():
            torch.testing.assert_close(twin(images), model(images))
        assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"], mechanism
        assert {id(tensor) for tensor in twin.parameters()} == {id(tensor) for tensor in model.parameters()}
