"""The document as JSON, Markdown and one page: every number in all of them, dashes, kept shares, hostile names."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from adala.evaluation_report import (
    EvaluationDocument,
    ModelRow,
    Picture,
    kept,
    machine_description,
    read_document,
    tables,
    to_html,
    to_json,
    to_markdown,
    write_document,
)
from adala.protocol import describe, load_protocol

PNG = b"\x89PNG\r\n\x1a\n and so on"
TEACHER = {
    "knn20_top1": 80.0,
    "probe_top1": 90.0,
    "miou": 50.0,
    "feature_cosine": 1.0,
    "relative_error": 0.0,
    "images_per_s": 1234.5,
    "peak_memory_mib": 2048.0,
}
STUDENT = {
    "knn20_top1": 79.2,
    "probe_top1": 0.0,
    "miou": None,
    "feature_cosine": 0.98765,
    "relative_error": 0.123449,
    "images_per_s": 1851.75,
    "peak_memory_mib": 512.0,
}


def document(**changes) -> EvaluationDocument:
    values = {
        "title": "A title",
        "command": "python launchers/evaluate.py --models teacher 'a b'",
        "machine": {"device": "a CPU", "threads": 2, "cuda": None},
        "protocol": describe(load_protocol("tiny")),
        "data": {"image_size": [448, 336], "held_out": {"samples": 17, "shards": ["a.tar", "b.tar"]}},
        "models": [
            ModelRow("teacher", "sha256:aa", "softmax", TEACHER),
            ModelRow("stage 2", "runs/x/stage2", "linear", STUDENT, ["no fine-tuned head"]),
            ModelRow("majority class", "of the training labels", None, {"probe_top1": 10.5, "miou": 12.5}),
        ],
        "created": "2026-01-02 03:04 UTC",
    }
    return EvaluationDocument(**{**values, **changes})


class Page(HTMLParser):
    """Cells by row, text, and what is open at the end."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.open, self.words, self.sources, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in ("img", "link", "script"):
            self.sources.append(dict(attributes).get("src", tag))
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


def cells_of(table) -> list[list[str]]:
    return [list(table.columns), *map(list, table.rows())]


def test_kept_is_a_ratio_to_the_teacher_beside_its_speed() -> None:
    shares = kept(document())
    assert shares["teacher"] == dict.fromkeys(
        ("knn20_top1", "probe_top1", "miou", "images_per_s", "peak_memory_mib"), 1.0
    )
    assert shares["stage 2"]["knn20_top1"] == pytest.approx(0.99)
    # A score of 0 is a number, and keeps nothing; one that is missing is not.
    assert shares["stage 2"]["probe_top1"] == 0.0 and shares["stage 2"]["miou"] is None
    assert shares["stage 2"]["images_per_s"] == pytest.approx(1.5)
    assert shares["stage 2"]["peak_memory_mib"] == pytest.approx(0.25)
    assert shares["majority class"]["miou"] == pytest.approx(0.25)
    assert shares["majority class"]["images_per_s"] is None


def test_nothing_is_kept_of_a_teacher_that_is_not_there_or_has_nothing() -> None:
    assert set(kept(document(teacher="somebody"))["stage 2"].values()) == {None}
    zero = ModelRow("teacher", "", "softmax", {"probe_top1": 0.0})
    assert kept(document(models=[zero]))["teacher"]["probe_top1"] is None


def test_the_tables() -> None:
    scores, shares, close, speed = tables(document())
    assert cells_of(scores) == [
        ["model", "mechanism", "kNN 20 top-1", "probe top-1", "mIoU"],
        ["teacher", "softmax", "80.00", "90.00", "50.00"],
        ["stage 2", "linear", "79.20", "0.00", "-"],
        ["majority class", "-", "-", "10.50", "12.50"],
    ]
    assert cells_of(shares) == [
        ["model", "kNN 20 top-1", "probe top-1", "mIoU", "images/s"],
        ["teacher", "100.0 %", "100.0 %", "100.0 %", "1.00 x"],
        ["stage 2", "99.0 %", "0.0 %", "-", "1.50 x"],
        ["majority class", "-", "11.7 %", "25.0 %", "-"],
    ]
    assert cells_of(close) == [
        ["model", "feature cosine", "relative error"],
        ["teacher", "1.0000", "0.0000"],
        ["stage 2", "0.9877", "0.1234"],
    ]
    assert speed.title == "Speed at 448 x 336 px"
    assert cells_of(speed) == [
        ["model", "images/s", "to the teacher's", "peak MiB", "MiB to the teacher's"],
        ["teacher", "1,234.5", "1.00 x", "2,048", "1.00 x"],
        ["stage 2", "1,851.8", "1.50 x", "512", "0.25 x"],
    ]


def test_a_share_stands_beside_an_unknown_speed_as_a_dash() -> None:
    rows = [ModelRow(name, "", "softmax", {"miou": 40.0}) for name in ("teacher", "student")]
    scores, shares = tables(document(models=rows))
    assert list(scores.columns) == ["model", "mechanism", "mIoU"]
    assert shares.columns["images/s"] == ["-", "-"]


def test_the_ratio_of_the_same_rounds_goes_before_the_quotient_of_medians() -> None:
    measures = {"miou": 40.0, "images_per_s": 10.0, "images_per_s_p20": 9.0, "images_per_s_p80": 11.0}
    rows = [
        ModelRow("teacher", "", "softmax", {**measures, "speed_ratio": 1.0}),
        ModelRow("student", "", "linear", {**measures, "images_per_s": 18.0, "speed_ratio": 2.0}),
    ]
    scores, shares, speed = tables(document(models=rows))
    assert list(scores.columns) == ["model", "mechanism", "mIoU"]
    assert shares.columns["images/s"] == speed.columns["to the teacher's"] == ["1.00 x", "2.00 x"]
    assert (speed.columns["images/s"], speed.columns["p20"]) == (["10.0", "18.0"], ["9.0", "9.0"])
    assert kept(document(models=rows))["student"]["images_per_s"] == 2.0


