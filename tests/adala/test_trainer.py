"""The loop under the real engine: rates, random numbers, skipped steps, evaluation on unequal ranks, resume."""

import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from tiny_run import write_tiny_recipe
from tiny_stage import build_trainer

from adala import preemption
from adala.checkpoint import complete_checkpoints
from adala.distributed import SharedError, rank
from adala.metrics import read_metrics
from adala.preemption import Preempted
from adala.trainer import OnItsWay, Trainer


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def fit(recipe: Path, number: int, *overrides: str) -> dict[str, float]:
    return build_trainer(recipe, number, overrides).fit()


def steps_of(recipe: Path, split: str = "train") -> list[dict[str, float]]:
    return read_metrics(recipe.parent, split)


def test_the_rate_warms_up_and_falls_to_min_lr(recipe: Path) -> None:
    """Five steps from 0, of which two warm up: half the peak, the peak, then a cosine from peak to floor."""
    overrides = ["--stage2.steps=5", "--stage2.warmup_steps=2", "--stage2.lr=0.01", "--stage2.min_lr=0.004"]
    on_ranks(1, fit, recipe, 2, *overrides)
    falling = [0.004 + 0.006 * (1 + math.cos(math.pi * step / 3)) / 2 for step in (0, 1, 2)]
    assert [row["lr"] for row in steps_of(recipe)] == pytest.approx([0.005, 0.01, *falling])


def moved_by_one_step(recipe: Path, number: int, *overrides: str) -> dict[str, float]:
    trainer = build_trainer(recipe, number, [f"--stage{number}.steps=3", *overrides])
    before = trainer.engine.full_state()
    trainer.train_step(iter(trainer.build_loader(trainer._resume())))
    after = trainer.engine.full_state()
    return {name: float((value - before[name]).abs().max()) for name, value in after.items()}


def test_the_first_step_moves_weights_by_the_rate(recipe: Path) -> None:
    """Adam's first step is the rate wherever the gradient is not near zero, here a half of it in the warm-up."""
    overrides = ["--stage3.lr=0.001", "--stage3.warmup_steps=2", "--stage3.head_lr=0.03"]
    ((moved),) = on_ranks(1, moved_by_one_step, recipe, 3, *overrides)
    assert moved["student.blocks.0.mlp.fc1.weight"] == pytest.approx(0.0005, rel=1e-2)
    assert moved["head.linear.weight"] == pytest.approx(0.015, rel=1e-2)
    assert moved["head.linear.bias"] == pytest.approx(0.015, rel=1e-2)


def test_without_a_rate_of_its_own_the_head_moves_like_the_rest(recipe: Path) -> None:
    ((moved),) = on_ranks(1, moved_by_one_step, recipe, 3, "--stage3.lr=0.001", "--stage3.warmup_steps=0")
    assert moved["head.linear.weight"] == pytest.approx(0.001, rel=1e-2)


def test_what_stage2_freeze_names_stays_as_it_is(recipe: Path) -> None:
    ((moved),) = on_ranks(1, moved_by_one_step, recipe, 2, '--stage2.freeze=["patch_embed.*", "blocks.1.*"]')
    still = {name for name, by in moved.items() if by == 0 and not name.endswith("attn.qkv.bias")}
    named = {name for name in moved if name.startswith(("student.patch_embed.", "student.blocks.1."))}
    assert still == {name for name in named if not name.endswith("attn.qkv.bias")} != set()


def draws(recipe: Path, *overrides: str) -> list[float]:
    """What a stage would draw in each of its forward passes."""
    trainer, drawn = build_trainer(recipe, 2, overrides), []
    trainer.evaluation_loaders = {}
    trainer.engine.module.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(()).item()))
    trainer.fit()
    return drawn


def test_every_step_and_rank_draws_its_own_random_numbers(recipe: Path) -> None:
    first, second = on_ranks(2, draws, recipe, "--stage2.save_every=2", "--stage2.global_batch_size=4")
    assert len(first) == len(second) == 4
    assert len({*first, *second}) == 8
    last = complete_checkpoints(recipe.parent / "checkpoints")[-1]
    (last / "COMPLETE").unlink()
    assert on_ranks(2, draws, recipe, "--stage2.global_batch_size=4") == [first[2:], second[2:]], "after a resume too"


