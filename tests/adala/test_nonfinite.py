"""The block that a number which is not finite begins in is named, whatever ZeRO stage and precision, and the rank."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny_run import write_tiny_recipe
from tiny_stage import build_trainer

from adala.compilation import CompiledModules
from adala.distributed import SharedError, rank
from adala.metrics import read_metrics
from adala.nonfinite import Fault, Place
from adala.trainer import Trainer

ZEROS = ["zero0", "zero1_bf16", "zero1_autocast", "zero2", "zero3"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def spoils(trainer: Trainer, step: int, ranks: tuple[int, ...] = (0, 1)) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a NaN of one number in a step, counted from 1, on some ranks."""

    def spoil(value: torch.Tensor) -> torch.Tensor:
        if trainer.step + 1 != step or rank() not in ranks or not torch.is_tensor(value):
            return value
        factor = torch.ones_like(value)
        factor.view(-1)[-1] = math.nan
        return value * factor

    return spoil


def spoil_gradient_of_input(spoil: Callable) -> Callable:
    """A hook before a module, which it gives the same input, whose gradient is spoilt."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0].clone()
        if x.requires_grad:
            x.register_hook(spoil)
        return (x, *inputs[1:])

    return hook


def fill_with_nan(parameter: torch.nn.Parameter) -> None:
    parameter.data.fill_(math.nan)
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3's share; small weights lie there as a whole, too
        parameter.ds_tensor.data.fill_(math.nan)


def fit(trainer: Trainer) -> str:
    try:
        trainer.fit()
    except SharedError as error:
        return str(error)
    return "finished"


def poison_stage_2(recipe: Path, *overrides: str) -> str:
    """A gradient of a weight, one that passes from block to block, a block's output, and for good a weight."""
    trainer = build_trainer(recipe, 2, ["--stage2.steps=12", "--stage2.max_skipped_steps=3", *overrides])
    trainer.evaluation_loaders, student = {}, trainer.engine.module.student
    student.blocks[1].mlp.fc1.weight.register_hook(spoils(trainer, 1, (1,)))
    # What gets its gradient last, after which ZeRO 0 adds up those of all ranks in place.
    student.patch_embed.proj.weight.register_hook(spoils(trainer, 2, (1,)))
    student.blocks[2].register_forward_pre_hook(spoil_gradient_of_input(spoils(trainer, 4)))
    late = spoils(trainer, 6, (0,))
    student.blocks[0].attn.register_forward_hook(lambda _, __, output: late(output))
    student.norm.weight.register_hook(spoils(trainer, 7, (1,)))
    train_step = trainer.train_step

    def step(batches: Any) -> None:
        if trainer.step >= 8:  # each time: after a step that was left out DeepSpeed may copy its weights anew
            fill_with_nan(student.blocks[2].mlp.fc2.weight)
        train_step(batches)

    trainer.train_step = step
    return fit(trainer)


EXPECTED = [
    (1, "block 1", "backward", [1], 1, 1),
    (2, "embedding", "backward", [1], 2, 2),
    (4, "block 2", "backward", [0, 1], 1, 3),
    (6, "block 0", "forward", [0], 1, 4),
    (7, "norm", "backward", [1], 2, 5),
    (9, "block 2", "forward", [0, 1], 1, 6),
    (10, "block 2", "forward", [0, 1], 2, 7),
    (11, "block 2", "forward", [0, 1], 3, 8),
]
FATAL = (
    "step 11: the gradients of 3 steps in a row were not finite, and the weights were left alone; in this step it "
    "begins in block 2, in the forward pass, on ranks 0, 1: lower the learning rate"
)


def skipped(recipe: Path) -> list[tuple]:
    keys = ("step", "first_in", "pass", "ranks", "in_a_row", "in_all")
    return [tuple(row[key] for key in keys) for row in read_metrics(recipe.parent, "skipped")]


@pytest.mark.parametrize("zero", ZEROS)
def test_the_first_block_is_named_whatever_shards_it(recipe: Path, zero: str) -> None:
    for said in on_ranks(2, poison_stage_2, recipe, "--ds_config", zero):
        assert said.startswith(FATAL)
    assert skipped(recipe) == EXPECTED


@pytest.mark.parametrize(
    "overrides", [["--stage2.activation_checkpointing=true"], ["--stage2.micro_batch_size=2"]], ids=lambda o: o[0][9:28]
)
def test_the_first_block_is_named_however_the_step_is_cut(recipe: Path, overrides: list[str]) -> None:
    for said in on_ranks(2, poison_stage_2, recipe, *overrides):
        assert said.startswith(FATAL)
    assert skipped(recipe) == EXPECTED


def poison_compiled(recipe: Path) -> str:
    trainer = build_trainer(recipe, 2, ["--stage2.steps=3"])
    trainer.evaluation_loaders, stage = {}, trainer.engine.module
    # What stage2.compile does, without the minute that inductor takes.
    stage._compiled.append(CompiledModules(stage.student.blocks, "compute", backend="aot_eager"))
    trainer.engine._trains = False
    stage.student.blocks[1].mlp.fc1.weight.register_hook(spoils(trainer, 1))
    stage.student.blocks[2].register_forward_pre_hook(spoil_gradient_of_input(spoils(trainer, 2)))
    spoil = spoils(trainer, 3)
    stage.student.blocks[1].register_forward_pre_hook(lambda _, inputs: (spoil(inputs[0]), *inputs[1:]))
    return fit(trainer)


