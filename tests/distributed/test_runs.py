"""Runs that are interrupted, repeated, overwritten, damaged or disturbed: what is left is always true, and whole."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from launch import launch
from PIL import Image
from tiny_run import write_tiny_recipe, write_tiny_shards
from warm import run_until_step, train

from adala.checkpoint import complete_checkpoints
from adala.data import write_shards
from adala.metrics import read_metrics

# A decay that multiplies the weights by -999 in each update, until their products overflow float32.
OVERFLOWING = ["--stage2.lr", "10", "--stage2.weight_decay", "100", "--stage2.steps", "20"]


def train_alone(recipe: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The training command on one rank."""
    return train("--recipe", str(recipe), *arguments, ranks=1)


def succeeds(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout
    return done.stdout


def refused(done: subprocess.CompletedProcess, sentence: str) -> None:
    assert done.returncode != 0, done.stdout
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert sentence in said
    assert "Traceback" not in done.stdout


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but the lock, which holds the last process's number."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def identity_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())["identity"]


def student_of(run: Path, number: int) -> str:
    return json.loads((run / f"stage{number}" / "finished.json").read_text())["student"]


def test_a_table_never_mixes_students_of_different_makes(tmp_path: Path) -> None:
    """All stages; all again with another Stage 1 and a Stage 2 that fails; then the command without --overwrite."""
    recipe, run = write_tiny_recipe(tmp_path), tmp_path / "runs" / "tiny-run"
    succeeds(train_alone(recipe))
    before = {number: student_of(run, number) for number in (1, 2, 3)}
    changed = ["--stage1.lr", "0.01"]
    refused(train_alone(recipe, *changed, *OVERFLOWING, "--overwrite"), "not finite")
    assert student_of(run, 1) != before[1]
    assert {number: student_of(run, number) for number in (2, 3)} == {2: before[2], 3: before[3]}
    said = succeeds(train_alone(recipe, *changed))
    assert "stage 1 (attention alignment)" in said and "finished already, from the same student" in said
    assert said.count("stale, since the student it starts from has changed: run again") == 2
    after = {number: student_of(run, number) for number in (1, 2, 3)}
    assert all(after[number] != before[number] for number in (1, 2, 3))
    identity = identity_of(run)
    assert [identity[f"stage {number}"] for number in (1, 2, 3)] == list(after.values())
    lineage = [json.loads((run / f"stage{n}" / "finished.json").read_text())["conditions"] for n in (1, 2, 3)]
    assert [conditions["the student it starts from"] for conditions in lineage] == ["linearized", after[1], after[2]]
    assert sorted(path.name for path in run.glob("stage*")) == ["stage1", "stage2", "stage3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run whose stages are finished and reported."""
    recipe = write_tiny_recipe(tmp_path_factory.mktemp("finished"))
    succeeds(train_alone(recipe))
    return recipe


def test_overwrite_removes_nothing_before_everything_is_checked(finished: Path) -> None:
    run = finished.parent / "runs" / "tiny-run"
    before = contents(run)
    for mistake, sentence in (
        (["--stage3.task.num_classes", "2"], "stage3.task.num_classes is 2"),
        (["--data.val", '["/nowhere/val-*.tar"]'], "/nowhere/index.json"),
        (["--stage2.freeze", '["nothing*"]'], "no parameter matches"),
        (["--stage3.start_from", "/nowhere"], "/nowhere holds no exported student"),
    ):
        refused(train_alone(finished, "--overwrite", *mistake), sentence)
        assert contents(run) == before
    assert "is finished already, and nothing was done: add --overwrite" in succeeds(train_alone(finished))
    assert contents(run) == before


def test_a_report_can_be_made_later_whatever_a_kill_left_behind(finished: Path) -> None:
    run = finished.parent / "runs" / "tiny-run"
    report = (run / "report.json").read_bytes()
    (run / "report.json").unlink()
    with (run / "stage2" / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 4, "lo')
    said = succeeds(train_alone(finished))
    assert "1 damaged line left out" in said
    assert (run / "report.json").read_bytes() == report
    (run / "report.json").write_bytes(report[:40])
    succeeds(train_alone(finished))
    assert (run / "report.json").read_bytes() == report


def test_an_overwrite_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """As a scheduler does that starts the same command again: nothing begins from zero a second time."""
    stage = {"steps": 40, "global_batch_size": 8, "log_every": 1, "warmup_steps": 1, "save_every": 2}
    recipe = write_tiny_recipe(tmp_path, stage2=stage)
    run = tmp_path / "runs" / "tiny-run"
    for number in ("1", "2"):
        succeeds(train_alone(recipe, "--stage", number))
    old = student_of(run, 2)
    run_until_step(recipe, ["--overwrite", "--stage1.lr", "0.01"], run / "stage2.new", 8)
    assert student_of(run, 2) == old, "what is being replaced stays until its successor is complete"
    first = student_of(run, 1)
    said = succeeds(train("--recipe", str(recipe), "--overwrite", "--stage1.lr", "0.01"))
    assert "going on with the --overwrite of" in said
    assert "resuming from" in said and "stage2.new" in said
    assert student_of(run, 1) == first
    assert len(read_metrics(run / "stage1", "train")) == 4 and "stage 1 train step" not in said
    assert student_of(run, 2) != old
    assert not (run / "overwrite.json").exists() and not (run / "stage2.new").exists()


def test_bad_samples_are_left_out_of_every_row_and_counted(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    images = [Image.new("RGB", (16, 16), (20 * n, 90, 5)) for n in range(20)]
    samples = [{"__key__": f"{n:02d}", "png": image, "cls": n % 3} for n, image in enumerate(images)]
    del samples[7]["cls"]
    samples[12]["png"] = b"no image"
    write_shards(samples, tmp_path / "shards", "val", samples_per_shard=10)
    said = succeeds(train("--recipe", str(recipe)))
    assert "2 held-out samples could not be used, and are left out of all rows alike" in said
    report = json.loads((tmp_path / "runs" / "tiny-run" / "report.json").read_text())
    assert report["unusable_samples"] == 2 and len(report["rows"]) == 5


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    stage = tmp_path / "runs" / "tiny-run" / "stage1"
    arguments = ["--stage", "1", "--stage1.save_every", "2"]
    succeeds(train_alone(recipe, *arguments))
    whole = (stage / "student.safetensors").read_bytes()
    for damage in (lambda content: content[: len(content) // 2], lambda content: content[:-9] + b"different"):
        (stage / "finished.json").unlink()
        two, four = complete_checkpoints(stage / "checkpoints")
        assert (two.name, four.name) == ("step-00000002", "step-00000004")
        (largest,) = sorted(four.rglob("*.safetensors"), key=lambda path: path.stat().st_size)[-1:]
        largest.write_bytes(damage(largest.read_bytes()))
        said = succeeds(train_alone(recipe, *arguments))
        assert f"checkpoint {four} is damaged ({largest.relative_to(four)} has" in said
        assert f"resuming from {two} at step 2" in said
        assert (stage / "student.safetensors").read_bytes() == whole


def test_what_cannot_be_written_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files in place of a full disk: writes fail in the middle, on both ranks or on one."""
    recipe = write_tiny_recipe(tmp_path)
    arguments = ["--stage", "2", "--stage2.save_every", "2"]
    # Above the student's weights, below the ranks' parts of a checkpoint.
    refused(train("--recipe", str(recipe), *arguments, largest_file=150_000), "could not write the checkpoint")
    checkpoints = tmp_path / "runs" / "tiny-run" / "stage2" / "checkpoints"
    assert list(checkpoints.iterdir()) == []
    succeeds(train("--recipe", str(recipe), *arguments))


def test_a_stage_whose_metrics_are_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Three steps to weights that are finite and far too large, and one that is passed over, since its loss is not: the
    evaluation after them ends the run."""
    recipe = write_tiny_recipe(tmp_path)
    arguments = [*OVERFLOWING, "--stage2.steps", "4"]
    refused(train_alone(recipe, "--stage", "2", *arguments), "not finite; the last checkpoint is intact")
    stage = tmp_path / "runs" / "tiny-run" / "stage2"
    assert [row.get("skipped_steps") for row in read_metrics(stage, "train")] == [None, None, None, 1]
    assert [row["step"] for row in read_metrics(stage, "val")] == [0]
    assert complete_checkpoints(stage / "checkpoints") == []
    assert not (stage / "student.safetensors").exists() and not (stage / "finished.json").exists()


def test_ranks_that_see_different_folders_are_told_at_start(tmp_path: Path) -> None:
    """As with a node-local disk: the same relative runs_dir lies somewhere else for the second rank."""
    recipe = write_tiny_recipe(tmp_path, runs_dir="runs")
    done = launch(Path(__file__).with_name("apart_worker.py"), str(tmp_path), str(recipe))
    assert done.returncode != 0
    assert "does not see what rank 0 writes, runs/tiny-run/" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "rank0" / "runs" / "tiny-run").glob("stage*"))


def test_every_cut_of_a_batch_trains_the_same(tmp_path: Path) -> None:
    """One rank or two, whole or in micro-batches: with default losses the curves agree to rounding."""
    curves = {}
    for name, ranks, micro in (("whole", 1, "8"), ("cut", 1, "2"), ("ranks", 2, "2")):
        (tmp_path / name).mkdir()
        recipe = write_tiny_recipe(tmp_path / name)
        write_tiny_shards(tmp_path / name / "shards")
        arguments = [f"--stage{number}.micro_batch_size={micro}" for number in (1, 2, 3)]
        # All samples in one batch: which of them make up a smaller one depends on the ranks.
        batch = [f"--stage{number}.global_batch_size=40" for number in (1, 2, 3)]
        succeeds(train("--recipe", str(recipe), *arguments, *batch, ranks=ranks))
        run = tmp_path / name / "runs" / "tiny-run"
        curves[name] = [row["loss"] for n in (1, 2, 3) for row in read_metrics(run / f"stage{n}", "train")]
    assert curves["cut"] == pytest.approx(curves["whole"], rel=1e-3)
    assert curves["ranks"] == pytest.approx(curves["whole"], rel=1e-3)


def test_a_finished_stage_goes_on_to_more_steps_as_if_never_finished(tmp_path: Path) -> None:
    """Under a constant rate, whose course does not depend on the number of steps, to the bit."""
    recipe, runs = write_tiny_recipe(tmp_path), tmp_path / "runs"
    arguments = ["--stage", "1", "--stage1.schedule", "constant"]
    succeeds(train_alone(recipe, *arguments))
    said = succeeds(train_alone(recipe, *arguments, "--stage1.steps", "7"))
    assert "finished after 4 steps, of which 7 are wanted now: going on with it" in said
    assert "resuming from" in said and "at step 4 of 7" in said
    assert [row["step"] for row in read_metrics(runs / "tiny-run" / "stage1", "train")] == list(range(1, 8))
    succeeds(train_alone(recipe, *arguments, "--stage1.steps", "7", "--run_name", "at-once"))
    assert student_of(runs / "tiny-run", 1) == student_of(runs / "at-once", 1)
    assert sorted(path.name for path in (runs / "tiny-run").glob("stage*")) == ["stage1"]
