"""The whole bench on a network of no size: in a process of its own, and with planted errors in this one."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_all
import torch
from results import AccuracyRow, Results, Row, read_results

from adala.attention import TokenMixer, registry
from adala.attention.linear import LinearMixer
from baselines.performer import PerformerMixer

ROOT = Path(__file__).parents[2]
TINY = ["--backbone", "test_vit", "--model-args", '{"depth": 2}', "--device", "cpu", "--time-budget-s", "1"]
TINY += ["--compile", "off"]
NUMBERS = ("latency_ms_p20", "latency_ms_p50", "latency_ms_p80", "throughput_img_s")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the bench in this process; returns its exit code and its rows by mechanism."""
    monkeypatch.setattr(run_all, "paper_table", list)

    def run(*arguments: str) -> tuple[int, dict[str, Row]]:
        command = [*TINY, "--no-memory", "--rounds", "2", "--res", "64", *arguments, "--out", str(tmp_path)]
        code = run_all.main(command)
        return code, {row.mechanism: row for row in read_results(tmp_path / "results.json").rows}

    return run


def plant(monkeypatch: pytest.MonkeyPatch, forward) -> None:
    """Replaces vanilla linear attention's forward pass; it gets the right output and q, k, v."""
    right = LinearMixer.forward
    monkeypatch.setattr(LinearMixer, "forward", lambda self, q, k, v, t: forward(right(self, q, k, v, t), q, k, v))


def one_wrong_token(out, q, k, v):
    out = out.clone()
    out[..., -1, :] *= 1.2
    return out


def wrong_last_head(out, q, k, v):
    out = out.clone()
    out[:, -1] *= 1.01
    return out


WRONG = {
    "last head": wrong_last_head,
    "scaled": lambda out, q, k, v: 1.05 * out,
    "one token": one_wrong_token,
    "not a number": lambda out, q, k, v: torch.cat((out[..., :3, :], out[..., 3:, :] * torch.nan), dim=-2),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_kernel_turns_its_row_red_and_has_no_speed(kind, bench, monkeypatch):
    plant(monkeypatch, WRONG[kind])
    code, rows = bench("--mechanisms", "softmax", "linear", "none")
    assert code == 1
    assert rows["linear"].gate == "red" and rows["linear"].error_kind == "gate"
    assert all(getattr(rows["linear"], name) is None for name in (*NUMBERS, "ratio_vs_softmax", "ratio_vs_none"))
    for name in ("softmax", "none"):
        assert rows[name].gate == "green" and rows[name].throughput_img_s > 0


def test_out_of_memory_is_a_row_and_no_error(bench, monkeypatch):
    def forward(out, q, k, v):
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    plant(monkeypatch, forward)
    code, rows = bench("--mechanisms", "softmax", "linear")
    assert code == 0
    assert rows["linear"].error_kind == "out of memory" and "80 GiB" in rows["linear"].error
    assert rows["linear"].throughput_img_s is None and rows["linear"].gmacs is None
    assert rows["softmax"].throughput_img_s > 0


def test_out_of_memory_in_the_middle_of_the_rounds(bench, monkeypatch):
    calls = []

    def forward(out, q, k, v):
        if len(q) and q.device.type != "meta":
            calls.append(1)
            if len(calls) > 2 * 4:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return out

    plant(monkeypatch, forward)
    code, rows = bench("--mechanisms", "softmax", "linear")
    assert code == 0
    assert rows["linear"].error_kind == "out of memory" and rows["linear"].gate == "green"
    assert rows["linear"].throughput_img_s is None and rows["softmax"].throughput_img_s > 0


def test_an_exception_is_a_row_with_its_message_and_exit_code_1(bench, monkeypatch):
    monkeypatch.setattr(PerformerMixer, "feature_maps", lambda self, q, k: 1 / 0)
    code, rows = bench("--mechanisms", "softmax", "performer")
    assert code == 1
    assert rows["performer"].error == "ZeroDivisionError: division by zero"
    assert rows["performer"].error_kind == "exception" and rows["performer"].gate == "not run"
    assert rows["softmax"].throughput_img_s > 0


class HalvedMixer(LinearMixer):
    """Another package's mechanism: half of vanilla linear attention, and a reference that says so."""

    def forward(self, q, k, v, layout):
        return 0.5 * super().forward(q, k, v, layout)

    def reference(self, q, k, v, layout, heads=slice(None)):
        return 0.5 * super().reference(q, k, v, layout, heads)


class UncheckableMixer(LinearMixer):
    """Another package's mechanism without a reference."""

    reference = TokenMixer.reference


def test_a_mechanism_of_another_package_is_gated_by_its_own_reference(bench, monkeypatch):
    offered = {"halved": "HalvedMixer", "uncheckable": "UncheckableMixer"}
    known = registry._targets() | {name: f"{__name__}:{attribute}" for name, attribute in offered.items()}
    monkeypatch.setattr(registry, "_targets", lambda: known)
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(**globals()))
    code, rows = bench("--mechanisms", "none", "halved", "softmax", "uncheckable")
    assert list(rows) == ["softmax", "halved", "uncheckable", "none"]
    assert rows["halved"].gate == "green" and rows["halved"].ratio_vs_softmax > 0 and rows["halved"].gmacs > 0
    assert code == 1 and rows["uncheckable"].error_kind == "exception"
    assert "UncheckableMixer has no reference" in rows["uncheckable"].error


