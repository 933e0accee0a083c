"""Metrics on disk, lines without a terminal, a bar on one."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adala.metrics import read_metrics
from adala.progress import MetricWriter

VALUES = {"loss": 0.5, "block00_loss": 0.25}


def test_jsonl_and_tensorboard(tmp_path, capsys) -> None:
    writer = MetricWriter(tmp_path, "stage 1", 20)
    writer.write("train", 10, VALUES)
    writer.write("val", 10, {"loss": 0.75})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"], row["loss"]) for row in rows] == [("train", 10, 0.5), ("val", 10, 0.75)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/block00_loss")] == [0.25]
    printed = capsys.readouterr().out
    assert "stage 1 train step 10/20  loss 0.5" in printed and "block00" not in printed


def test_a_row_has_its_time_and_tensorboard_is_an_option(tmp_path, capsys, monkeypatch) -> None:
    now = iter([100.0, 100.75, 163.25])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    writer = MetricWriter(tmp_path, "stage 1", 20, tensorboard=False)
    writer.write("train", 1, {"loss": 0.123456})
    writer.write("val", 20, {"loss": 12345678.0, "top1": 50.0})
    writer.close()
    assert [row["time_s"] for split in ("train", "val") for row in read_metrics(tmp_path, split)] == [0.75, 63.25]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert capsys.readouterr().out.splitlines() == [
        "stage 1 train step 1/20  loss 0.1235  [1 s]",
        "stage 1 val step 20/20  loss 1.235e+07  top1 50  [63 s]",
    ]


def test_steps_repeated_after_a_resume_count_once(tmp_path) -> None:
    for steps, loss in (((1, 2, 3), 1.0), ((3, 4), 2.0)):
        writer = MetricWriter(tmp_path, "stage 1", 4, tensorboard=False)
        for step in steps:
            writer.write("train", step, {"loss": loss})
        writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path, "train")] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0),
    ]  # fmt: skip


def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "150")
    writer = MetricWriter(tmp_path, "stage 2", 4, tensorboard=False)
    writer.write("train", 3, VALUES)
    writer.write("val", 3, {"loss": 0.75})
    writer.close()
    printed = capsys.readouterr().out
    assert "3/4" in printed and "stage 2 val step 3" in printed
    assert "stage 2 train step 3/4" not in printed


def test_other_ranks_write_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("adala.progress.rank", lambda: 1)
    writer = MetricWriter(tmp_path / "none", "stage 1", 4)
    writer.write("train", 3, VALUES)
    writer.close()
    assert not (tmp_path / "none").exists() and capsys.readouterr().out == ""


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_next(tmp_path, capsys) -> None:
    def write(step: int) -> None:
        writer = MetricWriter(tmp_path, "stage 1", 4, tensorboard=False)
        writer.write("train", step, {"loss": 1.0})
        writer.close()

    write(1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    assert [row["step"] for row in read_metrics(tmp_path, "train")] == [1]
    assert "1 damaged line left out" in capsys.readouterr().out
    write(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert "the last line was cut short, and is dropped" in capsys.readouterr().out


def test_a_value_that_is_not_finite_is_not_written(tmp_path) -> None:
    writer = MetricWriter(tmp_path, "stage 1", 4, tensorboard=False)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.write("train", 1, {"loss": float("nan")})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
