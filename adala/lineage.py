"""Whether a stage is run, gone on with, left alone or refused: what it came from against what is asked for now."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adala.runs import OverwriteOrder, RunFolder, StageFolder

START = "the student it starts from"


@dataclass(frozen=True)
class Decision:
    """What is to be done about a stage.

    Attributes:
        folder: Where it is trained; None where it is left alone.
        is_new: Whether what lies in ``folder`` is no part of this and has to go first.
        replaces: Whether an earlier result stays in its place until this one is complete.
        reason: In words, for people.
        continues: Whether a new ``folder`` begins with the checkpoints of what it replaces.
    """

    folder: StageFolder | None
    is_new: bool
    replaces: bool
    reason: str
    continues: bool = False


def decide(
    run: RunFolder,
    number: int,
    conditions: Mapping[str, Any],
    start: str,
    order: OverwriteOrder | None,
) -> Decision:
    """What to do about a stage of a run; rank 0 calls it, and tells the others.

    Args:
        run: Its folder.
        number: The stage.
        conditions: Everything that decides its result but where it starts from; see :class:`adala.plan.StagePlan`.
        start: Digest of the student that it would start from.
        order: Under which it may be run again although it is finished.

    Raises:
        ValueError: It was finished, or begun, under other conditions, and nobody asked to overwrite it.
    """
    asked = _as_json({**conditions, START: start})
    final, new = run.stage(number), run.replacement(number)
    record, reason, continues = final.record(), "not begun", False
    if record is not None:
        changed = differing(record.conditions, asked, may_grow=_steps_key(number))
        if changed and order is None:
            refuse_unless_upstream(run, number, changed, record.conditions, asked, "finished")
        is_wanted = not changed and (order is None or record.overwrite == order.id)
        if is_wanted and not differing(record.conditions, asked):
            return Decision(None, False, False, "finished already, from the same student, teacher, recipe and data")
        continues = is_wanted
        reason = _reason_to_run_again(number, record.conditions, asked, continues, order)
    for folder in (new, final) if record is None else (new,):
        attempt = folder.attempt()
        if attempt is not None and not differing(attempt, asked, may_grow=_steps_key(number)):
            begun = "begun and not finished" if record is None else f"{reason}, and begun already"
            return Decision(folder, False, folder is new, f"{begun}: going on with it")
    begun = final.attempt() if record is None and final.has_checkpoint() else None
    if begun is None:
        if continues:
            _refuse_without_checkpoint(final, number)
        return Decision(final if record is None else new, True, record is not None, reason, continues)
    if order is None:
        changed = differing(begun, asked, may_grow=_steps_key(number))
        refuse_unless_upstream(run, number, changed, begun, asked, "begun")
    return Decision(new, True, True, f"begun under other conditions ({differing(begun, asked)[0]}): begun anew")


def _reason_to_run_again(
    number: int, before: Mapping[str, Any], now: Mapping[str, Any], continues: bool, order: OverwriteOrder | None
) -> str:
    if continues:
        steps = _steps_key(number)
        return f"finished after {before[steps]} steps, of which {now[steps]} are wanted now: going on with it"
    return "run again, as --overwrite says" if order else f"stale, since {START} has changed: run again"


def differing(before: Mapping[str, Any], now: Mapping[str, Any], may_grow: str | None = None) -> list[str]:
    """The conditions that differ, in the order of ``now``; ``may_grow`` does not where it is larger now."""
    keys = list(dict.fromkeys([*now, *before]))
    found = [key for key in keys if before.get(key) != now.get(key)]
    if may_grow in found and (before.get(may_grow) or 0) < (now.get(may_grow) or 0):
        found.remove(may_grow)
    return found


def refuse_changed(run: RunFolder, number: int, conditions: Mapping[str, Any]) -> None:
    """Refuses a stage that was finished, or begun, under other conditions than these; wherever it would start from.

    Raises:
        ValueError: See :func:`refuse_unless_upstream`.
    """
    asked, record = _as_json(conditions), run.stage(number).record()
    begun = run.stage(number).attempt() if run.stage(number).has_checkpoint() else None
    before, was = (record.conditions, "finished") if record else (begun, "begun")
    if before is not None:
        refuse_unless_upstream(run, number, differing(before, asked, may_grow=_steps_key(number)), before, asked, was)


def _refuse_without_checkpoint(folder: StageFolder, number: int) -> None:
    """More steps of a finished stage go on from its last checkpoint.

    Raises:
        ValueError: There is none.
    """
    if not folder.has_checkpoint():
        raise ValueError(
            f"stage {number} in {folder.path} has no checkpoint left to go on from with more steps: set "
            f"{_steps_key(number)} back, or add --overwrite to run the stage anew"
        )


def refuse_unless_upstream(
    run: RunFolder, number: int, changed: list[str], before: Mapping[str, Any], now: Mapping[str, Any], was: str
) -> None:
    """Refuses conditions that the user changed; a student that an earlier stage changed is no mistake.

    Raises:
        ValueError: The message names the first condition that differs, and both values.
    """
    own = [key for key in changed if key != START]
    if own:
        key = own[0]
        raise ValueError(
            f"stage {number} of {run.path} was {was} with {key} {before.get(key)!r}, this run has {now.get(key)!r}: "
            "set it back, choose another --run_name, or add --overwrite to run the stage anew"
        )


def _steps_key(number: int) -> str:
    return f"stage{number}.steps"


def _as_json(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """As a file gives it back: tuples are lists there."""
    return json.loads(json.dumps(conditions))