def test_training_speed_and_sweep(bench, tmp_path):
    arguments = ("--train", "--sweep", "--sweep-max-tokens", "128", "--sweep-budget-s", "1")
    code, rows = bench("--mechanisms", "softmax", "linear", "none", *arguments)
    assert code == 0
    assert all(row.train_img_s > 0 for row in rows.values())
    assert rows["softmax"].train_ratio_vs_softmax == 1.0
    results = read_results(tmp_path / "results.json")
    assert {(r.mechanism, r.scope, r.tokens) for r in results.sweep} == {
        (name, scope, tokens)
        for name in ("softmax", "linear", "none")
        for scope in ("operator", "network")
        for tokens in (65, 129)
    }
    assert {(r.mechanism, r.scope) for r in results.crossover} == {
        (name, scope) for name in ("linear", "none") for scope in ("operator", "network")
    }


def test_protocol_paper_is_float32_with_unfused_softmax_and_the_tables_options(bench, tmp_path):
    code, rows = bench("--mechanisms", "softmax", "monarch", "linformer", "--protocol", "paper", "--batch", "2")
    assert code == 0
    assert {row.dtype for row in rows.values()} == {"float32"} and {row.batch for row in rows.values()} == {2}
    assert rows["softmax"].sdpa_backend == "unfused"
    assert rows["monarch"].options == {"num_steps": 3, "block_size": 32}
    assert rows["linformer"].options == {"num_landmarks": 32}
    assert rows["linformer"].throughput_img_s == pytest.approx(2000 / rows["linformer"].latency_ms_p50)


def test_compiled_forward_passes(bench, tmp_path):
    code, rows = bench("--mechanisms", "softmax", "linear", "--compile", "on")
    assert code == 0
    assert [row.compiled for row in rows.values()] == [True, True] and rows["linear"].ratio_vs_softmax > 0
    assert "on: used by softmax at 64 px, linear at 64 px" in (tmp_path / "report.md").read_text()


def test_adding_keeps_what_the_earlier_report_had(bench, tmp_path):
    bench("--mechanisms", "softmax", "linear")
    before = read_results(tmp_path / "results.json").rows
    arguments = [*TINY, "--mechanisms", "softmax", "linear", "--out", str(tmp_path), "--add"]
    assert run_all.main([*arguments, "--sweep", "--sweep-max-tokens", "64", "--sweep-budget-s", "1"]) == 0
    results = read_results(tmp_path / "results.json")
    assert results.rows == before and results.sweep
    assert any(note.startswith("sweep measured on ") for note in results.notes)