def test_another_seed_draws_other_random_numbers(recipe: Path) -> None:
    overrides = ["--stage2.steps=2", "--stage2.warmup_steps=0"]
    (one,) = on_ranks(1, draws, recipe, *overrides)
    shutil.rmtree(recipe.parent / "checkpoints")
    (other,) = on_ranks(1, draws, recipe, "--seed=1", *overrides)
    assert len({*one, *other}) == 4


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Gives the gradients of these steps, counted from 0, a NaN on the last rank alone."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        is_last = rank() == torch.distributed.get_world_size() - 1
        return gradient * (math.nan if is_last and trainer.step in steps else 1.0)

    trainer.engine.module.student.norm.weight.register_hook(spoil)


def fit_poisoned(recipe: Path, steps: set[int], *overrides: str) -> str:
    trainer = build_trainer(recipe, 2, ["--stage2.steps=6", "--stage2.max_skipped_steps=3", *overrides])
    poison(trainer, steps)
    try:
        trainer.fit()
    except SharedError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_skipped_steps_in_a_row_stop_the_run(recipe: Path, ranks: int) -> None:
    for said in on_ranks(ranks, fit_poisoned, recipe, {1, 2, 3, 4, 5}):
        assert said.startswith("step 4: the gradients of 3 steps in a row were not finite, and the weights were left")
    assert [row.get("skipped_steps") for row in steps_of(recipe)] == [None, 1, 2]
    assert complete_checkpoints(recipe.parent / "checkpoints") == []


def test_skipped_steps_that_are_not_in_a_row_do_not(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    assert on_ranks(1, fit_poisoned, recipe, {0, 1, 3, 4}) == ["finished"]
    rows = steps_of(recipe)
    assert [row.get("skipped_steps") for row in rows] == [1, 2, None, 1, 2, None]
    assert ["gradient_norm" in row for row in rows] == ["skipped_steps" not in row for row in rows]
    assert capfd.readouterr().out.count("skipped, its gradient is not finite") == 4


def test_skipped_steps_are_counted_across_a_resume(recipe: Path) -> None:
    assert on_ranks(1, fit_poisoned, recipe, {1, 2}, "--stage2.steps=3") == ["finished"]
    (said,) = on_ranks(1, fit_poisoned, recipe, {3})
    assert said.startswith("step 4: the gradients of 3 steps in a row")


UNEQUAL = ["--evaluation.monitor_samples=13", "--evaluation.batch_size=6"]


def evaluate(recipe: Path) -> tuple[dict[str, float], int]:
    """The metrics, and how many forward passes it took."""
    trainer, passes = build_trainer(recipe, 3, UNEQUAL), []
    trainer.engine.module.register_forward_pre_hook(lambda *_: passes.append(1))
    return trainer.evaluate(), len(passes)


def test_ranks_with_fewer_batches_evaluate_along_and_count_nothing_twice(recipe: Path) -> None:
    """13 samples: one rank has 7, two batches, the other 6, which are one batch; it repeats that, uncounted."""
    ((alone, passes),) = on_ranks(1, evaluate, recipe)
    assert passes == 3
    (first, passes_first), (second, passes_second) = on_ranks(2, evaluate, recipe)
    assert passes_first == passes_second == 2
    assert first == second == pytest.approx(alone, rel=1e-5)
    assert (recipe.parent / "metrics.jsonl").read_text().count('"val"') == 2, "rank 0 alone writes"


def nothing_usable(recipe: Path) -> str:
    trainer = build_trainer(recipe, 2)
    if rank() == 1:
        trainer.evaluation_loaders = {"": []}
    try:
        trainer.evaluate()
    except SharedError as error:
        return str(error)


def test_a_rank_without_a_usable_sample_is_told_by_all(recipe: Path) -> None:
    assert (
        on_ranks(2, nothing_usable, recipe)
        == ["a rank found no usable held-out sample: name other shards in data.val"] * 2
    )


SIZES = "[{from_step: 2, image_size: [8, 12], micro_batch_size: 2}, {from_step: 5, image_size: [24, 24]}]"
SIZED = [
    f"--stage2.image_sizes={SIZES}", "--stage2.steps=7", "--stage2.save_every=1", "--stage2.keep_last=9",
    "--stage2.augmentation=crop", "--stage2.ema=0.9", "--data.shuffle_buffer=4",
]  # fmt: skip


def fit_sizes(recipe: Path) -> list[tuple]:
    """Of every training batch the step, the shape of its images and the samples in it."""
    trainer, seen = build_trainer(recipe, 2, SIZED), []

    def note(module: torch.nn.Module, inputs: tuple) -> None:
        if module.training:
            seen.append((trainer.step, tuple(inputs[0]["image"].shape), tuple(inputs[0]["id"])))

    trainer.engine.module.register_forward_pre_hook(note)
    trainer.fit()
    return seen


def test_image_sizes_change_at_their_steps_and_after_a_resume(recipe: Path) -> None:
    """40 samples, 8 a step: the first epoch ends with step 4, within the second size."""
    whole = on_ranks(2, fit_sizes, recipe)
    shapes = {0: (4, 3, 16, 16), 2: (2, 3, 8, 12), 5: (4, 3, 24, 24)}
    for of_rank in whole:
        assert [step for step, *_ in of_rank] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 6]
        assert all(shape == shapes[max(s for s in shapes if s <= step)] for step, shape, _ in of_rank)
    epoch = [sample for of_rank in whole for step, _, ids in of_rank if step < 5 for sample in ids]
    assert len(epoch) == len(set(epoch)) == 40, "other sizes take nothing out of the epoch"
    curve = [row["loss"] for row in steps_of(recipe)]
    evaluated = steps_of(recipe, "val")[-1]
    saved = recipe.parent / "saved"
    (recipe.parent / "checkpoints").rename(saved)
    for step in (2, 3):
        shutil.copytree(saved / f"step-{step:08d}", recipe.parent / f"checkpoints/step-{step:08d}")
        for of_rank, of_whole in zip(on_ranks(2, fit_sizes, recipe), whole, strict=True):
            assert of_rank == [batch for batch in of_whole if batch[0] >= step]
        assert [row["loss"] for row in steps_of(recipe)][step - 7 :] == curve[step:]
        assert steps_of(recipe, "val")[-1]["relative_error"] == evaluated["relative_error"], "of the average"
        shutil.rmtree(recipe.parent / "checkpoints")


