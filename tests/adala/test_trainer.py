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

from adala.checkpoint import complete_checkpoints
from adala.distributed import SharedError, rank
from adala.metrics import read_metrics
from adala.trainer import Trainer


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
    trainer.evaluation_loader = None
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
        trainer.evaluation_loader = []
    try:
        trainer.evaluate()
    except SharedError as error:
        return str(error)


def test_a_rank_without_a_usable_sample_is_told_by_all(recipe: Path) -> None:
    assert (
        on_ranks(2, nothing_usable, recipe)
        == ["a rank found no usable held-out sample: name other shards in data.val"] * 2
    )


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
    trainer.evaluation_loader = None
    trainer.engine.module.register_forward_hook(lambda *given: losses.append(given[-1]["loss"].item()))
    trainer.fit()
    return losses


def test_logged_losses_are_means_over_ranks_and_micro_batches(recipe: Path) -> None:
    first, second = on_ranks(2, fit_with_losses, recipe, "--stage2.micro_batch_size=2", "--stage2.steps=2")
    assert len(first) == len(second) == 4
    expected = [sum(first[at : at + 2] + second[at : at + 2]) / 4 for at in (0, 2)]
    assert [row["loss"] for row in steps_of(recipe)] == pytest.approx(expected, rel=1e-6)


def refuse_non_finite(recipe: Path) -> str:
    trainer = build_trainer(recipe, 2)
    trainer.engine.module.register_forward_hook(
        lambda _, __, losses: losses | ({"loss": losses["loss"] * math.inf} if rank() == 1 else {})
    )
    before = trainer.engine.full_state()
    loader = trainer.build_loader(trainer._resume())
    trainer.train_step(iter(loader))
    try:
        trainer.read_steps(loader)
    except SharedError as error:
        after = trainer.engine.full_state()
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        return str(error)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_leaves_the_weights_alone(recipe: Path) -> None:
    said = on_ranks(2, refuse_non_finite, recipe)
    assert said[0] == said[1] and said[0].startswith("step 1: loss not finite; the last checkpoint is intact")


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
    asked = [torch.tensor(0.0), torch.tensor(1.0), *[torch.tensor(0.0)] * 7]
    for kind, expected in (("cpu", [False, True]), ("cuda", [False])):
        monkeypatch.setattr("adala.trainer.device", lambda kind=kind: SimpleNamespace(type=kind))
        trainer = SimpleNamespace(_asked_to_end=deque(asked))
        assert [Trainer._is_asked_to_end(trainer) for _ in expected] == expected
    # Eight are left, all of which may be on their way; with one more, the one that was asked is read.
    assert not Trainer._is_asked_to_end(trainer)
    trainer._asked_to_end.append(torch.tensor(0.0))
    assert Trainer._is_asked_to_end(trainer)