def test_a_measure_of_somebody_elses_task_is_shown_and_not_divided() -> None:
    rows = [ModelRow("teacher", "", "softmax", {"depth_rmse": 0.25}), ModelRow("b", "", "linear", {"depth_rmse": 0.5})]
    (scores,) = tables(document(models=rows))
    assert scores.columns["depth rmse"] == ["0.25", "0.5"]
    assert set(kept(document(models=rows))["b"]) == {"images_per_s", "peak_memory_mib"}


def test_what_is_not_finite_is_no_result() -> None:
    row = ModelRow(
        "student", "", "linear", {"probe_top1": math.nan, "relative_error": math.inf, "miou": torch.tensor(3.5)}
    )
    assert row.measures == {"probe_top1": None, "relative_error": None, "miou": 3.5}
    assert row.notes == ["probe_top1 was nan, which is no result", "relative_error was inf, which is no result"]
    broken = document(models=[row], details={"blocks": [{"relative_error": math.nan}, 0.5]})
    stored = json.loads(json.dumps(to_json(broken), allow_nan=False))
    assert stored["details"] == {"blocks": [{"relative_error": None}, 0.5]}


def test_models_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="two models are called a: give each a name of its own"):
        document(models=[ModelRow("a", "", None, {}), ModelRow("a", "", None, {})])


def test_json_round_trip(tmp_path: Path) -> None:
    given = document(details={"iou_by_class": [0.5, None]})
    write_document(tmp_path, given)
    assert read_document(tmp_path / "evaluation.json") == given
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["kept"]["stage 2"]["images_per_s"] == 1.5 and stored["kept"]["stage 2"]["miou"] is None
    for name, text in (("none.json", None), ("other.json", "[]"), ("half.json", '{"models": [{"name": 1}]}')):
        if text:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} holds no results of an evaluation"):
            read_document(tmp_path / name)
    (tmp_path / "cut.json").write_text('{"models": [')
    with pytest.raises(ValueError, match=r"cut\.json is damaged"):
        read_document(tmp_path / "cut.json")


def test_what_is_written_and_in_which_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_document(tmp_path / "new", document(), [Picture("features", "A caption.", PNG)])
    names = ["evaluation.html", "evaluation.json", "evaluation.md", "features.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert (tmp_path / "new/features.png").read_bytes() == PNG

    # Cut short, the results are not there: the JSON comes last.
    def fail(*_) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr("adala.evaluation_report.to_markdown", fail)
    with pytest.raises(OSError):
        write_document(tmp_path / "cut", document())
    assert not (tmp_path / "cut/evaluation.json").exists()


def test_the_page_is_whole_by_itself_and_has_every_number() -> None:
    text = to_html(document(), [Picture("features", "A caption.", PNG)])
    page = Page(text)
    assert page.open == [] and text.startswith("<!DOCTYPE html>")
    assert page.rows == [row for table in tables(document()) for row in cells_of(table)]
    assert page.sources == ["data:image/png;base64,iVBORw0KGgogYW5kIHNvIG9u"]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    told = set(page.words)
    assert {"A title", "A caption.", document().command, "stage 2: no fine-tuned head"} <= told
    # Machine, protocol, data and origins, by dotted name; what there is not is left out.
    assert {"device", "a CPU", "held_out.samples", "17", "a.tar, b.tar", "knn.k", "10, 20", "runs/x/stage2"} <= told
    assert "cuda" not in told and "protocol tiny, a CPU, 2026-01-02 03:04 UTC" in told


def test_the_markdown_has_every_number_and_lines_up() -> None:
    text = to_markdown(document(), [Picture("features", "A caption.", PNG)])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in rows if not set("".join(row)) <= set("-:")]
    assert rows == [row for table in tables(document()) for row in cells_of(table)]
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len(set(map(len, block.splitlines()))) == 1
    assert "![A caption.](features.png)" in text and "- stage 2: no fine-tuned head" in text
    assert f"    {document().command}\n" in text and "- held_out.samples: 17\n" in text


HOSTILE = "<script>alert('x')</script> & \"q\" | `a` [b](c)\n# head \udcff"


def test_hostile_text_is_text(tmp_path: Path) -> None:
    row = ModelRow(HOSTILE, HOSTILE, HOSTILE, {"miou": 1.0}, [HOSTILE])
    given = document(
        title=HOSTILE, command=HOSTILE, machine={HOSTILE: HOSTILE}, data={HOSTILE: {HOSTILE: [HOSTILE]}}, models=[row]
    )
    pictures = [Picture("features", HOSTILE, PNG)]
    write_document(tmp_path, given, pictures)
    assert read_document(tmp_path / "evaluation.json") == given
    page = Page((tmp_path / "evaluation.html").read_text(encoding="utf-8"))
    assert page.open == [] and "script" not in page.tags
    assert page.rows[1][0] == HOSTILE.replace("\udcff", "?")
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    outside = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any("<script>" in line or line.startswith("# head") for line in outside)
    (line,) = [line for line in outside if line.startswith("| &lt;script")]
    assert r"\| \`a\` \[b\](c)" in line


def test_the_machine_is_described() -> None:
    found = machine_description(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["device_type"] == "cpu" and found["device"] == found["cpu"] and found["cuda"] is None
    assert found["threads"] == torch.get_num_threads() and found["cpu_cores"] >= 1
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(found[package] for package in ("adala", "timm", "deepspeed"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