def test_it_evaluates_logs_and_saves_when_it_is_due(recipe: Path) -> None:
    due = ["--stage2.log_every=3", "--stage2.evaluate_every=2", "--stage2.save_every=3", "--stage2.steps=7"]
    ((metrics),) = on_ranks(1, fit, recipe, 2, *due)
    assert [row["step"] for row in steps_of(recipe)] == [3, 6, 7]
    evaluations = steps_of(recipe, "val")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6, 7]
    assert {name: evaluations[-1][name] for name in metrics} == metrics
    kept = complete_checkpoints(recipe.parent / "checkpoints")
    assert [path.name for path in kept] == ["step-00000006", "step-00000007"], "the last two"
    state = json.loads((kept[-1] / "trainer.json").read_text())
    assert (state["step"], state["world_size"], state["zero_stage"], state["skipped_in_a_row"]) == (7, 1, 1, 0)


def fit_with_losses(recipe: Path, *overrides: str) -> list[float]:
    """The loss of every micro-batch, as the engine gave it."""
    trainer, losses = build_trainer(recipe, 2, overrides), []
    trainer.evaluation_loaders = {}
    trainer.engine.module.register_forward_hook(lambda *given: losses.append(given[-1]["loss"].item()))
    trainer.fit()
    return losses


def test_logged_losses_are_means_over_ranks_and_micro_batches(recipe: Path) -> None:
    first, second = on_ranks(2, fit_with_losses, recipe, "--stage2.micro_batch_size=2", "--stage2.steps=2")
    assert len(first) == len(second) == 4
    expected = [sum(first[at : at + 2] + second[at : at + 2]) / 4 for at in (0, 2)]
    assert [row["loss"] for row in steps_of(recipe)] == pytest.approx(expected, rel=1e-6)


