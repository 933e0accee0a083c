"""Measures every mechanism under identical conditions: is it worth it, from which size on, and at what loss?

python bench/run_all.py --res 512 1024
python bench/run_all.py --res 256 512 1024 --protocol paper --train --sweep --out runs/bench-paper
python bench/run_all.py --accuracy --out runs/bench

Writes results.json, report.md and report.html into the folder --out. docs/BENCH.md says how to read them.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, MECHANISMS, NONE, OUT_OF_MEMORY, PAPER_OPTIONS, Case
from cost import measure_cost
from measure import measure_costs, measure_memories, say, time_size, train_size
from report import write_report
from results import AccuracyRow, Results, Row, read_results
from settings import ImageSize, Settings, build_settings, conditions
from sweep import run_sweep
from timing import SDPA_BACKENDS, switch_off_tf32

from adala.machine import load_average


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--res", type=int, nargs="*", default=None, help="pixels, height and width (512 1024)")
    parser.add_argument("--mechanisms", nargs="+", default=list(MECHANISMS), help=", ".join(MECHANISMS))
    parser.add_argument("--backbone", help="any backbone of docs/BACKBONES.md (ViT-L/16 on a GPU, ViT-S/16 on a CPU)")
    parser.add_argument("--model-args", type=json.loads, help="JSON, further arguments of timm's constructor")
    parser.add_argument("--protocol", choices=["paper", "best"], default="best", help="see docs/BENCH.md (best)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of weights and activations")
    parser.add_argument("--batch", type=int, default=1, help="images of one forward pass (1)")
    parser.add_argument("--rounds", type=int, default=100, help="most timed rounds; the budget may allow fewer (100)")
    parser.add_argument("--time-budget-s", type=float, default=780, help="seconds for all of --res together (780)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="threads on a CPU (PyTorch's choice)")
    parser.add_argument(
        "--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile (auto: where it is faster)"
    )
    parser.add_argument("--sdpa", choices=["auto", *SDPA_BACKENDS], default="auto", help="kernel of fused softmax")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of each case")
    parser.add_argument("--train", action="store_true", help="also time a Stage 2 step, teacher included")
    parser.add_argument("--sweep", action="store_true", help="also look for the crossover over token counts")
    parser.add_argument("--sweep-max-tokens", type=int, help="largest patch count (4096 on a CPU, 16384 on a GPU)")
    parser.add_argument("--sweep-budget-s", type=float, default=300, help="seconds for the rounds of --sweep (300)")
    parser.add_argument("--accuracy", action="store_true", help="also adapt every mechanism and score it")
    parser.add_argument("--recipe", default="tiny", help="recipe of --accuracy (tiny)")
    parser.add_argument(
        "--accuracy-images", type=int, default=9600, help="training images of one adaptation, all stages (9600)"
    )
    parser.add_argument(
        "--accuracy-set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe (stage1.lr=1e-3)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the report (runs/bench)")
    parser.add_argument("--add", action="store_true", help="keep what the report in --out has and this run does not")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        settings = build_settings(options)
        default = [] if options.accuracy or options.sweep else [512, 1024]
        sizes = settings.image_sizes(default if options.res is None else options.res)
        earlier = read_results(options.out / "results.json") if options.add else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in settings.notes:
        say(note)
    if settings.device.type == "cuda":
        torch.cuda.set_device(settings.device)
    switch_off_tf32()
    results = Results(conditions(settings), notes=settings.notes)

    def save() -> None:
        write_report(options.out, results if earlier is None else merged(earlier, results))

    if sizes:
        measure_rows(settings, results, sizes, started, save)
    if options.sweep:
        most = options.sweep_max_tokens or (16384 if settings.device.type == "cuda" else 4096)
        results.sweep, results.crossover = run_sweep(settings, most, options.sweep_budget_s)
    results.paper = paper_table()
    save()
    if options.accuracy:
        try:
            add_accuracy(settings, results, save)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    results.machine |= {"seconds": round(time.monotonic() - started, 1), "load_average_end": load_average()}
    save()
    seconds = results.machine["seconds"]
    say(f"{options.out / 'report.html'} and report.md, results.json beside it, after {seconds:.0f} s")
    return exit_code(results)


def add_accuracy(settings: Settings, results: Results, save: Callable[[], None]) -> None:
    """Adapts every mechanism and scores it; the report is written after each. Raises ValueError without a teacher."""
    # Only here: it brings deepspeed, which takes seconds and memory.
    from accuracy import measure_accuracy

    def keep(rows: list[AccuracyRow]) -> None:
        results.accuracy = rows
        save()

    options = settings.options
    results.machine["recipe"] = Path(options.recipe).stem
    mechanisms = [name for name in settings.mechanisms if name != NONE]
    folder = options.out / "accuracy"
    measure_accuracy(options.recipe, mechanisms, options.accuracy_images, folder, options.accuracy_set, keep)


def measure_rows(
    settings: Settings, results: Results, sizes: Sequence[ImageSize], started: float, save: Callable[[], None]
) -> None:
    """All rows of all resolutions, within the time budget but for the least number of rounds; saved after each."""
    by_size = {}
    for size in sizes:
        cases = [settings.case(name, size) for name in settings.mechanisms]
        new = [Row(c.mechanism, size[0], batch=c.batch, dtype=c.dtype, options=dict(c.options)) for c in cases]
        by_size[size] = {row.mechanism: row for row in new}
        results.rows += new
        measure_costs(settings, by_size[size], size)
    if not settings.options.no_memory:
        for size in sizes:
            say(f"memory at {size[0]} px, one process a case")
            measure_memories(settings, by_size[size], size)
    macs = [sum(row.gmacs or 0 for row in rows.values()) for rows in by_size.values()]
    for index, (size, rows) in enumerate(by_size.items()):
        say(f"times at {size[0]} px, {next(iter(rows.values())).tokens} tokens")
        later = [each / (macs[index] or 1.0) for each in macs[index + 1 :]]
        time_size(settings, rows, size, started + settings.options.time_budget_s, later)
        save()
    if settings.options.train:
        for size in sizes:
            say(f"training at {size[0]} px")
            train_size(settings, by_size[size], size, settings.options.time_budget_s / len(sizes))


def paper_table() -> list[dict[str, Any]]:
    """Our parameters and MACs of the network in the paper's table, whatever was measured: they need no clock."""
    network = Case("vit_large_patch16_224", {"init_values": 1e-5}, image_size=(512, 512))
    costs = {m: measure_cost(replace(network, mechanism=m, options=PAPER_OPTIONS.get(m, {}))) for m in MECHANISMS}
    return [{"mechanism": m, "parameters": cost.parameters, "gmacs": cost.macs / 1e9} for m, cost in costs.items()]


