"""From how many tokens on a mechanism is faster than softmax: doubling token counts, alone and in the network."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from cases import NONE, SOFTMAX, capture_calls, make_images
from prepare import Failure, Prepared, fail, prepare, release, say, time_rounds
from results import CrossoverRow, SweepRow
from settings import Settings
from timing import (
    Runner,
    Samples,
    compiled_call,
    crossover,
    doubling_grids,
    forward_runner,
    measure_for,
    percentile,
    speedup,
)


def run_sweep(settings: Settings, most_tokens: int, budget_s: float) -> tuple[list[SweepRow], list[CrossoverRow]]:
    """Every mechanism against softmax over doubling token counts, alone and in the network."""
    rows: list[SweepRow] = []
    grids = doubling_grids(most_tokens)
    deadline = time.monotonic() + budget_s
    for index, grid in enumerate(grids):
        image_size = tuple(count * patch for count, patch in zip(grid, settings.patch_size, strict=True))
        say(f"sweep: {image_size[0]} x {image_size[1]} px, {grid[0] * grid[1]} patches")
        ready = prepare(settings, image_size, settings.mechanisms)
        tokens = grid[0] * grid[1] + settings.outline.num_prefix_tokens
        for scope in ("operator", "network"):
            runners, seconds = ready.runners, ready.seconds
            if scope == "operator":
                runners, seconds = operator_runners(settings, ready, image_size)
            # What is left, shared such that each count may take twice as long as the one before.
            share = max(0.0, deadline - time.monotonic()) / (2 ** (len(grids) - index + 1) - 2)
            samples = time_rounds(settings, runners, seconds, share)
            rows += sweep_rows(settings, ready, samples, scope, tokens)
        del ready, runners, samples
        release(settings.device)
    return rows, crossover_rows(settings, rows)


def operator_runners(
    settings: Settings, ready: Prepared, image_size: tuple[int, int]
) -> tuple[dict[str, Runner], dict[str, float]]:
    """The mixing of the first block alone, over q, k, v as strided views of one packed projection.

    Compiled where the network is.
    """
    measure = measure_for(settings.device)
    runners, seconds = {}, {}
    images = make_images(settings.case(NONE, image_size), settings.device)
    for name, model in ready.models.items():
        pinned = settings.case(name, image_size).pinned_backend
        call = capture_calls(model, forward_runner(lambda model=model: model(images), pinned))[0]
        packed = torch.stack([x.transpose(1, 2) for x in (call.q, call.k, call.v)], dim=2)  # (B, N, 3, H, d)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mix = partial(compiled_call(), call.mixer) if ready.is_compiled[name] else call.mixer
        runners[name] = forward_runner(partial(mix, q, k, v, call.layout), pinned)
        measure(runners[name], 1)
        seconds[name] = measure(runners[name], 1)
    return runners, seconds


def sweep_rows(settings: Settings, ready: Prepared, samples: Samples, scope: str, tokens: int) -> Iterator[SweepRow]:
    for mechanism in settings.mechanisms:
        row = SweepRow(mechanism, scope, tokens)
        failure = ready.failures.get(mechanism)
        if mechanism in samples.errors:
            failure = Failure.of(samples.errors[mechanism])
        if failure is not None:
            fail(row, failure)
        else:
            seconds = samples.seconds[mechanism]
            row.latency_ms_p50 = 1000 * percentile([value for value in seconds if value is not None], 50)
            if SOFTMAX in samples.seconds and SOFTMAX not in samples.errors:
                row.ratio_vs_softmax = speedup(samples.seconds[SOFTMAX], seconds)
        yield row


def crossover_rows(settings: Settings, rows: Sequence[SweepRow]) -> list[CrossoverRow]:
    found = []
    for mechanism in settings.mechanisms:
        for scope in ("operator", "network"):
            points = [
                (row.tokens, row.ratio_vs_softmax) for row in rows if (row.mechanism, row.scope) == (mechanism, scope)
            ]
            if mechanism != SOFTMAX and points:
                where, counts = crossover(points), [tokens for tokens, _ in points]
                found.append(CrossoverRow(mechanism, scope, where.kind, where.tokens, min(counts), max(counts)))
    return found
