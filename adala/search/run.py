"""A run's search: after Stage 1, from there on in ``search.json``, and gone on with where more blocks are wanted."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from adala.budget import HybridMacs
from adala.build import Start, build_evaluation_loader, build_teacher
from adala.distributed import device, from_rank_0, say
from adala.export import load_student
from adala.files import read_json, write_json
from adala.hybrids import ERROR, Choice, HybridMeter, Step, choose_greedily
from adala.plan import SearchPlan, StagePlan
from adala.runs import RunFolder

# Images of a forward pass, whatever the recipe's evaluations have: how batches are cut reaches the last digits.
BATCH_SIZE = 16
STUDENT = "the student that is searched"


@dataclasses.dataclass(frozen=True)
class Search:
    """What a run's search has found.

    Attributes:
        choice: Its steps, as many as the budget pays for.
        is_new: Whether anything had to be measured for it.
    """

    choice: Choice
    is_new: bool

    @property
    def blocks(self) -> list[int]:
        """The blocks that keep softmax attention, by number."""
        return self.choice.blocks


def search_run(run: RunFolder, stage: StagePlan, start: Start) -> Search:
    """Chooses blocks of the student that ``start`` names, or reads what was chosen before; every rank calls it.

    What is written after every step is the order so far, whatever the budget. A search that was interrupted, or wants
    more blocks than an earlier one, goes on from there; one of another student, or under other conditions, begins anew.

    Args:
        run: Its folder.
        stage: One whose student a search decides on.
        start: A student all of whose blocks are linearized and aligned.

    Raises:
        ValueError: Images that cannot be read.
        Interrupted: The run was asked to end.
    """
    count, conditions = stage.search.count, {**stage.search.conditions, STUDENT: start.digest}
    # As a file gives it back: tuples are lists there.
    conditions = json.loads(json.dumps(conditions))
    known = from_rank_0(partial(_read_choice, run, conditions))
    is_new = known is None or len(known.steps) < count
    if is_new:
        known = _measure(run, stage, start, known, conditions)
    return Search(dataclasses.replace(known, steps=known.steps[:count]), is_new)


def _read_choice(run: RunFolder, conditions: Mapping[str, Any]) -> Choice | None:
    """What was chosen under just these conditions."""
    stored = read_json(run.search)
    if stored is None:
        return None
    changed = [key for key, value in conditions.items() if stored["conditions"].get(key) != value]
    if changed:
        say(f"{run.search} is stale, since {changed[0]} has changed: searching again")
        return None
    choice = stored["choice"]
    return Choice(**{**choice, "steps": [Step(**step) for step in choice["steps"]]})


def _measure(
    run: RunFolder, stage: StagePlan, start: Start, known: Choice | None, conditions: dict[str, Any]
) -> Choice:  # fmt: skip
    plan = stage.search
    say(
        f"searching {plan.count} blocks for softmax attention in {start.origin}, on {plan.images} images of "
        f"{' x '.join(map(str, plan.data.view.image_size))} pixels"
    )
    teacher = build_teacher(stage.model.teacher)
    student = load_student(start.folder).to(device())
    data = dataclasses.replace(plan.data, evaluation_batch_size=BATCH_SIZE)
    # All of them on every rank, which takes its share of the batches: on any number of ranks these are the same.
    loader = build_evaluation_loader(data, plan.training, plan.images, alone=True)
    meter = HybridMeter(student, teacher, (batch["image"] for batch in loader))
    if known is None:
        known = Choice(meter.images, meter.image_size, meter.measure_one({}))
    for step in choose_greedily(meter.options, plan.count, meter.measure, known.steps):
        say(_describe(known, step, plan.macs))
        known = dataclasses.replace(known, steps=[*known.steps, step])
        from_rank_0(partial(_write_choice, run, plan, known, conditions))
    return known


def _describe(before: Choice, step: Step, macs: HybridMacs) -> str:
    """What a step gained and cost, in words."""
    earlier = before.steps[-1].metrics if before.steps else before.before
    hybrid = before.hybrid(len(before.steps))
    gains = [
        f"{name.replace('_', ' ')} {earlier[name]:.4f} -> {step.metrics[name]:.4f}" for name in (ERROR, "patch_cosine")
    ]
    shares = [f"{float(100 * macs.share(of)):.2f} %" for of in (hybrid, {**hybrid, step.block: step.mechanism})]
    return (
        f"block {step.block} keeps {step.mechanism}: {', '.join(gains)}, {' -> '.join(shares)} of the teacher's "
        f"multiply-accumulates at {' x '.join(map(str, macs.image_size))} pixels"
    )


def _write_choice(run: RunFolder, plan: SearchPlan, choice: Choice, conditions: dict[str, Any]) -> None:
    content = {"order": [step.block for step in choice.steps], "conditions": conditions}
    write_json(run.search, {**content, "macs": dataclasses.asdict(plan.macs), "choice": dataclasses.asdict(choice)})
