"""The table as text, JSON and picture."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from adala.metrics import MetricLog
from adala.report import Report, ReportRow, draw_report, print_report, read_report, write_report
from adala.runs import RunFolder

REPORT = Report(
    [ReportRow("teacher", 91.23456, 1.0), ReportRow("stage 1", None, 0.876543)],
    "top1",
    "top-1 (%)",
    {"teacher": "sha256:a"},
    3,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_report_is_rounded_as_it_is_written_and_read_back(run: RunFolder) -> None:
    write_report(run, REPORT)
    stored = json.loads(run.report.read_text())
    assert stored["rows"] == [
        {"model": "teacher", "top1": 91.23, "feature_cosine": 1.0},
        {"model": "stage 1", "top1": None, "feature_cosine": 0.87654},
    ]
    assert stored["identity"] == {"teacher": "sha256:a"} and stored["unusable_samples"] == 3
    found = read_report(run)
    assert (found.identity, found.unusable_samples) == (REPORT.identity, 3)
    assert found.rows == [ReportRow("teacher", 91.23, 1.0), ReportRow("stage 1", None, 0.87654)]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"rows": [{"model": 1}], "identity": {}}', '{"rows": 1}'])
def test_a_report_that_cannot_be_read_is_none(run: RunFolder, content: str) -> None:
    assert read_report(run) is None
    run.report.write_text(content)
    assert read_report(run) is None


def test_the_table_has_a_line_a_row(capsys) -> None:
    print_report(REPORT, "a run")
    printed = capsys.readouterr().out
    assert "a run" in printed and "top-1 (%)" in printed and "feature cosine" in printed
    lines = {name: line for line in printed.splitlines() for name in ("teacher", "stage 1") if f" {name} " in line}
    assert "91.23 " in lines["teacher"] and "1.0000" in lines["teacher"]
    assert " - " in lines["stage 1"] and "0.8765" in lines["stage 1"]


def test_the_picture_has_a_panel_a_stage_and_two_of_scores(run: RunFolder) -> None:
    for number in (1, 3):
        run.stage(number).path.mkdir()
        log = MetricLog(run.stage(number).path)
        for step in (1, 2):
            log.append({"split": "train", "step": step, "loss": 0.0 if number == 3 else 1 / step})
        log.close()
    widths = []
    for report in (None, REPORT):
        draw_report(run, report)
        with Image.open(run.picture) as picture:
            widths.append(picture.width)
            assert len(picture.convert("L").getcolors()) > 10, "more than an empty page"
    assert widths == pytest.approx([2 * 4.2 * 110, 4 * 4.2 * 110], abs=2)
    assert [path.name for path in run.path.glob("*.png")] == ["report.png"]


def test_what_the_panels_show(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stage(2).path.mkdir()
    log = MetricLog(run.stage(2).path)
    for split, step, loss in (("train", 1, 4.0), ("train", 2, 2.0), ("val", 2, 3.0)):
        log.append({"split": split, "step": step, "loss": loss})
    log.close()
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **options: figures.append(self) or savefig(self, *given)
    )
    draw_report(run, REPORT)
    curves, scores, cosines = figures[0].axes
    assert curves.get_title() == "Stage 2: feature alignment" and curves.get_yscale() == "log"
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in curves.lines}
    assert drawn == {"train": ([1, 2], [4.0, 2.0]), "val": ([2], [3.0])}
    for axis, title, values, labels in (
        (scores, "top-1 (%)", [0.0, 91.23456], ["0.0", "91.2"]),
        (cosines, "feature cosine to the teacher", [0.876543, 1.0], ["0.877", "1.000"]),
    ):
        assert axis.get_title() == title and [bar.get_width() for bar in axis.patches] == values
        # From the bottom up: the first row on top.
        assert [label.get_text() for label in axis.get_yticklabels()] == ["stage 1", "teacher"]
        assert [text.get_text() for text in axis.texts] == labels
        assert axis.get_xlim() == pytest.approx((0.0, 1.2 * max(values)))