def found(date: str, **parts) -> Results:
    machine = {"date": date, "device": "CPU", "threads": 2, "commit": "c" + date}
    if "accuracy" in parts:
        machine["recipe"] = "tiny"
    return Results(machine, notes=["backbone of " + date], **parts)


def test_parts_measured_apart_keep_their_conditions_whatever_comes_first():
    rows = found("1", rows=[Row("linear", 64)])
    accuracy = found("2", accuracy=[AccuracyRow("linear", "adala")])
    note = "accuracy measured on 2: CPU, 2 threads, commit c2"
    for whole in (run_all.merged(rows, accuracy), run_all.merged(accuracy, rows)):
        assert (whole.machine["date"], whole.machine["recipe"]) == ("1", "tiny")
        assert whole.rows == rows.rows and whole.accuracy == accuracy.accuracy
        assert whole.notes == ["backbone of 1", note]
    again = run_all.merged(run_all.merged(rows, accuracy), found("3", rows=[Row("linear", 96)]))
    assert again.notes == ["backbone of 3", note] and again.accuracy == accuracy.accuracy
    assert "recipe" not in rows.machine
    newer = run_all.merged(whole, found("4", accuracy=[AccuracyRow("monarch", "adala")]))
    assert newer.notes[1:] == ["accuracy measured on 4: CPU, 2 threads, commit c4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mechanisms", "reformer"], "--mechanisms reformer: the bench has softmax"),
        (["--backbone", "resnet18"], "plain timm ViT"),
        (["--backbone", "no_such_vit"], "timm knows no model"),
        (["--backbone", "test_vit", "--res", "8"], "--res 8: smaller than one patch"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, capsys):
    assert run_all.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and len(said.splitlines()) == 1


def test_the_program(tmp_path):
    """Two resolutions with memory, as a user starts it."""
    command = [sys.executable, str(ROOT / "bench" / "run_all.py"), *TINY, "--res", "64", "100", "--rounds", "2"]
    command += ["--mechanisms", "softmax", "linear", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("backbone test_vit") and "as asked for" in lines[0]
    assert any(line == "100 px is not divisible by the patch of 16 px: rounded down to 96 px" for line in lines)

    stored = json.loads((tmp_path / "results.json").read_text())
    assert [(row["mechanism"], row["res"], row["tokens"]) for row in stored["rows"]] == [
        ("softmax", 64, 17),
        ("linear", 64, 17),
        ("softmax", 96, 37),
        ("linear", 96, 37),
    ]
    for row in stored["rows"]:
        assert row["error"] is None and row["gate"] == "green"
        assert row["gmacs"] == row["gmacs_counted"]
        assert row["peak_mem_mib"] >= row["weights_mib"] > 0 and row["activations_mib"] >= 0
        assert row["latency_ms_p20"] <= row["latency_ms_p50"] <= row["latency_ms_p80"]
        assert row["energy_mj_per_image"] is None and row["train_img_s"] is None
        assert row["rounds"] == 2
        assert row["ratio_vs_softmax_low"] <= row["ratio_vs_softmax"] <= row["ratio_vs_softmax_high"]
    assert [row["ratio_vs_softmax"] for row in stored["rows"]][::2] == [1.0, 1.0]
    assert stored["machine"]["freed_memory_kept"] == (platform.libc_ver()[0] == "glibc")
    assert isinstance(stored["machine"]["huge_pages"], bool)

    text = (tmp_path / "report.md").read_text()
    assert "### 96 x 96 px, 37 tokens" in text and "304,198,656" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") >= 3
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "<script" not in page
    assert str(tmp_path) not in page + text + json.dumps(stored)
