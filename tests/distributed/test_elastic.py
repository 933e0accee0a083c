"""Runs that are taken up by other numbers of ranks, workers and ZeRO stages, in the middle of an epoch."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import on_ranks
from tiny_run import write_tiny_recipe
from tiny_stage import build_trainer

from adala import preemption
from adala.data import write_shards
from adala.distributed import rank
from adala.metrics import read_metrics
from adala.preemption import Preempted

# 10 steps of 12 samples an epoch, and 4 samples that are left out of it; 25 steps are two and a half epochs.
SAMPLES, GLOBAL_BATCH, STEPS, STOP_AFTER = 124, 12, 25, 14
STAGE = {
    "steps": STEPS, "global_batch_size": GLOBAL_BATCH, "log_every": 1, "warmup_steps": 1, "augmentation": "crop",
    "lr": 0.003,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_tiny_recipe(tmp_path, stage2=STAGE)
    generator = np.random.default_rng(1)
    images = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(SAMPLES)]
    for old in (tmp_path / "shards").glob("train-*"):
        old.unlink()
    write_shards([{"png": image, "cls": n % 3} for n, image in enumerate(images)], tmp_path / "shards", "train", 17)
    return path


def fit(recipe: Path, stop_after: int | None, *overrides: str) -> list[tuple[int, str]]:
    """Trains, on until a rank is asked to end after so many steps; the epoch and id of each sample that was used."""
    trainer, used = build_trainer(recipe, 2, overrides), []
    train_step = trainer.train_step

    def noting(batches) -> None:
        def noted():
            for batch in batches:
                used.extend((batch["epoch"], sample_id) for sample_id in batch["id"])
                yield batch

        # Of one rank alone: all the others hear of it.
        if stop_after is not None and trainer.step + 1 == stop_after and rank() == 0:
            preemption._told = "SIGTERM"
        train_step(noted())

    trainer.train_step = noting
    try:
        trainer.fit()
    except Preempted:
        assert stop_after == trainer.step
    return used


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero1", 2, 0), ("zero1", 1, 0)),
        (("zero1", 2, 2), ("zero1", 3, 0)),
        (("zero2", 2, 0), ("zero2", 1, 2)),
        (("zero2", 2, 0), ("zero2", 3, 0)),
        (("zero3", 2, 0), ("zero3", 1, 0)),
        (("zero3", 2, 0), ("zero3", 3, 2)),
        (("zero3", 2, 0), ("zero1", 2, 0)),
    ],
    ids=lambda place: "{}x{}w{}".format(*place),
)
@pytest.mark.faults
def test_other_ranks_use_each_sample_of_the_epoch_once(recipe: Path, tmp_path: Path, before, after) -> None:
    check_taken_up(recipe, tmp_path, before, after)


def test_three_ranks_take_up_what_two_began(recipe: Path, tmp_path: Path) -> None:
    check_taken_up(recipe, tmp_path, ("zero1", 2, 0), ("zero2", 3, 2))


def check_taken_up(recipe: Path, tmp_path: Path, before, after) -> None:
    """Places are ZeRO's configuration, ranks, and data workers of each."""
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "recipe.yaml").write_text(recipe.read_text())
    places = {name: [f"--ds_config={zero}", f"--data.num_workers={w}"] for name, (zero, _, w) in
              (("before", before), ("after", after))}  # fmt: skip
    reference = on_ranks(before[1], fit, whole / "recipe.yaml", None, *places["before"])
    used = on_ranks(before[1], fit, recipe, STOP_AFTER, *places["before"])
    used += on_ranks(after[1], fit, recipe, None, *places["after"])
    counted = Counter(sample for of_rank in used for sample in of_rank)
    expected = Counter(sample for of_rank in reference for sample in of_rank)
    # Which samples are left out of an epoch, seed and epoch alone decide. The last epoch is not read to its end, and
    # who reads it decides how far.
    for epoch in (0, 1):
        of_epoch = {sample: times for sample, times in counted.items() if sample[0] == epoch}
        assert of_epoch == {sample: 1 for sample in expected if sample[0] == epoch}
        assert len(of_epoch) == 10 * GLOBAL_BATCH
    assert sum(counted.values()) == STEPS * GLOBAL_BATCH
    # Of the epoch that was interrupted, other ranks make other batches of the same samples.
    curves = [np.array([row["loss"] for row in read_metrics(folder, "train")]) for folder in (whole, recipe.parent)]
    assert len(curves[0]) == len(curves[1]) == STEPS
    np.testing.assert_allclose(curves[1][:STOP_AFTER], curves[0][:STOP_AFTER], rtol=0, atol=0)
    np.testing.assert_allclose(curves[1].mean(), curves[0].mean(), rtol=2e-2)


def test_one_batch_an_epoch_gives_the_same_curve(tmp_path: Path) -> None:
    """Where a batch is the whole epoch, other ranks see what the first ones would have seen."""
    curves = []
    for name, places in (("whole", [("zero1", 2)]), ("moved", [("zero1", 2), ("zero3", 1), ("zero2", 4)])):
        (tmp_path / name).mkdir()
        recipe = write_tiny_recipe(tmp_path / name, stage2={**STAGE, "global_batch_size": 40, "steps": 9})
        for number, (zero, ranks) in enumerate(places, 1):
            stop = 3 * number if number < len(places) else None
            on_ranks(ranks, fit, recipe, stop, f"--ds_config={zero}")
        curves.append([row["loss"] for row in read_metrics(recipe.parent, "train")])
    assert len(curves[0]) == 9 and curves[0][0] != curves[0][-1]
    assert curves[1] == pytest.approx(curves[0], abs=1e-3, rel=1e-3)


def test_what_was_saved_says_how_and_no_file_of_it_is_code(recipe: Path) -> None:
    on_ranks(2, fit, recipe, STOP_AFTER)
    (saved,) = (recipe.parent / "checkpoints").iterdir()
    assert sorted(path.name for path in saved.iterdir()) == [
        "COMPLETE", "rank-00000.safetensors", "rank-00001.safetensors", "trainer.json",
    ]  # fmt: skip
    state = json.loads((saved / "trainer.json").read_text())
    assert (state["step"], state["world_size"], state["zero_stage"]) == (STOP_AFTER, 2, 1)
    assert state["stream"]["epoch"] == 1 and state["owes_evaluation"] is False