def skip_non_finite(recipe: Path, spoilt: str) -> tuple[str, bool]:
    """What is said of a step with a loss, or another metric, that is not finite on a rank; whether weights moved."""
    trainer = build_trainer(recipe, 2, ["--stage2.max_skipped_steps=1"])
    trainer.engine.module.register_forward_hook(
        lambda _, __, losses: losses | ({spoilt: losses[spoilt] * math.inf} if rank() == 1 else {})
    )
    before = trainer.engine.full_state()
    loader = trainer.build_loader(trainer._resume())
    trainer.train_step(iter(loader))
    with pytest.raises(SharedError) as raised:
        trainer.read_steps(loader)
    after = trainer.engine.full_state()
    return str(raised.value), any(not torch.equal(value, before[name]) for name, value in after.items())


def test_a_loss_that_is_not_finite_on_one_rank_leaves_the_weights_alone_on_all(recipe: Path) -> None:
    said = on_ranks(2, skip_non_finite, recipe, "loss")
    assert said[0][0] == said[1][0] and said[0][0].startswith(
        "step 1: the gradients of 1 steps in a row were not finite"
    )
    assert "it begins in the loss, in the forward pass, on rank 1: lower" in said[0][0]
    assert [moved for _, moved in said] == [False, False]


def test_another_metric_that_is_not_finite_stops_the_run(recipe: Path) -> None:
    said = on_ranks(2, skip_non_finite, recipe, "relative_error")
    assert said[0][0] == said[1][0] and said[0][0].startswith(
        "step 1: relative_error not finite; the last checkpoint is"
    )
    assert said[0][1], "nothing is wrong with the gradient"


def test_what_steps_measured_is_read_when_it_is_logged(recipe: Path) -> None:
    """Skipped steps between two lines are counted one by one, and the line is about the last step."""
    assert on_ranks(1, fit_poisoned, recipe, {1, 2}, "--stage2.log_every=6") == ["finished"]
    (row,) = steps_of(recipe)
    every = recipe.parent / "every"
    every.mkdir()
    assert on_ranks(1, fit_poisoned, write_tiny_recipe(every), {1, 2}) == ["finished"]
    last = steps_of(every / "recipe.yaml")[-1]
    timed = ("time_s", "images_per_s", "peak_memory_mib")
    assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in last.items() if k not in timed}


def test_a_step_that_is_wrong_between_two_lines_is_told_by_its_number(recipe: Path) -> None:
    (said,) = on_ranks(1, fit_poisoned, recipe, {1, 2, 3}, "--stage2.log_every=6")
    assert said.startswith("step 4: the gradients of 3 steps in a row were not finite")
    assert steps_of(recipe) == []


def reductions_of_a_step(recipe: Path) -> tuple[int, int]:
    """How often the project's own code waits for a device's value or reduces over ranks in an optimizer step."""
    trainer = build_trainer(recipe, 2, ["--stage2.micro_batch_size=2", "--stage2.log_every=100"])
    batches, counted = iter(trainer.build_loader(trainer._resume())), {"reduced": 0, "read": 0}
    trainer.train_step(batches)

    def counting(name: str, function: Callable) -> Callable:
        def call(*given, **named):
            # DeepSpeed reads its gradient norm and overflow flag by itself.
            caller = sys._getframe(1).f_code.co_filename
            counted[name] += f"{os.sep}adala{os.sep}" in caller
            return function(*given, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", counting("reduced", torch.distributed.all_reduce))
        for method in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, method, counting("read", getattr(torch.Tensor, method)))
        trainer.train_step(batches)
    return counted["reduced"], counted["read"]


def test_a_step_reduces_once_and_waits_for_no_value(recipe: Path) -> None:
    assert on_ranks(2, reductions_of_a_step, recipe) == [(1, 0)] * 2


