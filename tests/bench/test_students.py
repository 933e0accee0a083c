"""Rows of a tiny table: trained by the real command, scored on val and test, put onto a page; and what is refused."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import student_evaluation
import student_page
import student_table
import student_training
import students
import yaml
from command import TrainingFailed
from PIL import Image
from student_pictures import pareto_front
from student_results import DOCS, RowResult, read_result, read_tried, results_folder, write_result
from student_table import read_table
from tiny_run import write_tiny_recipe

from adala.attention import mechanism_names
from adala.config import RECIPE_FOLDER
from adala.data import write_shards

ADALA = "short-adala-s0"
BUDGET = {"views": 64, "megapixels": 0.016384, "options": {"stage1.steps": 4, "stage2.steps": 4}}
KNN, PROBE = {"measures": ["knn", "probe"], "knn.k": [10]}, {"name": "classification", "num_classes": 3}


def write_colours(folder: Path, contrast: int, seed: int = 0) -> None:
    """16 x 16 images of three classes that colour hardly gives away: train, val and test."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 40), ("val", 12), ("test", 15)):
        samples = []
        for index in range(count):
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., index % 3] += contrast
            samples.append({"png": Image.fromarray(pixels), "cls": index % 3})
        write_shards(samples, folder, split, samples_per_shard=50)


def write_squares(folder: Path) -> None:
    """A bright square on noise, with its mask."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 20), ("val", 6), ("test", 6)):
        samples = []
        for _ in range(count):
            pixels, mask = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8), np.zeros((16, 16), np.uint8)
            top, left = rng.integers(0, 9, 2)
            pixels[top : top + 8, left : left + 8] += 150
            mask[top : top + 8, left : left + 8] = 1
            samples.append({"png": Image.fromarray(pixels), "seg.png": Image.fromarray(mask)})
        write_shards(samples, folder, split, samples_per_shard=50)


def write_table(folder: Path, **changes: Any) -> Path:
    """The table of the test; ``changes`` are keys at its top."""
    rows = {
        "teacher": {"group": "references", "label": "teacher", "student": "teacher"},
        "linearized": {"group": "references", "label": "unaligned", "student": "linearized", "large": True},
        "adala-stage1": {"group": "AdaLA", "label": "Stage 1", "run": "adala", "student": "stage1"},
        "adala": {"group": "AdaLA", "label": "AdaLA", "large": True, "pictures": True, "drawn": True},
    }
    seen = {"measures": ["features", "blocks", "speed"], "blocks.images": 6, "speed.rounds": 2, "speed.batch_size": 2}
    masks = {"measures": ["segmentation"], "segmentation.train_samples": 16}
    sets = {
        "photos": {"folder": "colours", "image_size": [16, 16], "protocol": seen},
        "colours": {"image_size": [16, 16], "task": PROBE, "protocol": {**KNN, "held_out_samples": 12}},
        "squares": {"image_size": [16, 16], "task": {"name": "segmentation", "num_classes": 2}, "protocol": masks},
        "photos-32": {
            "folder": "colours",
            "image_size": [32, 32],
            "large": True,
            "protocol": {"measures": ["features", "speed"], "speed.rounds": 2, "speed.batch_size": 2},
        },
    }
    sets["squares"]["pictures"] = True
    values = {
        "recipe": str(folder / "recipe.yaml"),
        "runs_dir": str(folder / "runs"),
        "shards": f"{folder}/{{set}}/{{split}}-*.tar",
        "options": {"tensorboard": False, "stage2.evaluate_every": 2},
        "budgets": {"short": BUDGET},
        "rows": rows,
        "evaluation": {"protocol": {"protocol": "tiny"}, "sets": sets},
        **changes,
    }
    path = folder / "students.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_page_of(docs: Path) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "RESULTS.md").write_text(f"before\n{student_page.BEGIN}old\n{student_page.END}after\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the row ``adala`` as the command trains it."""
    folder = tmp_path_factory.mktemp("students")
    write_tiny_recipe(folder)
    write_colours(folder / "colours", contrast=12)
    write_squares(folder / "squares")
    table = write_table(folder)
    assert students.main(["--table", str(table), "train", ADALA, "--ranks", "1"]) == 0
    return folder


