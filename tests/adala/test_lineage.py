"""Decisions about a stage from what lies there and what is asked for."""

from pathlib import Path

import pytest

from adala.lineage import START, decide, differing, refuse_changed
from adala.runs import OverwriteOrder, RunFolder, StageRecord

CONDITIONS = {"seed": 0, "stage2.steps": 10, "keep": (1,)}
ASKED = {"seed": 0, "stage2.steps": 10, "keep": [1], START: "sha256:a"}
ORDER = OverwriteOrder("order", [2], "today")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def begin(folder, **changes) -> None:
    folder.start_attempt(ASKED | changes)
    (folder.checkpoints / "step-00000002").mkdir(parents=True, exist_ok=True)
    (folder.checkpoints / "step-00000002" / "COMPLETE").touch()


def finish(folder, order: str | None = None, **changes) -> None:
    begin(folder, **changes)
    folder.finish(StageRecord(ASKED | changes, "sha256:student", {}, order))


def test_nothing_there_is_begun_in_its_place(run: RunFolder) -> None:
    for order in (None, ORDER):
        decision = decide(run, 2, CONDITIONS, "sha256:a", order)
        assert (decision.folder, decision.is_new, decision.replaces) == (run.stage(2), True, False)


def test_what_was_begun_is_gone_on_with(run: RunFolder) -> None:
    begin(run.stage(2))
    for order in (None, ORDER):
        decision = decide(run, 2, CONDITIONS, "sha256:a", order)
        assert (decision.folder, decision.is_new, decision.replaces) == (run.stage(2), False, False)


def test_more_steps_are_gone_on_with_and_fewer_are_refused(run: RunFolder) -> None:
    begin(run.stage(2))
    assert not decide(run, 2, {**CONDITIONS, "stage2.steps": 20}, "sha256:a", None).is_new
    with pytest.raises(ValueError, match=r"was begun with stage2.steps 10, this run has 5"):
        decide(run, 2, {**CONDITIONS, "stage2.steps": 5}, "sha256:a", None)


def test_a_finished_stage_of_which_more_steps_are_wanted_goes_on(run: RunFolder) -> None:
    finish(run.stage(2))
    longer = {**CONDITIONS, "stage2.steps": 20}
    refuse_changed(run, 2, longer)
    decision = decide(run, 2, longer, "sha256:a", None)
    assert (decision.folder, decision.is_new, decision.replaces) == (run.replacement(2), True, True)
    assert decision.continues and "finished after 10 steps, of which 20 are wanted" in decision.reason
    # From another student there is nothing to go on with, and an order to run it again is one to begin anew.
    for start, order in (("sha256:b", None), ("sha256:a", ORDER)):
        decision = decide(run, 2, longer, start, order)
        assert decision.is_new and not decision.continues
    (run.stage(2).checkpoints / "step-00000002" / "COMPLETE").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint left to go on from"):
        decide(run, 2, longer, "sha256:a", None)
    begin(run.replacement(2), **{"stage2.steps": 20})
    assert not decide(run, 2, longer, "sha256:a", None).is_new
    with pytest.raises(ValueError, match=r"was finished with stage2.steps 10, this run has 5"):
        decide(run, 2, {**CONDITIONS, "stage2.steps": 5}, "sha256:a", None)


def test_what_goes_on_leaves_the_finished_stage_as_it_is(run: RunFolder) -> None:
    finish(run.stage(2))
    (run.stage(2).path / "metrics.jsonl").write_text("1\n")
    (run.stage(2).path / "student.safetensors").write_text("weights")
    run.replacement(2).begin_as(run.stage(2))
    new = run.replacement(2)
    assert new.has_checkpoint() and new.record() is None and new.attempt() is None
    with (new.path / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    (new.checkpoints / "step-00000002" / "COMPLETE").unlink()
    assert run.stage(2).has_checkpoint() and (run.stage(2).path / "metrics.jsonl").read_text() == "1\n"
    assert not (new.path / "student.safetensors").exists()


def test_an_attempt_without_a_checkpoint_is_begun_anew_under_other_conditions(run: RunFolder) -> None:
    run.stage(2).start_attempt(ASKED)
    refuse_changed(run, 2, {**CONDITIONS, "seed": 5})
    decision = decide(run, 2, {**CONDITIONS, "seed": 5}, "sha256:a", None)
    assert (decision.folder, decision.is_new, decision.replaces) == (run.stage(2), True, False)
    assert not decide(run, 2, CONDITIONS, "sha256:a", None).is_new


def test_a_finished_stage_is_left_alone(run: RunFolder) -> None:
    finish(run.stage(2))
    assert decide(run, 2, CONDITIONS, "sha256:a", None).folder is None


def test_a_finished_stage_is_stale_when_its_start_changed(run: RunFolder) -> None:
    finish(run.stage(2))
    decision = decide(run, 2, CONDITIONS, "sha256:b", None)
    assert (decision.folder, decision.is_new, decision.replaces) == (run.replacement(2), True, True)
    assert "stale" in decision.reason
    begin(run.replacement(2), **{START: "sha256:b"})
    assert not decide(run, 2, CONDITIONS, "sha256:b", None).is_new
    assert decide(run, 2, CONDITIONS, "sha256:c", None).is_new


@pytest.mark.parametrize("end", [begin, finish])
def test_conditions_that_the_user_changed_are_refused_by_name(run: RunFolder, end) -> None:
    end(run.stage(2))
    changed = {**CONDITIONS, "seed": 5}
    for start in ("sha256:a", "sha256:b"):
        with pytest.raises(ValueError, match="seed 0, this run has 5: set it back"):
            decide(run, 2, changed, start, None)
    with pytest.raises(ValueError, match="seed 0, this run has 5"):
        refuse_changed(run, 2, changed)
    refuse_changed(run, 2, CONDITIONS)
    decision = decide(run, 2, changed, "sha256:a", ORDER)
    assert (decision.folder, decision.is_new, decision.replaces) == (run.replacement(2), True, True)


def test_an_order_to_overwrite_is_carried_out_once(run: RunFolder) -> None:
    finish(run.stage(2))
    decision = decide(run, 2, CONDITIONS, "sha256:a", ORDER)
    assert (decision.folder, decision.is_new, decision.replaces) == (run.replacement(2), True, True)
    begin(run.replacement(2))
    decision = decide(run, 2, CONDITIONS, "sha256:a", ORDER)
    assert (decision.folder, decision.is_new) == (run.replacement(2), False)
    finish(run.replacement(2), ORDER.id)
    run.install(2)
    assert decide(run, 2, CONDITIONS, "sha256:a", ORDER).folder is None
    # A stage before it was run again meanwhile, or the recipe changed under the same order.
    assert decide(run, 2, CONDITIONS, "sha256:b", ORDER).is_new
    assert decide(run, 2, {**CONDITIONS, "seed": 1}, "sha256:a", ORDER).is_new


def test_differing_names_both_what_is_new_and_what_is_gone() -> None:
    assert differing({"a": 1, "b": 2}, {"a": 1, "c": 3}) == ["c", "b"]
