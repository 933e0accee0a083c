"""From how many tokens on a mechanism is faster than softmax: doubling token counts, alone and in the network."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import cases
import timing
import torch
from measure import Network, prepare, release, say, standing, time_rounds
from results import CrossoverRow, SweepRow, crossover
from settings import ImageSize, Settings

from adala.compilation import compiled_call


def doubling_grids(most_tokens: int) -> list[tuple[int, int]]:
    """Patch grids (rows, columns) from 8 x 8 on, each twice the last, square or twice as wide as high."""
    grids, rows, columns = [], 8, 8
    while rows * columns <= most_tokens:
        grids.append((rows, columns))
        rows, columns = (rows, 2 * columns) if rows == columns else (2 * rows, columns)
    return grids


def run_sweep(settings: Settings, most_tokens: int, budget_s: float) -> tuple[list[SweepRow], list[CrossoverRow]]:
    """Every mechanism against softmax over doubling token counts, alone and in the network."""
    found: list[SweepRow] = []
    grids = doubling_grids(most_tokens)
    deadline = time.monotonic() + budget_s
    for index, grid in enumerate(grids):
        image_size = tuple(count * patch for count, patch in zip(grid, settings.patch_size, strict=True))
        say(f"sweep: {image_size[0]} x {image_size[1]} px, {grid[0] * grid[1]} patches")
        tokens = grid[0] * grid[1] + settings.outline.num_prefix_tokens
        in_network = {mechanism: SweepRow(mechanism, "network", tokens) for mechanism in settings.mechanisms}
        networks, _ = prepare(settings, image_size, in_network)
        alone = {mechanism: replace(row, scope="operator") for mechanism, row in in_network.items()}
        for rows in (alone, in_network):
            runners = {mechanism: network.runner for mechanism, network in networks.items()}
            if rows is alone:
                runners = operator_runners(settings, networks, image_size)
            # What is left, shared such that each count may take twice as long as the one before.
            share = max(0.0, deadline - time.monotonic()) / (2 ** (len(grids) - index + 1) - 2)
            samples = time_rounds(settings, runners, rows, share)
            for mechanism, row in standing(rows).items():
                row.latency_ms_p50 = 1000 * timing.percentile(samples.seconds[mechanism], 50)
                row.ratio_vs_softmax, _, _ = samples.against(cases.SOFTMAX, mechanism)
            found += rows.values()
        del networks, runners, samples
        release(settings.device)
    return found, list(crossover_rows(settings, found))


def operator_runners(
    settings: Settings, networks: Mapping[str, Network], image_size: ImageSize
) -> dict[str, timing.Runner]:
    """The first block's mixing over q, k, v as strided views of one packed tensor, compiled where the network is."""
    runners = {}
    images = cases.make_images(settings.case(cases.NONE, image_size), settings.device)
    for name, network in networks.items():
        pinned = settings.case(name, image_size).pinned_backend
        call = cases.capture_calls(network.model, timing.forward_runner(partial(network.model, images), pinned))[0]
        packed = torch.stack([x.transpose(1, 2) for x in (call.q, call.k, call.v)], dim=2)  # (B, N, 3, H, d)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mix = partial(compiled_call(), type(call.mixer).forward, call.mixer) if network.is_compiled else call.mixer
        runner = timing.forward_runner(partial(mix, q, k, v, call.layout), pinned)
        runners[name] = timing.warmed(runner, timing.measure_for(settings.device))
    return runners


def crossover_rows(settings: Settings, rows: Sequence[SweepRow]) -> Iterator[CrossoverRow]:
    for mechanism in settings.mechanisms:
        for scope in ("operator", "network"):
            own = [row for row in rows if (row.mechanism, row.scope) == (mechanism, scope)]
            if mechanism != cases.SOFTMAX and own:
                kind, tokens = crossover([(row.tokens, row.ratio_vs_softmax) for row in own])
                yield CrossoverRow(mechanism, scope, kind, tokens, own[0].tokens, own[-1].tokens)