def test_on_a_gpu_the_question_is_read_once_its_answer_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that the device is through with; on a CPU of the step just taken."""
    asked = [OnItsWay(torch.tensor([end, 0.0, 0.0])) for end in [0.0, 1.0, *[0.0] * 7]]
    for kind, expected in (("cpu", [False, True]), ("cuda", [False])):
        monkeypatch.setattr("adala.trainer.device", lambda kind=kind: SimpleNamespace(type=kind))
        trainer = SimpleNamespace(_questions=deque(asked), step=20, _saved_step=0)
        assert [Trainer._ask(trainer).end for _ in expected] == expected
    # Eight are left, all of which may be on their way; with one more, the one that was asked is read.
    assert not Trainer._ask(trainer).end
    trainer._questions.append(OnItsWay(torch.zeros(3)))
    assert Trainer._ask(trainer).end


def test_numbers_are_read_once_they_have_arrived() -> None:
    """An event in place of a device's: before it, there is something else."""
    values = torch.zeros(2)
    event = SimpleNamespace(synchronize=lambda: values.fill_(3.0))
    assert OnItsWay(values, event).read() == [3.0, 3.0]
    assert OnItsWay.send(torch.ones(2)).read() == [1.0, 1.0]


@pytest.mark.parametrize(("kind", "steps"), [("cpu", 1), ("cuda", 9)])
def test_what_was_said_before_a_checkpoint_is_not_said_of_it(monkeypatch, kind: str, steps: int) -> None:
    """That it is time for one, and that all have written: both were answers to an earlier one."""
    monkeypatch.setattr("adala.trainer.device", lambda: SimpleNamespace(type=kind))
    trainer = SimpleNamespace(_questions=deque(), step=100, _saved_step=100)
    answers = []
    for _ in range(8 if kind == "cuda" else 0):
        trainer._questions.append(OnItsWay(torch.tensor([0.0, 1.0, 0.0])))
    while trainer.step < 110:
        trainer.step += 1
        trainer._questions.append(OnItsWay(torch.tensor([0.0, 1.0, 0.0])))
        answers.append(Trainer._ask(trainer))
    assert [(answer.save, answer.written) for answer in answers] == [(False, False)] * (steps - 1) + [(True, True)] * (
        11 - steps
    )


def fit_until_evaluation(recipe: Path, number: int | None, *overrides: str) -> str:
    """Fits; the last rank is asked to end within its evaluation of that number, counted from 1."""
    trainer, started = build_trainer(recipe, 2, overrides), []
    build = trainer.build_evaluator

    def build_evaluator():
        started.append(trainer.step)
        if len(started) == number and rank() == torch.distributed.get_world_size() - 1:
            preemption._told = "SIGTERM"
        return build()

    trainer.build_evaluator = build_evaluator
    try:
        trainer.fit()
    except Preempted as ended:
        return str(ended)
    return f"evaluated at {started}"


def test_an_evaluation_that_is_cut_short_is_made_up_for(recipe: Path) -> None:
    due = ["--stage2.evaluate_every=2", "--stage2.steps=4"]
    first = on_ranks(2, fit_until_evaluation, recipe, 1, *due)
    assert all("at step 0 of 4, while it was evaluated" in said for said in first)
    assert complete_checkpoints(recipe.parent / "checkpoints") == []
    assert on_ranks(2, fit_until_evaluation, recipe, 2, *due)[1] == "SIGTERM: at step 2 of 4, while it was evaluated"
    (saved,) = complete_checkpoints(recipe.parent / "checkpoints")
    assert json.loads((saved / "trainer.json").read_text())["owes_evaluation"] is True
    # Within the last one, after the last step.
    assert "at step 4 of 4" in on_ranks(2, fit_until_evaluation, recipe, 2, *due)[0]
    assert on_ranks(2, fit_until_evaluation, recipe, None, *due) == ["evaluated at [4]"] * 2
    assert [row["step"] for row in read_metrics(recipe.parent, "val")] == [0, 2, 4]
    assert [row["step"] for row in read_metrics(recipe.parent, "train")] == [1, 2, 3, 4]


def test_it_saves_by_rank_0s_clock(recipe: Path) -> None:
    """And says what a checkpoint cost."""
    on_ranks(2, fit, recipe, 2, "--stage2.save_every_minutes=1e-6", "--stage2.steps=6", "--stage2.keep_last=9")
    kept = [path.name for path in complete_checkpoints(recipe.parent / "checkpoints")]
    assert kept == [f"step-{step:08d}" for step in range(1, 7)]
    rows = read_metrics(recipe.parent, "checkpoint")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["pause_ms"] > 0 and row["write_s"] > 0 and row["mib"] > 0.1 for row in rows)