def test_the_first_block_is_named_of_compiled_ones(recipe: Path) -> None:
    assert on_ranks(1, poison_compiled, recipe) == ["finished"]
    assert [row[1:3] for row in skipped(recipe)] == [
        ("block 1", "backward"), ("block 2", "backward"), ("block 1", "forward"),
    ]  # fmt: skip


def poison_stage_1(recipe: Path, zero: str) -> str:
    trainer = build_trainer(
        recipe, 1, ["--ds_config", zero, "--stage1.steps=9", "--stage1.max_skipped_steps=3", "--stage1.log_every=4"]
    )
    trainer.evaluation_loaders, student = {}, trainer.engine.module.student
    student.blocks[1].attn.qkv.weight.register_hook(spoils(trainer, 2, (1,)))
    late = spoils(trainer, 3, (1,))
    student.blocks[2].attn.register_forward_hook(lambda _, __, output: late(output))
    train_step = trainer.train_step

    def step(batches: Any) -> None:
        if trainer.step >= 4:
            fill_with_nan(student.blocks[1].attn.qkv.weight)
            fill_with_nan(student.blocks[2].attn.qkv.weight)
        train_step(batches)

    trainer.train_step = step
    return fit(trainer)


@pytest.mark.parametrize("zero", ["zero1", "zero2_bf16", "zero3"])
def test_too_many_steps_in_a_row_end_with_the_name_of_the_block(recipe: Path, zero: str) -> None:
    """Stage 1, with gradients that are known after the forward pass and, under ZeRO-3, without; between two lines."""
    first, second = on_ranks(2, poison_stage_1, recipe, zero)
    assert first == second
    assert first.startswith(
        "step 7: the gradients of 3 steps in a row were not finite, and the weights were left alone"
    )
    assert "in this step it begins in block 1, in the forward pass, on ranks 0, 1: lower the learning rate" in first
    assert skipped(recipe) == [
        (2, "block 1", "backward", [1], 1, 1),
        (3, "block 2", "forward", [1], 2, 2),
        (5, "block 1", "forward", [0, 1], 1, 3),
        (6, "block 1", "forward", [0, 1], 2, 4),
        (7, "block 1", "forward", [0, 1], 3, 5),
    ]
    assert [row["step"] for row in read_metrics(recipe.parent, "train")] == [4]


def poison_head(recipe: Path) -> list[str]:
    trainer = build_trainer(recipe, 3, ["--stage3.steps=3"])
    trainer.evaluation_loaders, stage = {}, trainer.engine.module
    stage.head.linear.weight.register_hook(spoils(trainer, 1))
    stage.student.patch_embed.proj.weight.register_hook(spoils(trainer, 2))
    spoil = spoils(trainer, 3)
    stage.register_forward_hook(lambda _, __, losses: losses | {"loss": spoil(losses["loss"])})
    return [fit(trainer), *(f"{place.part} {place.direction}" for place in trainer.engine.watch.places)]


def test_what_is_no_block_is_named_too(recipe: Path) -> None:
    ((done, *places),) = on_ranks(1, poison_head, recipe)
    assert done == "finished"
    forward = [f"{part} forward" for part in ("embedding", "block 0", "block 1", "block 2", "loss")]
    parts = ("loss", "head", "norm", "block 2", "block 1", "block 0", "embedding")
    assert places == [*forward, *(f"{part} backward" for part in parts)]
    assert [row[1:3] for row in skipped(recipe)] == [
        ("head", "backward"), ("embedding", "backward"), ("loss", "forward"),
    ]  # fmt: skip
    rows = read_metrics(recipe.parent, "train")
    assert ["loss" in row for row in rows] == [True, True, False], "what is not finite is no number of a curve"


def count_over_resume(recipe: Path, spoilt: int, *overrides: str) -> str:
    trainer = build_trainer(recipe, 2, overrides)
    trainer.evaluation_loaders = {}
    trainer.engine.module.student.norm.weight.register_hook(spoils(trainer, spoilt))
    return fit(trainer)


def test_skipped_steps_are_counted_over_the_whole_run(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    assert on_ranks(1, count_over_resume, recipe, 1, "--stage2.steps=2") == ["finished"]
    assert on_ranks(1, count_over_resume, recipe, 4) == ["finished"]
    assert [row[4:] for row in skipped(recipe)] == [(1, 1), (1, 2)]
    assert "(2 skipped so far)" in capfd.readouterr().out
    (last,) = (recipe.parent / "checkpoints").glob("step-*4")
    assert json.loads((last / "trainer.json").read_text())["skipped_in_all"] == 2


def test_a_fault_in_words() -> None:
    at = Place("norm", "backward")
    assert str(Fault(at, (3,))) == "it begins in the norm, in the backward pass, on rank 3"
    assert str(Fault(at, tuple(range(9)))).endswith("on ranks 0, 1, 2, 3 and 5 more")
    assert str(Fault(None)) == "it is finite on every rank by itself, and not where ranks and blocks are added up"
    assert Fault(None).to_row() == {"first_in": None, "pass": None, "ranks": []}
