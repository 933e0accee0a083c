"""Users' mistakes on two ranks: one sentence, a non-zero exit of every rank, no hang, nothing lost."""

import json
import subprocess
from pathlib import Path

import launch
import pytest
from safetensors.torch import save_file
from tiny_run import write_tiny_recipe
from tiny_teacher import build_tiny_teacher
from warm import train


def fails_with(sentence: str, *arguments: str) -> None:
    """The command fails on both ranks, says ``sentence`` in one line, once, and shows no traceback."""
    says(sentence, train(*arguments))


def says(sentence: str, done: subprocess.CompletedProcess) -> None:
    assert done.returncode != 0, done.stdout
    said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stdout
    assert sentence in said[0]
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mechanism", "quadratic"], "unknown mechanism 'quadratic': known are softmax, linear"),
        (["--stage2.lrr", "1"], "unrecognized arguments: --stage2.lrr"),
        (["--data.image_size", "[18, 16]"], "18 x 16 is not divisible by the patch size 4 x 4: 16 x 16 would be"),
        (["--stage2.global_batch_size", "64"], "data.train holds 40 samples, fewer than one global batch of 64"),
        (["--stage2.global_batch_size", "7"], "stage2.global_batch_size 7 does not divide into 2 ranks"),
        (
            ["--mechanism", "hedgehog", "--conversion", "native", "--ds_config", "zero3", "--stage", "1"],
            "attention_map_cross_entropy takes a mixer's feature maps by themselves: use ZeRO 0, 1 or 2",
        ),
        (["--ds_config", "zero9"], "ds_config zero9: there is no such configuration; known are zero0"),
    ],
    ids=["mechanism", "key", "image_size", "too_few_samples", "batch", "zero3_maps", "ds_config"],
)
def test_a_mistake_in_the_command(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    fails_with(sentence, "--recipe", str(write_tiny_recipe(tmp_path)), "--stage", "2", *arguments)


def test_a_mistake_through_the_launcher(tmp_path: Path) -> None:
    arguments = ["--recipe", str(write_tiny_recipe(tmp_path)), "--stage", "2", "--stage2.lrr", "1"]
    says("unrecognized arguments: --stage2.lrr", launch.train(*arguments))


def test_a_missing_shard(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    (tmp_path / "shards" / "train-00001.tar").unlink()
    fails_with("train-00001.tar", "--recipe", str(recipe), "--stage", "1")


def test_a_checkpoint_for_another_architecture(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    save_file(build_tiny_teacher(embed_dim=64).state_dict(), tmp_path / "teacher.safetensors")
    fails_with("is for another architecture", "--recipe", str(recipe), "--stage", "1")


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    # A decay that multiplies the weights by -999 in each update, until their products overflow float32.
    overflowing = ["--stage2.lr", "10", "--stage2.weight_decay", "100", "--stage2.steps", "20"]
    arguments = [*overflowing, "--stage2.save_every", "1"]
    fails_with("not finite", "--recipe", str(recipe), "--stage", "2", *arguments)
    checkpoints = sorted((tmp_path / "runs" / "tiny-run" / "stage2" / "checkpoints").glob("step-*"))
    assert checkpoints and all((path / "COMPLETE").is_file() for path in checkpoints)


def test_a_ds_config_that_contradicts_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8}))
    fails_with(
        "train_batch_size belongs into the recipe, as stageN.global_batch_size",
        *("--recipe", str(write_tiny_recipe(tmp_path)), "--stage", "1", "--ds_config", str(path)),
    )


def test_what_was_begun_otherwise_is_refused(tmp_path: Path) -> None:
    recipe = str(write_tiny_recipe(tmp_path))
    done = train("--recipe", recipe, "--stage", "1", ranks=1)
    assert done.returncode == 0, done.stdout
    (tmp_path / "runs" / "tiny-run" / "stage1" / "finished.json").unlink()
    fails_with("was begun with seed 0, this run has 5: set it back", "--recipe", recipe, "--stage", "1", "--seed", "5")


FAULTY = """
import os
from adala.attention.linear import LinearMixer

class FaultyMixer(LinearMixer):
    def forward(self, *arguments, **options):
        if os.environ["RANK"] == "1":
            {}["of a kind that nobody thought of"]
        return super().forward(*arguments, **options)
"""


def test_a_bug_on_one_rank_is_said_once_and_keeps_its_traceback(tmp_path: Path, monkeypatch) -> None:
    """In a mechanism of somebody's package, which is found as any other is."""
    (tmp_path / "faulty-1.dist-info").mkdir()
    (tmp_path / "faulty-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    entry = "[adala.mechanisms]\nfaulty = faulty:FaultyMixer\n"
    (tmp_path / "faulty-1.dist-info" / "entry_points.txt").write_text(entry)
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = write_tiny_recipe(tmp_path, mechanism="faulty")
    done = launch.train("--recipe", str(recipe), "--stage", "1")
    says("this is a bug of the program, not your mistake: KeyError: ", done)
    (kept,) = (tmp_path / "runs" / "tiny-run").glob("error-rank*.txt")
    assert kept.name == "error-rank1.txt" and "Traceback (most recent call last)" in kept.read_text()