def command(folder: Path, *arguments: str, table: Path | None = None) -> int:
    table = table or folder / "students.yaml"
    return students.main(["--table", str(table), "--docs", str(folder / "docs"), *arguments])


def score(folder: Path, split: str, *rows: str) -> None:
    assert command(folder, "evaluate", "--split", split, "--threads", "1", *rows) == 0


def result_of(folder: Path, row: str) -> RowResult:
    result = read_result(results_folder(folder / "docs") / f"{row}.json")
    assert result is not None
    return result


@pytest.fixture(scope="module")
def scored(trained: Path) -> Path:
    """The same with all rows but one scored, and the page made of them."""
    write_page_of(trained / "docs")
    score(trained, "val", ADALA)
    score(trained, "test", "teacher", "short-*")
    assert command(trained, "page") == 0
    return trained


def cells(page: str, label: str, number: int = 0) -> list[str]:
    """The cells of a row in the ``number``-th table that has it."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")][1:]


def test_a_row_has_everything_that_it_came_from(scored: Path) -> None:
    found = result_of(scored, ADALA)
    assert (found.split, found.seed, found.views) == ("test", 0, {"1": 32, "2": 32})
    assert [(each["stage"], each["ended"]) for each in found.training] == [(1, "well"), (2, "well")]
    assert all(each["seconds"] > 0 and each["machine"]["commit"] for each in found.training)
    assert found.conditions["stage2.steps"] == 4 and found.conditions["mechanism"] == "linear"
    assert [line.split()[:4] for line in found.commands] == [
        ["deepspeed", "launchers/train.py", "--stage", str(number)] for number in (1, 2)
    ]
    assert [(row["step"], row["views"]) for row in found.curve["2"]] == [(0, 32), (2, 48), (4, 64)]
    assert all(0 < row["patch_cosine"] <= 1 for row in found.curve["2"])
    assert len(found.documents["photos"].details["blocks"]["students"]["stage2"]["attention"]) == 3
    assert found.costs["16"]["student"].tokens == 17 and found.costs["32"]["student"].tokens == 65
    assert found.costs["16"]["student"].parameters == found.costs["16"]["teacher"].parameters
    ratio = (found.costs[side]["student"].macs / found.costs[side]["teacher"].macs for side in ("16", "32"))
    assert next(ratio) > next(ratio), "linear attention gains with the number of tokens"
    assert len(found.looks) == 1
    assert set(found.evaluation_seconds) == {"photos", "colours", "squares", "photos-32"}


def test_what_stands_on_the_page_is_what_was_measured(scored: Path) -> None:
    page, found = (scored / "docs/RESULTS.md").read_text(), result_of(scored, ADALA)
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    photos, ours = found.measures("photos"), cells(page, "AdaLA (short)")
    views, megapixels, parameters, _, speed, _, patch, cls, *shares, miou = ours
    assert (views, megapixels, parameters[-9:]) == ("64", "0.01638", "(100.0 %)")
    assert speed == f"{photos['images_per_s']:.2f} ({photos['speed_ratio']:.2f} x)"
    assert (patch, cls) == tuple(f"{photos[name]:.3f}" for name in ("patch_cosine", "cls_cosine"))
    theirs = found.measures("colours", of_teacher=True)
    for share, name in zip(shares, ("knn10_top1", "probe_top1"), strict=True):
        assert share == f"{100 * found.measures('colours')[name] / theirs[name]:.1f} %"
    kept = found.measures("squares")["probe_miou"] / found.measures("squares", of_teacher=True)["probe_miou"]
    assert miou == f"{found.measures('squares')['probe_miou']:.2f} ({100 * kept:.1f} %)"
    assert cells(page, "teacher")[-2:] == ["100.0 %", cells(page, "teacher", 2)[0]]
    assert "Not yet measured: `linearized`.\n" in page and "unaligned" not in page and "0.000" not in page
    assert "3 of 4 rows are measured. Choices were made on `val`, on which 1 students were scored" in page
    assert "looked at 1 to 1 times each" in page
    assert "colours kNN (12 images) | colours probe (12 images)" in page and "squares mIoU (6 images)" in page
    assert cells(page, "AdaLA (short)", 4)[:3] == [f"`{ADALA}`", "0", f"`{scored}/recipe.yaml`"]


def test_pictures_on_the_page_are_there(scored: Path) -> None:
    page = (scored / "docs/RESULTS.md").read_text()
    drawn = ["students_front", "students_curves", "students_blocks"]
    kept = [f"students/{ADALA}-squares-{picture}" for picture in ("features", "masks")]
    assert [line.rpartition("(")[2] for line in page.splitlines() if line.startswith("![")] == [
        f"{name}.png)" for name in (*drawn, *kept)
    ]
    for name in (*drawn, *kept):
        assert Image.open(scored / "docs" / f"{name}.png").size[0] > 100


def test_val_is_for_choosing_alone(scored: Path) -> None:
    (line,) = read_tried(scored / "docs")
    stays = read_result(scored / "runs/val" / f"{ADALA}.json")
    assert stays is not None and stays.split == "val" and stays.documents["colours"].data["samples"]["held-out"] == 12
    assert (line["name"], line["views"], line["options"]["stage1.steps"]) == (ADALA, 64, 4)
    assert line["val"]["colours"] == stays.measures("colours") and line["commit"]
    held_out = {r.documents["colours"].data["held_out"][0] for r in (stays, result_of(scored, ADALA))}
    assert held_out == {f"{scored}/colours/val-*.tar", f"{scored}/colours/test-*.tar"}


def test_nothing_finished_is_repeated(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("it is done again")

    before = (results_folder(scored / "docs") / f"{ADALA}.json").read_bytes()
    monkeypatch.setattr(student_training, "run_training", refuse)
    monkeypatch.setattr(student_evaluation, "run_evaluation", refuse)
    assert command(scored, "train", ADALA) == 0
    score(scored, "test", ADALA)
    score(scored, "val", ADALA)
    assert len(read_tried(scored / "docs")) == 1
    assert (results_folder(scored / "docs") / f"{ADALA}.json").read_bytes() == before


@pytest.fixture
def copy(scored: Path, tmp_path: Path) -> Path:
    """Results and table to be changed, beside the runs and data of the others."""
    shutil.copytree(scored / "docs", tmp_path / "docs")
    shutil.copy(scored / "students.yaml", tmp_path / "students.yaml")
    return tmp_path


def changed_table(folder: Path, **changes: Any) -> None:
    path = folder / "students.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}, sort_keys=False))


def test_every_look_at_test_is_counted(copy: Path) -> None:
    assert command(copy, "evaluate", "--split", "test", "--again", "--threads", "1", "short-adala-stage1-s0") == 0
    assert len(result_of(copy, "short-adala-stage1-s0").looks) == 2
    assert command(copy, "page") == 0
    assert "looked at 1 to 2 times each" in (copy / "docs/RESULTS.md").read_text()


def test_an_interrupted_evaluation_leaves_no_row_and_is_taken_up(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run, done = results_folder(copy / "docs") / "linearized.json", student_evaluation.run_evaluation, []

    def cut_off(asked: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        run(asked)
        done.append(asked.out.name)

    monkeypatch.setattr(student_evaluation, "run_evaluation", cut_off)
    with pytest.raises(KeyboardInterrupt):
        command(copy, "evaluate", "--split", "test", "--threads", "1", "linearized")
    assert done == ["photos", "colours"] and not path.exists()
    done.clear()
    monkeypatch.setattr(student_evaluation, "run_evaluation", lambda asked: (run(asked), done.append(asked.out.name)))
    score(copy, "test", "linearized")
    assert done == ["squares", "photos-32"]
    assert set(result_of(copy, "linearized").documents) == {"photos", "colours", "squares", "photos-32"}


def test_a_row_whose_recipe_has_changed_is_told(copy: Path, capsys: pytest.CaptureFixture) -> None:
    changed_table(copy, options={"tensorboard": False, "stage2.lr": 2e-3, "stage2.log_every": 2})
    assert command(copy, "page") == 0
    page = (copy / "docs/RESULTS.md").read_text()
    assert f"- `{ADALA}`: its recipe has changed since in stage2.lr\n" in page
    assert "| AdaLA (short) [!] |" in page and "`short-adala-stage1-s0`: its" not in page
    assert command(copy, "evaluate", "--split", "test", ADALA) == 1
    assert "was trained under another stage2.lr: move that folder away" in capsys.readouterr().err
    with pytest.raises(TrainingFailed, match=r"stage2\.lr"):
        table = read_table(copy / "students.yaml")
        student_training.train(table, table.rows[ADALA], 1)


def test_a_row_of_another_build_of_the_data_is_marked(copy: Path) -> None:
    path, found = results_folder(copy / "docs") / f"{ADALA}.json", result_of(copy, ADALA)
    squares = found.documents["squares"]
    moved = dataclasses.replace(squares, data={**squares.data, "held_out_digest": "sha256:0"})
    write_result(path, dataclasses.replace(found, documents={**found.documents, "squares": moved}))
    assert command(copy, "page") == 0
    page = (copy / "docs/RESULTS.md").read_text()
    assert f"- `{ADALA}`: of another build of squares than teacher: not to be compared\n" in page


def test_a_page_without_the_marks_is_left_alone(copy: Path, capsys: pytest.CaptureFixture) -> None:
    (copy / "docs/RESULTS.md").write_text("before\n")
    assert command(copy, "page") == 1
    assert "has no place for the rows" in capsys.readouterr().err
    assert (copy / "docs/RESULTS.md").read_text() == "before\n"


def test_a_damaged_row_is_no_row(copy: Path, capsys: pytest.CaptureFixture) -> None:
    (results_folder(copy / "docs") / f"{ADALA}.json").write_text("{}")
    assert command(copy, "page") == 1
    assert "holds no results of a row" in capsys.readouterr().err


def test_what_cannot_be_done_is_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(sentence: str, *arguments: str, **changes: Any) -> None:
        write_tiny_recipe(tmp_path)
        table = write_table(tmp_path, **changes)
        assert command(tmp_path, *arguments, table=table) == 1
        assert sentence in capsys.readouterr().err

    refused("there is no row adela: `python bench/students.py list`", "train", "adela")
    refused(f"row {ADALA} is not trained: run `python bench/students.py train", "evaluate", "--split", "val", ADALA)
    for views, megapixels in ((63, 1), (64, 0.0163), (65, 0.02)):
        refused(
            f"row {ADALA}: its stages see 64 views of 0.016384 megapixels together, and the budget short has {views} "
            f"views of {megapixels} megapixels together: set their steps or sizes", "train", ADALA,
            budgets={"short": BUDGET | {"views": views, "megapixels": megapixels}},
        )  # fmt: skip
    row = {"group": "g", "label": "l"}
    refused("row a: kind is unknown; there are group, label", "list", rows={"a": {**row, "kind": 1}})
    refused("row a: label is missing", "list", rows={"a": {"group": "g"}})
    refused("row a: student is stage3, and its run has stages 1, 2", "list", rows={"a": {**row, "student": "stage3"}})
    refused("row a: there is no row b whose run it could be of", "list", rows={"a": {**row, "run": "b"}})
    refused("two rows are called l (short)", "list", rows={"a": row, "b": row})
    refused("row a: there is no budget long, only short", "list", rows={"a": {**row, "budgets": ["long"]}})


def test_a_budget_of_pixels_may_go_into_fewer_and_larger_views(tmp_path: Path) -> None:
    """Two steps at 16 px and a third at 32 px are six at 16 px."""
    write_tiny_recipe(tmp_path)
    sizes = [{"from_step": 2, "image_size": [32, 32]}]
    row = {"group": "g", "label": "l", "options": {"stage2.steps": 3, "stage2.image_sizes": sizes}}
    table = read_table(write_table(tmp_path, rows={"a": row}, budgets={"short": BUDGET | {"megapixels": 0.02048}}))
    (row,) = table.rows.values()
    recipe = table.resolve(row)
    assert student_table.views_by_stage(row, recipe) == {1: 32, 2: 24}
    assert student_table.megapixels_by_stage(row, recipe) == {1: 0.008192, 2: 0.012288}


def test_budgets_and_seeds_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = {"a": {"group": "g", "label": "l", "seeds": [0, 1], "budgets": ["short", "long"]}}
    rows["a"]["by_budget"] = {"long": {"stage1.lr": 0.5}}
    rows["b"] = {"group": "g", "label": "m", "run": "a", "student": "stage1", "seeds": [1]}
    budgets = {name: BUDGET for name in ("short", "long")}
    found = read_table(write_table(tmp_path, rows=rows, budgets=budgets))
    assert list(found.rows) == ["short-a-s0", "short-a-s1", "long-a-s0", "long-a-s1", "short-b-s1"]
    assert found.run(found.rows["short-b-s1"]) == found.run(found.rows["short-a-s1"])
    assert found.arguments(found.rows["long-a-s1"])[-6:-4] == ["--seed", "1"]
    assert ["stage1.lr" in row.options for row in found.rows.values()] == [False, False, True, True, False]
    assert [row.name for row in found.chosen(["long-*", "short-a-s0", "*-s0"])] == [
        "long-a-s0", "long-a-s1", "short-a-s0"
    ]  # fmt: skip


def test_a_key_that_is_new_means_what_it_meant() -> None:
    defaults = {"stage1.lr": 1e-3, "mechanism": "linear"}
    now = {**defaults, "kernel": "auto"}
    assert student_training.changed_keys(defaults, now) == []
    assert student_training.changed_keys(defaults, {**now, "kernel": "fused"}) == ["kernel"]
    assert student_training.changed_keys({**now, "stage1.lr": 1e-2}, now) == ["stage1.lr"]


def test_the_front_is_of_those_that_nobody_beats() -> None:
    assert pareto_front([(1.0, 1.0), (2.0, 0.9), (1.5, 0.8), (2.0, 0.5), (3.0, 0.1)]) == [
        (1.0, 1.0), (2.0, 0.9), (3.0, 0.1)
    ]  # fmt: skip
    assert pareto_front([]) == []


def test_the_projects_rows_can_be_trained_and_see_what_their_budget_says() -> None:
    table = read_table()
    known = {path.stem for path in RECIPE_FOLDER.glob("*.yaml")}
    can = [row for row in table.rows.values() if row.recipe in known and _is_known(row.options)]
    assert len(can) > 20
    for row in can:
        table.resolve(row)


def _is_known(options: dict[str, Any]) -> bool:
    return options.get("mechanism", "linear") in mechanism_names() and not isinstance(options.get("keep"), str)


def test_the_page_says_what_the_results_say() -> None:
    measured = student_page.read_measured(read_table(), DOCS)
    page = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
    assert student_page.put_into_page(page, student_page.render(measured, DOCS)) == page
    assert set(measured.results) == {path.stem for path in results_folder(DOCS).glob("*.json")}
