"""What the memory planner says: tables, a verdict for each stage, and the same as JSON."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from adala.memory.planner import CONTEXT_BYTES, FRAGMENTATION, GIB, BatchChange, Demand, StageReport
from adala.memory.tracing import Line

RESERVE = f"{FRAGMENTATION:.0%} for fragmentation and {CONTEXT_BYTES / GIB:.0f} GiB for the CUDA context (assumed)"


def print_reports(reports: Sequence[StageReport], gpu_gib: float) -> None:
    """Prints a table and a verdict for each stage."""
    console = Console(width=118)
    for report in reports:
        console.print(_table(report))
        for sentence in verdict(report, gpu_gib):
            console.print(sentence, highlight=False, soft_wrap=True)
        console.print()
    console.print(
        "GiB a GPU. 'saved' is what an image holds for the backward pass, 'working' what comes beside it; 'largest' is "
        f"the micro-batch that fits, 'needs' all that it takes, with {RESERVE}; 'GB sent' is what a GPU sends in a "
        "step. How close that came on a GPU: docs/MEMORY.md.",
        highlight=False,
        soft_wrap=True,
    )


def _table(report: StageReport) -> Table:
    plan = report.plan
    height, width = plan.data.view.image_size
    table = Table(
        title=f"{report.steps}, {plan.kind.title}: {height} x {width} px, {plan.model.precision.precision}, "
        f"{report.images} images of a global batch on each of {report.gpus} GPUs",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    headings = ("ZeRO", "ckpt", "teacher", "student", "masters", "grads", "AdamW", "buckets", "saved", "working",
                "largest", "needs", "GB sent")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for demand in report.demands:
        table.add_row(*_row(demand))
    return table


def _row(demand: Demand) -> Iterator[str]:
    states, passes = demand.states, demand.passes
    yield str(demand.config.zero_stage)
    yield "yes" if demand.checkpointing else "no"
    weights = states.student + states.gathered
    masters = states.masters + states.average
    for size in (states.teacher, weights, masters, states.gradients, states.moments, states.buckets):
        yield f"{size / GIB:.2f}"
    yield f"{passes.saved.per_image / GIB:.3f}"
    yield f"{(passes.peak.per_image - passes.saved.per_image) / GIB:.3f}"
    yield str(demand.largest or "none")
    yield f"{demand.total(demand.largest or 1) / GIB:.1f}"
    yield f"{(demand.traffic.gradients + demand.traffic.weights) / 1e9:.1f}"


def verdict(report: StageReport, gpu_gib: float) -> Iterator[str]:
    """What to do about a stage, in a sentence or two."""
    number = report.plan.number
    for change in report.changes:
        yield batch_sentence(report, change)
    best = report.best
    if best is None:
        least = min(report.demands, key=lambda demand: demand.total(1))
        yield (
            f"{report.steps}: nothing fits into {gpu_gib:g} GiB; one image needs {least.total(1) / GIB:.1f} at least "
            f"({least.config.name}, activation_checkpointing {_yaml(least.checkpointing)}): take more GPUs, GPUs with "
            f"more memory, a smaller image size (--stage{number}.image_size) or a smaller teacher."
        )
        return
    yield _as_it_stands(report, gpu_gib)
    if report.from_step:
        yield (
            f"The largest that fits from step {report.from_step} on: micro_batch_size {best.largest} in "
            f"stage{number}.image_sizes, with activation_checkpointing {_yaml(best.checkpointing)}, {best.config.name}"
        )
        return
    yield f"The largest that fits: {command_line(report, best)}"


def _as_it_stands(report: StageReport, gpu_gib: float) -> str:
    """Whether the recipe's own setting fits, in a sentence."""
    plan, asked, chosen = report.plan, report.as_it_stands, report.chosen
    if chosen is None:
        return (
            f"{report.steps}: micro_batch_size {plan.config.micro_batch_size} does not divide the {report.images} "
            "images of a GPU."
        )
    setting = (
        f"micro_batch_size {chosen}, activation_checkpointing {_yaml(asked.checkpointing)}, {asked.config.name}: "
        f"{asked.total(chosen) / GIB:.1f} of {gpu_gib:g} GiB"
    )
    if not asked.fits(chosen):
        return f"{report.steps} does not fit as it stands: {setting}."
    return (
        f"{report.steps} fits as it stands: {setting}, {report.images // chosen} micro-batch(es) a step, "
        f"{report.checkpoint_bytes[asked.config.name] / 1e9:.1f} GB a checkpoint."
    )


def command_line(report: StageReport, demand: Demand) -> str:
    """What to put on the command line for a setting with the largest micro-batch that fits."""
    name = f"--stage{report.plan.number}"
    return (
        f"{name}.micro_batch_size {demand.largest} {name}.activation_checkpointing {_yaml(demand.checkpointing)} "
        f"--ds_config {demand.config.name}"
    )


def batch_sentence(report: StageReport, change: BatchChange) -> str:
    """The rule for more GPUs than the global batch divides into, with its numbers."""
    number, config = report.plan.number, report.plan.config
    head = f" --stage{number}.head_lr {change.head_lr:.3g}" if change.head_lr else ""
    return (
        f"Stage {number}: {config.global_batch_size} images of a global batch do not divide into {change.gpus} GPUs: "
        f"raise it to a multiple of them, and the rate by the square root of the factor, a common heuristic for AdamW "
        f"(arXiv 2205.10287): --stage{number}.global_batch_size {change.global_batch_size} --stage{number}.lr "
        f"{change.lr:.3g}{head}"
    )


def _yaml(value: bool) -> str:
    return "true" if value else "false"


def reports_as_json(reports: Sequence[StageReport], gpu_gib: float) -> str:
    """The same as JSON; bytes unless a name says otherwise."""
    document = {
        "gpu_gib": gpu_gib,
        "reserve": {"fragmentation": FRAGMENTATION, "context_bytes": CONTEXT_BYTES},
        "stages": [_stage_document(report, gpu_gib) for report in reports],
    }
    return json.dumps(document, indent=2)


def _stage_document(report: StageReport, gpu_gib: float) -> dict[str, Any]:
    best = report.best
    return {
        "stage": report.plan.number,
        "from_step": report.from_step,
        "image_size": list(report.plan.data.view.image_size),
        "gpus": report.gpus,
        "images_per_gpu": report.images,
        "parameters": vars(report.counts),
        "fits_as_it_stands": report.stands,
        "micro_batch_size": report.chosen,
        "command_line": command_line(report, best) if best else None,
        "verdict": list(verdict(report, gpu_gib)),
        "batch_changes": [vars(change) for change in report.changes],
        "settings": [_demand_document(report, demand) for demand in report.demands],
    }


def _demand_document(report: StageReport, demand: Demand) -> dict[str, Any]:
    passes = demand.passes
    return {
        "ds_config": demand.config.name,
        "zero_stage": demand.config.zero_stage,
        "activation_checkpointing": demand.checkpointing,
        **vars(demand.states),
        "saved_activations": _line_document(passes.saved),
        "peak_of_forward_and_backward": _line_document(passes.peak),
        "peak_of_teacher": _line_document(passes.teacher),
        "largest_micro_batch_size": demand.largest,
        "needs": demand.total(demand.largest or 1),
        "checkpoint": report.checkpoint_bytes[demand.config.name],
        "sent_per_step": vars(demand.traffic),
    }


def _line_document(line: Line) -> dict[str, float]:
    return {"fixed": round(line.fixed), "per_image": round(line.per_image)}
