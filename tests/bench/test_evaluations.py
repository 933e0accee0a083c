"""What the page says of real models is what the results say."""

from dataclasses import replace
from pathlib import Path

import evaluations
import pytest

from adala.evaluation_report import EvaluationDocument, ModelRow, write_document


def document(image_size: int, **measures: dict[str, float]) -> EvaluationDocument:
    rows = [ModelRow(name, "", "linear", found) for name, found in measures.items()]
    return EvaluationDocument("t", "c", {}, {}, {"image_size": [image_size] * 2}, rows)


FROZEN = document(
    448,
    teacher={"probe_miou": 80.0},
    linearized={"probe_miou": 20.0},
    stage2={"probe_miou": 76.0},
    **{"majority class": {"probe_miou": 8.4}, "colour table": {"probe_miou": 56.61}},
)
TUNED = document(
    448, **{"earth-teacher-pmt/stage3": {"head_miou": 90.0}, "earth-student-pmt/stage3": {"head_miou": 88.2}}
)


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]
    return {name: rest for name, *rest in rows}


def test_a_score_stands_with_what_is_kept_of_it() -> None:
    found = cells(evaluations.tables({"earth": FROZEN, "earth-tuned": TUNED}))
    assert found["frozen linear head: teacher (softmax)"] == ["80.00"]
    assert found["frozen linear head: linearized, unaligned"] == ["20.00 (25.0 %)"]
    assert found["frozen linear head: after Stage 1"] == ["-"]
    assert found["frozen linear head: after Stage 2"] == ["76.00 (95.0 %)"]
    assert found["Stage 3, `pmt`: teacher"] == ["90.00"]
    assert found["Stage 3, `pmt`: student"] == ["88.20 (98.0 %)"]
    assert found["Stage 3, `linear`: student"] == ["-"]
    assert (found["majority class"], found["colour table"]) == (["8.40"], ["56.61"])


def test_speed_stands_beside_what_is_kept() -> None:
    fast = {"patch_cosine": 0.9, "images_per_s": 6.0, "speed_ratio": 1.5}
    photos = document(448, teacher={"images_per_s": 4.0}, stage2=fast)
    stamps = document(448, teacher={"knn10_top1": 50.0, "probe_top1": 80.0}, stage2={"knn10_top1": 49.5})
    found = cells(evaluations.tables({"photos": photos, "stamps": stamps}))
    assert found["teacher (softmax)"] == ["-", "-", "4.00", "50.00", "80.00"]
    assert found["after Stage 2"] == ["0.900", "-", "6.00 (1.50 x)", "49.50 (99.0 %)", "-"]


def test_what_is_there_is_collected_and_put_between_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, results = tmp_path / "RESULTS.md", tmp_path / "results/evaluation.json"
    page.write_text(f"before\n{evaluations.BEGIN}old\n{evaluations.END}after\n")
    monkeypatch.setattr(evaluations, "PAGE", page)
    monkeypatch.setattr(evaluations, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["evaluations.py", "--runs", str(tmp_path / "runs")])
    write_document(tmp_path / "runs/frozen-earth", FROZEN)
    assert evaluations.main() == 0
    first = page.read_text()
    assert first.startswith("before\n") and first.endswith("after\n") and "old" not in first
    assert evaluations.read_results() == {"earth": FROZEN}
    # A later call adds to what is there, and makes the page of both.
    write_document(tmp_path / "runs/tuned-earth", TUNED)
    write_document(tmp_path / "runs/frozen-earth", replace(FROZEN, title="newer"))
    assert evaluations.main() == 0
    assert evaluations.read_results() == {"earth": replace(FROZEN, title="newer"), "earth-tuned": TUNED}
    assert evaluations.tables(evaluations.read_results()) in page.read_text()


def test_nobodys_home_is_published(tmp_path: Path) -> None:
    seen = replace(FROZEN, data={"image_size": [448, 448], "notes": [f"{Path.home()}/.cache/x.tar is empty"]})
    write_document(tmp_path / "frozen-earth", seen)
    assert evaluations.collect(tmp_path)["earth"].data["notes"] == ["~/.cache/x.tar is empty"]


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n")
    monkeypatch.setattr(evaluations, "PAGE", page)
    monkeypatch.setattr(evaluations, "RESULTS", tmp_path / "evaluation.json")
    monkeypatch.setattr("sys.argv", ["evaluations.py", "--runs", str(tmp_path)])
    assert evaluations.main() == 1
    assert "has no place for the tables" in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists() and page.read_text() == "before\n"


def test_the_page_says_what_the_results_say() -> None:
    assert evaluations.tables(evaluations.read_results()) in evaluations.PAGE.read_text(encoding="utf-8")
