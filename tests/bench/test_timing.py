"""Rounds, ratios and crossovers on a clock that only moves when told."""

import contextlib
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from allocator import HUGE_PAGES_SETTING
from cases import MECHANISMS, Case, build_model
from results import crossover
from sweep import doubling_grids
from timing import (
    Runner,
    Samples,
    captured,
    compiled,
    fastest_sdpa_backend,
    interleave,
    measure_for,
    median_interval,
    percentile,
    speedup,
    warmed,
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
        """A runner that takes so long, known to it as a whole second, so that one call is a sample."""

        def call() -> None:
            self.order.append(name)
            self.now += seconds * self.pace
            self.pace *= self.drift

        return Runner(call, seconds=1.0)

    def interleave(self, cases: dict[str, Runner], rounds: int, budget_s: float = math.inf) -> Samples:
        return interleave(cases, measure_for(torch.device("cpu"), self), rounds, budget_s, self)


def test_every_round_times_every_case_and_begins_with_another():
    clock = FakeClock()
    cases = {name: clock.work(name, 1.0) for name in "abc"}
    samples = clock.interleave(cases, 4)
    assert "".join(clock.order) == "abc" + "bca" + "cab" + "abc"
    assert samples.seconds == {name: [1.0] * 4 for name in "abc"}


def test_a_sample_is_the_mean_of_as_many_calls_as_its_length_needs():
    clock = FakeClock()
    runner = warmed(clock.work("a", 0.007), measure_for(torch.device("cpu"), clock))
    assert runner.seconds == pytest.approx(0.007) and runner.iterations == math.ceil(0.05 / 0.007) == 8
    assert Runner(print, seconds=3.0).iterations == 1
    samples = clock.interleave({"a": runner}, 2)
    assert samples.seconds["a"] == pytest.approx([0.007] * 2) and len(clock.order) == 2 + 2 * 8


def test_ratios_survive_a_machine_that_slows_down():
    clock = FakeClock(drift=1.05)
    cases = {
        "softmax": clock.work("softmax", 2.0),
        "other": clock.work("other", 1.0),
        "third": clock.work("third", 4.0),
    }
    samples = clock.interleave(cases, 30)
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

    cases = {"good": clock.work("good", 1.0), "bad": Runner(fails_at_third, seconds=1.0)}
    samples = clock.interleave(cases, 5)
    assert samples.seconds["good"] == [1.0] * 5
    assert samples.seconds["bad"][2:] == [None] * 3 and len(calls) == 3
    assert str(samples.errors["bad"]) == "boom"
    assert samples.against("good", "good") == (1.0, 1.0, 1.0)
    assert samples.against("bad", "good") == samples.against("absent", "good") == (None, None, None)


@pytest.mark.parametrize(
    "budget_s, most, expected", [(60, 30, 6), (1, 30, 3), (1000, 30, 30), (1000, 2, 2), (0, 30, 3)]
)
def test_the_budget_decides_how_many_rounds(budget_s, most, expected):
    """Rounds of ten seconds; three there are in any case, if that many are allowed."""
    clock = FakeClock()
    cases = {name: replace(clock.work(name, 5.0), seconds=5.0) for name in "ab"}
    assert clock.interleave(cases, most, budget_s).rounds == expected


def test_no_round_is_begun_that_would_end_too_late():
    """Known as ten seconds, the case takes eight: after seven rounds 56 of 60 are gone."""
    clock = FakeClock()
    assert clock.interleave({"a": replace(clock.work("a", 8.0), seconds=10.0)}, 100, 60).rounds == 7


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


def test_on_a_gpu_a_call_is_warmed_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for CUDA: three calls on a stream of their own, one while the graph is recorded, no more."""
    seen: list[str] = []

    class Graph:
        def replay(self) -> None:
            seen.append("replay")

    @contextlib.contextmanager
    def within(name: str):
        seen.append(f"{name}:")
        yield
        seen.append(":")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_in = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda stream: within("stream"),
        CUDAGraph=Graph,
        graph=lambda graph: within("graph"),
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    runner = Runner(lambda: seen.append("call") or "output", lambda: within("context"))
    replayed = captured(runner, torch.device("cuda"))
    assert seen == ["context:", "stream:", *["call"] * 3, ":", "graph:", "call", ":", ":"]
    assert replayed.call() == "output" and seen[-1] == "replay" and seen.count("call") == 4
    assert captured(runner, torch.device("cpu")) is runner
