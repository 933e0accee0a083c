"""From how many tokens on a mechanism is faster than softmax: doubling token counts, alone and in the network."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import cases
import timing
import torch
from measure import Prepared, fail, prepare, release, say, time_rounds
from results import CrossoverRow, SweepRow, crossover
from settings import Settings

SCOPES = ("operator", "network")


def doubling_grids(most_tokens: int) -> list[tuple[int, int]]:
    """Patch grids (rows, columns) from 8 x 8 on, each twice the last, square or twice as wide as high."""
    grids, rows, columns = [], 8, 8
    while rows * columns <= most_tokens:
        grids.append((rows, columns))
        rows, columns = (rows, 2 * columns) if rows == columns else (2 * rows, columns)
    return grids


def run_sweep(settings: Settings, most_tokens: int, budget_s: float) -> tuple[list[SweepRow], list[CrossoverRow]]:
    """Every mechanism against softmax over doubling token counts, alone and in the network."""
    rows: list[SweepRow] = []
    grids = doubling_grids(most_tokens)
    deadline = time.monotonic() + budget_s
    for index, grid in enumerate(grids):
        image_size = tuple(count * patch for count, patch in zip(grid, settings.patch_size, strict=True))
        say(f"sweep: {image_size[0]} x {image_size[1]} px, {grid[0] * grid[1]} patches")
        prepared = prepare(settings, image_size, settings.mechanisms)
        for scope in SCOPES:
            runners = prepared.runners if scope == "network" else operator_runners(settings, prepared, image_size)
            # What is left, shared such that each count may take twice as long as the one before.
            share = max(0.0, deadline - time.monotonic()) / (2 ** (len(grids) - index + 1) - 2)
            samples = time_rounds(settings, runners, share)
            tokens = grid[0] * grid[1] + settings.outline.num_prefix_tokens
            rows += sweep_rows(settings, prepared, samples, scope, tokens)
        del prepared, runners, samples
        release(settings.device)
    return rows, list(crossover_rows(settings, rows))


def operator_runners(
    settings: Settings, prepared: Prepared, image_size: tuple[int, int]
) -> dict[str, timing.Runner]:  # fmt: skip
    """The mixing of the first block alone, over q, k, v as strided views of one packed projection.

    Compiled where the network is.
    """
    runners = {}
    images = cases.make_images(settings.case(cases.NONE, image_size), settings.device)
    for name, network in prepared.networks.items():
        pinned = settings.case(name, image_size).pinned_backend
        call = cases.capture_calls(network.model, timing.forward_runner(partial(network.model, images), pinned))[0]
        packed = torch.stack([x.transpose(1, 2) for x in (call.q, call.k, call.v)], dim=2)  # (B, N, 3, H, d)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mix = partial(timing.compiled_call(), call.mixer) if network.is_compiled else call.mixer
        runner = timing.forward_runner(partial(mix, q, k, v, call.layout), pinned)
        runners[name] = timing.warmed(runner, timing.measure_for(settings.device))
    return runners


def sweep_rows(
    settings: Settings, prepared: Prepared, samples: timing.Samples, scope: str, tokens: int
) -> Iterator[SweepRow]:
    errors = prepared.errors | samples.errors
    for mechanism in settings.mechanisms:
        row = SweepRow(mechanism, scope, tokens)
        if mechanism in errors:
            fail(row, errors[mechanism])
        else:
            row.latency_ms_p50 = 1000 * timing.percentile(samples.seconds[mechanism], 50)
            row.ratio_vs_softmax, _, _ = samples.against(cases.SOFTMAX, mechanism)
        yield row


def crossover_rows(settings: Settings, rows: Sequence[SweepRow]) -> Iterator[CrossoverRow]:
    for mechanism in settings.mechanisms:
        for scope in SCOPES:
            own = [row for row in rows if (row.mechanism, row.scope) == (mechanism, scope)]
            if mechanism != cases.SOFTMAX and own:
                kind, tokens = crossover([(row.tokens, row.ratio_vs_softmax) for row in own])
                yield CrossoverRow(mechanism, scope, kind, tokens, own[0].tokens, own[-1].tokens)