def exit_code(results: Results) -> int:
    """1 if a row is red or failed for another reason than memory."""
    rows = [*results.rows, *results.sweep]
    failed = any(row.error is not None and row.error_kind != OUT_OF_MEMORY for row in rows)
    failed |= any(row.train_error is not None and not row.train_error.startswith(OUT_OF_MEMORY) for row in results.rows)
    return int(failed or any(row.error is not None for row in results.accuracy))


def merged(earlier: Results, found: Results) -> Results:
    """The earlier report with everything that this run measured in its place.

    The conditions are those of the rows; a part that was measured under others says so in a note.
    """
    newest = found if found.rows else earlier
    notes = list(newest.notes)
    whole = replace(newest, machine=dict(newest.machine))
    for name in ("sweep", "crossover", "accuracy", "paper"):
        source = found if getattr(found, name) else earlier
        setattr(whole, name, getattr(source, name))
        if name in ("sweep", "accuracy") and source is not newest and getattr(source, name):
            began, m = f"{name} measured on ", source.machine
            of_found = f"{began}{m['date']}: {m['device']}, {m['threads']} threads, commit {m['commit'] or 'none'}"
            older = [note for note in earlier.notes if note.startswith(began)]
            notes = [note for note in notes if not note.startswith(began)]
            notes += [of_found] if source is found or not older else older
        if name == "accuracy" and "recipe" in source.machine:
            whole.machine["recipe"] = source.machine["recipe"]
    return replace(whole, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
