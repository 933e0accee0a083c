"""The evaluation command on two ranks: through the launcher what one rank finds, and mistakes told once by both."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from launch import PROJECT, launch
from PIL import Image
from ranks import on_ranks
from tiny_run import write_tiny_recipe, write_tiny_shards

from adala import commands
from adala.config import load_recipe
from adala.contenders import build_teacher_contender, linearize_contender
from adala.data import write_shards
from adala.evaluate import run_evaluation
from adala.evaluation_command import parse_evaluation
from adala.export import save_student
from adala.plan import resolve_run
from adala.tasks import describe_task, read_task

EVALUATE = PROJECT / "launchers" / "evaluate.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a student that has a head."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = write_tiny_recipe(folder)
    write_tiny_shards(folder / "shards", contrast=12)
    plan, task = resolve_run(load_recipe(str(recipe)), ()), read_task({"name": "classification", "num_classes": 3})
    student = linearize_contender(plan.model, build_teacher_contender(plan.model)).model
    head = task.build_head(student)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    description = dataclasses.replace(plan.model.student, task=describe_task(task))
    save_student(folder / "runs" / "tiny-run" / "stage3", student.state_dict(), description, head.state_dict())
    return folder


def test_two_ranks_of_the_launcher_write_what_one_writes(tiny: Path, tmp_path: Path) -> None:
    student = str(tiny / "runs" / "tiny-run" / "stage3")
    asked = ["--recipe", str(tiny / "recipe.yaml"), "--models", "linearized", student]
    asked += ["--protocol.measures=[features,blocks,knn,probe,head]", "--protocol.knn.k", "[3]"]
    places = ["--out", str(tmp_path / "two"), "--cache", str(tmp_path / "store of two")]
    done = launch(EVALUATE, *asked, *places, "--pictures")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("comparing teacher, linearized, stage3 under the protocol tiny") == 1
    assert done.stdout.count("## Scores") == done.stdout.count(f"wrote {tmp_path / 'two'}/evaluation.json") == 1
    alone = ["--out", str(tmp_path / "one"), "--cache", str(tmp_path / "store of one")]
    run_evaluation(parse_evaluation([*asked, *alone]))
    one, two = (json.loads((tmp_path / of / "evaluation.json").read_text()) for of in ("one", "two"))
    assert two["command"].startswith("deepspeed launchers/evaluate.py --recipe ") and "local_rank" not in two["command"]
    assert [row["name"] for row in two["models"]] == ["teacher", "linearized", "stage3"]
    for ours, theirs in zip(two["models"], one["models"], strict=True):
        assert ours["measures"] == pytest.approx(theirs["measures"], rel=1e-4, abs=1e-5)
    assert two["data"] == one["data"] and two["protocol"] == one["protocol"]
    assert {path.name for path in (tmp_path / "two").glob("*.png")} == {"features.png", "blocks.png"}


def main_of_a_rank(arguments: list[str]) -> int:
    """The command's exit code, in a rank that stays in its group."""
    commands.close_distributed = lambda: None
    sys.argv = [str(EVALUATE), *arguments]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EVALUATE), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--protocol", "nope"], "--protocol nope: there is no such protocol; known are dinov2_linear"),
        (["--protocol.knn.kk", "1"], "protocol tiny: unrecognized arguments: --protocol.knn.kk 1"),
        (["--models", "{folder}/nowhere"], "nowhere holds no exported student: there is no such folder"),
        (["--data.mean=[0.4,0.5,0.5]", "--models", "{folder}/runs/tiny-run/stage3"], "was made for images with mean"),
        (["--models", "{folder}/damaged"], "damaged/student.safetensors"),
        (["--data.val=[{folder}/bad/val-*.tar]"], "samples of one data worker's range are bad"),
        (["--data.val=[{folder}/nowhere/val-*.tar]"], "nowhere"),
        (["--out", "{folder}/recipe.yaml/out"], "recipe.yaml is no folder that can be written into"),
        (["--cache", "{folder}/recipe.yaml"], "recipe.yaml is no folder that can be written into"),
    ],
    ids=["protocol", "key", "no_student", "normalisation", "damaged", "bad_samples", "no_shards", "out", "cache"],
)
def test_a_mistake_is_told_once_and_fails_on_every_rank(tiny: Path, tmp_path: Path, capfd, arguments, sentence) -> None:
    recipe, folder = str(tiny / "recipe.yaml"), str(tiny)
    if "{folder}/damaged" in arguments:
        (tiny / "damaged").mkdir()
        description = (tiny / "runs" / "tiny-run" / "stage3" / "model.json").read_bytes()
        (tiny / "damaged" / "model.json").write_bytes(description)
        (tiny / "damaged" / "student.safetensors").write_bytes(b"nothing")
    if "bad/val" in arguments[0]:
        # Only the second rank meets them.
        good = [{"png": path.read_bytes(), "cls": number % 3} for number, path in enumerate(pngs_of(tmp_path, 13))]
        write_shards([*good, *[{"png": b"no image", "cls": 0}] * 3], tiny / "bad", "val", 16)
    typed = ["--recipe", recipe, *(argument.format(folder=folder) for argument in arguments)]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    codes = on_ranks(2, main_of_a_rank, [*typed, *out], timeout_s=60)
    said = capfd.readouterr()
    assert codes == [1, 1], said.err
    told = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and sentence in told[0], said.err
    assert not (tmp_path / "out").exists()
    assert ("computing" in said.out) == ("bad/val" in arguments[0]), "told before anything is computed"


def pngs_of(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (16, 16), (number * 10, 50, 90)).save(path)
    return paths


def test_help_is_no_failure(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EVALUATE), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EVALUATE), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--models" in said and "--protocol.probe.epochs 20" in said
