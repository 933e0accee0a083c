"""A whole run in forked ranks of this process: the table's numbers, what is run again, and what is left alone."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from tiny_run import read_tiny_val, write_tiny_recipe, write_tiny_shards
from tiny_stage import plan_stage, run

from adala import load_student, load_task_model
from adala.build import build_teacher, unaligned_student
from adala.config import load_recipe
from adala.distributed import Interrupted
from adala.metrics import read_metrics

NAMES = ["teacher", "linearized", "stage 1", "stage 2", "stage 3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder around a run of all stages, on images whose classes are hard to tell."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_tiny_recipe(folder)
    write_tiny_shards(folder / "shards", contrast=12)
    on_ranks(1, run, recipe, (1, 2, 3))
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    shutil.copytree(finished, tmp_path / "copy")
    recipe = json.loads((finished / "recipe.yaml").read_text().replace(str(finished), str(tmp_path / "copy")))
    (tmp_path / "copy" / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path / "copy"


def stage_of(folder: Path, number: int) -> Path:
    return folder / "runs" / "tiny-run" / f"stage{number}"


def student_of(folder: Path, number: int) -> str:
    return json.loads((stage_of(folder, number) / "finished.json").read_text())["student"]


def rerun(folder: Path, capfd: pytest.CaptureFixture, *overrides: str, stages=(1, 2, 3), **options) -> str:
    capfd.readouterr()
    on_ranks(1, partial(run, **options), folder / "recipe.yaml", stages, *overrides)
    return capfd.readouterr().out


def refused(folder: Path, capfd: pytest.CaptureFixture, *overrides: str, stages=(1, 2, 3), **options) -> str:
    with pytest.raises(AssertionError, match="Error: ") as raised:
        rerun(folder, capfd, *overrides, stages=stages, **options)
    return str(raised.value).strip().splitlines()[-1]


@torch.no_grad()
def test_the_table_holds_what_the_exported_models_give(finished: Path) -> None:
    """Cosines of every row, and the top-1 of the fine-tuned head, computed from the files alone."""
    report = json.loads((finished / "runs" / "tiny-run" / "report.json").read_text())
    rows = {row["model"]: row for row in report["rows"]}
    assert list(rows) == NAMES and report["unusable_samples"] == 0
    assert not (finished / "runs" / "tiny-run" / "features").exists(), "they were kept only while they were needed"
    images, labels = read_tiny_val(finished / "shards")
    plan = plan_stage(finished / "recipe.yaml", 3)
    teacher = build_teacher(plan.model.teacher)
    students = [teacher, unaligned_student(plan.model, teacher).eval()]
    students += [load_student(stage_of(finished, number)) for number in (1, 2, 3)]
    for name, student in zip(NAMES, students, strict=True):
        cosine = F.cosine_similarity(student(images), teacher(images), dim=-1).mean().item()
        assert rows[name]["feature_cosine"] == pytest.approx(cosine, abs=2e-5), name
    right = load_task_model(stage_of(finished, 3))(images).argmax(-1) == labels
    assert rows["stage 3"]["top1"] == pytest.approx(100 * right.float().mean().item(), abs=0.005)
    tops = [rows[name]["top1"] for name in NAMES]
    assert all(round(top / 100 * 14) == pytest.approx(top / 100 * 14, abs=0.01) for top in tops), "shares of 14"
    assert len(set(tops)) > 1 and min(tops) < 100, tops
    assert rows["stage 1"]["feature_cosine"] < rows["stage 2"]["feature_cosine"] < 1


def test_records_say_what_came_from_what(finished: Path) -> None:
    records = {n: json.loads((stage_of(finished, n) / "finished.json").read_text()) for n in (1, 2, 3)}
    starts = [records[n]["conditions"]["the student it starts from"] for n in (1, 2, 3)]
    assert starts == ["linearized", records[1]["student"], records[2]["student"]]
    identity = json.loads((finished / "runs" / "tiny-run" / "report.json").read_text())["identity"]
    assert [identity[f"stage {n}"] for n in (1, 2, 3)] == [records[n]["student"] for n in (1, 2, 3)]
    for number in (1, 2, 3):
        last = read_metrics(stage_of(finished, number), "val")[-1]
        assert {name: last[name] for name in records[number]["metrics"]} == records[number]["metrics"]
        written = load_recipe(str(stage_of(finished, number) / "config.yaml"))
        assert written == load_recipe(str(finished / "recipe.yaml"))


def test_an_unfinished_stage_goes_on_and_ends_as_it_would_have(again: Path, capfd) -> None:
    first, third = student_of(again, 1), student_of(again, 3)
    (stage_of(again, 3) / "finished.json").unlink()
    said = rerun(again, capfd)
    assert said.count("finished already, from the same student") == 2
    assert "begun and not finished: going on with it" in said and "at step 4 of 4" in said
    assert (student_of(again, 1), student_of(again, 3)) == (first, third)


def test_a_finished_run_is_left_alone_and_a_stage_overwritten(again: Path, capfd) -> None:
    before = {number: student_of(again, number) for number in (1, 2, 3)}
    said = rerun(again, capfd)
    assert (
        "stage 1, 2, 3 of run" in said
        and "is finished already, and nothing was done: add --overwrite to run it again" in said
    )
    assert "with stage2.lr 0.001, this run has 0.01" in refused(again, capfd, "--stage2.lr=0.01")
    said = rerun(again, capfd, "--stage1.lr=0.01", stages=(1,), overwrite=True)
    assert "run again, as --overwrite says" in said and "is of earlier students: --stage all makes it anew" in said
    assert student_of(again, 1) != before[1] and student_of(again, 2) == before[2]
    said = rerun(again, capfd, "--stage1.lr=0.01")
    assert said.count("stale, since the student it starts from has changed: run again") == 2
    assert all(student_of(again, number) != before[number] for number in (2, 3))
    assert not list((again / "runs" / "tiny-run").glob("*.new")) and not list((again / "runs").rglob("overwrite.json"))


def test_a_run_of_several_mechanisms_resumes_and_starts_from_its_own_students(tmp_path: Path, capfd) -> None:
    mixed = {"block_mechanisms": {0: "window"}, "block_mechanism_options": {"window": {"window": 2}}}
    write_tiny_recipe(tmp_path, keep=[1], **mixed)
    said = rerun(tmp_path, capfd, stages=(1, 2))
    first, second = student_of(tmp_path, 1), student_of(tmp_path, 2)
    assert "starting from the student in" in said and first != second
    described = json.loads((stage_of(tmp_path, 2) / "model.json").read_text())
    assert described["block_mechanisms"] == {"0": "window"} and described["keep"] == [1]
    weights = [load_student(stage_of(tmp_path, number)).blocks[0].attn.qkv.weight for number in (1, 2)]
    assert not torch.equal(*weights)
    (stage_of(tmp_path, 2) / "finished.json").unlink()
    said = rerun(tmp_path, capfd, stages=(1, 2))
    assert "begun and not finished: going on with it" in said and "at step 4 of 4" in said
    assert (student_of(tmp_path, 1), student_of(tmp_path, 2)) == (first, second)
    message = "with block_mechanism_options {'window': {'window': 2}}, this run has {'window': {'window': 4}}"
    assert message in refused(tmp_path, capfd, "--block_mechanism_options.window.window=4", stages=(1, 2))


def test_a_report_is_made_again_where_it_is_gone_and_only_there(again: Path, capfd) -> None:
    path = again / "runs" / "tiny-run" / "report.json"
    report, picture = path.read_text(), path.with_suffix(".png")
    path.unlink(), picture.unlink()
    said = rerun(again, capfd)
    assert path.read_text() == report and picture.read_bytes().startswith(b"\x89PNG")
    assert said.count("finished already") == 3 and "scoring teacher, linearized" in said
    rerun(again, capfd, "--evaluation.probe_l2=10")
    assert json.loads(path.read_text())["identity"]["evaluation.probe_l2"] == 10


def test_a_single_stage_is_drawn_and_not_scored(tmp_path: Path, capfd) -> None:
    write_tiny_recipe(tmp_path)
    rerun(tmp_path, capfd, stages=(1,))
    folder = tmp_path / "runs" / "tiny-run"
    assert not (folder / "report.json").exists() and (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "stage1" / "finished.json").read_bytes()
    for number in (1, 2):
        said = refused(tmp_path, capfd, f"--stage{number}.start_from=/nowhere", stages=(1, 2, 3), overwrite=True)
        assert "/nowhere holds no exported student" in said
        assert (folder / "stage1" / "finished.json").read_bytes() == before, "told before anything is run again"
    assert [path.name for path in folder.glob("stage*")] == ["stage1"]


def test_two_ranks_make_the_table_of_one(finished: Path, tmp_path: Path) -> None:
    """Scoring and evaluation over ranks of unequal parts; training differs by rounding only."""
    recipe = write_tiny_recipe(tmp_path)
    write_tiny_shards(tmp_path / "shards", contrast=12)
    batch = [f"--stage{number}.global_batch_size=40" for number in (1, 2, 3)]
    rows = []
    for ranks in (1, 2):
        on_ranks(ranks, run, recipe, (1, 2, 3), *batch, f"--run_name=of{ranks}", "--evaluation.batch_size=5")
        rows.append(json.loads((tmp_path / "runs" / f"of{ranks}" / "report.json").read_text())["rows"])
    for one, two in zip(*rows, strict=True):
        assert one["model"] == two["model"]
        assert one["feature_cosine"] == pytest.approx(two["feature_cosine"], abs=2e-4)
    assert [row["top1"] for row in rows[0][:2]] == [row["top1"] for row in rows[1][:2]]


def test_a_stage_that_a_conversion_does_not_have_is_left_out(tmp_path: Path, capfd) -> None:
    write_tiny_recipe(tmp_path, mechanism="hedgehog", conversion="native")
    said = rerun(tmp_path, capfd)
    assert "stage 2 is no part of hedgehog's native conversion: left out" in said
    assert "stage1.lr is 0.01 by hedgehog's native conversion, in place of 0.001" in said
    rows = json.loads((tmp_path / "runs" / "tiny-run" / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "linearized", "stage 1", "stage 3"]


def run_until_scored(recipe: Path, places: dict[int, str]) -> str:
    """All stages; the ranks in ``places`` are asked to end when the scoring has come to what is named there."""
    from adala import preemption
    from adala.comparison import Comparer
    from adala.distributed import rank

    def asking(name: str) -> None:
        method = getattr(Comparer, name)

        def asked(comparer: Comparer, *arguments: Any) -> None:
            preemption._told = "SIGTERM" if places.get(rank()) == name else None
            method(comparer, *arguments)

        setattr(Comparer, name, asked)

    for name in set(places.values()):
        asking(name)
    try:
        run(recipe, (1, 2, 3))
    except Interrupted as ended:
        return str(ended)
    return "finished"


def test_a_run_that_is_asked_to_end_while_it_is_scored_makes_its_report_next_time(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    path = tmp_path / "runs" / "tiny-run"
    for places, said in (
        ({1: "_pass_held_out"}, "SIGTERM: while models were scored"),
        ({0: "_fit_pooled", 1: "_fit_pooled"}, "SIGTERM: while a probe was fitted"),
    ):
        assert on_ranks(2, run_until_scored, recipe, places) == [said] * 2
        assert (path / "interrupted.json").exists() and not (path / "report.json").exists()
    assert on_ranks(2, run_until_scored, recipe, {}) == ["finished"] * 2
    assert [row["model"] for row in json.loads((path / "report.json").read_text())["rows"]] == NAMES
    assert not (path / "interrupted.json").exists() and not (path / "features").exists()
