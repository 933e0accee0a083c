"""The schema of results.json, and what the report says in words."""

import dataclasses
import json
from pathlib import Path

import pytest
from report import markdown, page, write_report
from results import AccuracyRow, CrossoverRow, Results, Row, SweepRow, read_results, to_json
from sentences import Sentences

DOCUMENT = Path(__file__).parents[2] / "docs" / "BENCH.md"
MACHINE = {"backbone": "vit_small_patch16_224", "patch_size": [16, 16], "num_prefix_tokens": 1, "softmax": "fused"}


def timed(mechanism: str, res: int, ratio: float, ceiling: float = 0.5, **changes) -> Row:
    tokens = (res // 16) ** 2 + 1
    speeds = {"latency_ms_p20": 9.9, "latency_ms_p50": 10.0, "latency_ms_p80": 10.1, "throughput_img_s": 100.0}
    ratios = {"ratio_vs_softmax": ratio, "ratio_vs_none": ceiling, "rounds": 5, "gate": "green"}
    return Row(mechanism, res, tokens, **{**speeds, **ratios, **changes})


def failed(mechanism: str, res: int, kind: str) -> Row:
    return Row(mechanism, res, error="it failed", error_kind=kind, gate="red" if kind == "gate" else "not run")


def answer(results: Results) -> list[str]:
    return Sentences(results)("answer")


def verdict(results: Results) -> str:
    (said,) = Sentences(results)("verdict")
    return said


@pytest.fixture
def results() -> Results:
    rows = [timed("softmax", 256, 1.0), timed("linear", 256, 0.5), timed("monarch", 256, 0.4)]
    rows += [timed("softmax", 512, 1.0), timed("linear", 512, 2.0), failed("monarch", 512, "out of memory")]
    return Results(dict(MACHINE), rows)


def test_every_field_of_the_schema_is_documented():
    text = DOCUMENT.read_text()
    for row_class in (Row, SweepRow, CrossoverRow, AccuracyRow, Results):
        for field in dataclasses.fields(row_class):
            assert f"`{field.name}`" in text, f"docs/BENCH.md does not explain {row_class.__name__}.{field.name}"


def test_the_schema_survives_a_round_trip(results, tmp_path):
    results.accuracy.append(AccuracyRow("linear", "adala", {"1": 2}, 128, 80.0, kept=0.9))
    results.sweep.append(SweepRow("linear", "network", 65, 3.0, 0.9))
    results.crossover.append(CrossoverRow("linear", "network", "never", None, 65, 257))
    write_report(tmp_path, results)
    assert read_results(tmp_path / "results.json") == results


def test_names_that_the_issue_fixes(results):
    stored = to_json(results)
    assert set(stored) >= {"machine", "rows"}
    fixed = "mechanism res tokens params_m gmacs peak_mem_mib latency_ms_p50 throughput_img_s ratio_vs_softmax"
    assert set(f"{fixed} ratio_vs_none gate error".split()) <= set(stored["rows"][0])


def test_what_is_no_number_becomes_null(results, tmp_path):
    results.rows[0].gate_error = float("nan")
    write_report(tmp_path, results)
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["gate_error"] is None


@pytest.mark.parametrize("change", [{"schema": 0}, {"rows": [{"mechanism": "linear", "speed": 3}]}])
def test_another_schema_is_refused(change, results, tmp_path):
    write_report(tmp_path, results)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="schema"):
        read_results(path)


def test_the_answer_in_words(results):
    said = answer(results)
    assert said[0].startswith("**At 256 px (257 tokens) no mechanism is faster than softmax**")
    assert "1 of 1 mechanisms" in said[1] or "all 1" in said[1] or "linear (AdaLA) at 2.00 times" in said[1]
    size = next(sentence for sentence in said if "From which size on" in sentence)
    # Half as fast at 257 tokens and twice as fast at 1025: the geometric mean of the two.
    assert "linear (AdaLA) from about 513 tokens (362 px)" in size and "monarch never in the range" in size
    assert any("--accuracy" in sentence for sentence in said)
    assert said[-1] == "Without a result: monarch at 512 px (out of memory)."


def test_the_verdict_is_one_sentence(results):
    assert verdict(results).startswith("In speed yes, from about 513 tokens (362 px) on; below that softmax")
    assert "at best 2.00 times" in verdict(results)
    results.crossover = [CrossoverRow("linear", "network", "never", None, 65, 257)]
    assert verdict(results).startswith("In speed no, at no size measured")
    assert verdict(Results({})) == "No linear mechanism was compared with softmax in this run."
    assert markdown(results).splitlines()[2].startswith("**In speed no, at no size")


def test_a_sweep_replaces_the_interpolation(results):
    results.crossover = [
        CrossoverRow("linear", "network", "within", 300.0, 65, 4097),
        CrossoverRow("linear", "operator", "within", 100.0, 65, 4097),
        CrossoverRow("monarch", "network", "never", None, 65, 4097),
    ]
    size = next(sentence for sentence in answer(results) if "From which size on" in sentence)
    assert "swept from 65 to 4,097 tokens" in size
    assert "linear (AdaLA) from about 300 tokens" in size and "monarch never in the range" in size


def test_a_restless_machine_is_told(results):
    assert "caution" not in answer(results)[0]
    for row in results.rows:
        if row.latency_ms_p50:
            row.latency_ms_p80 = 14.0
    assert "caution" in answer(results)[0]
    assert verdict(results).endswith("measure again.")


def test_what_cannot_be_is_told(results):
    results.rows[1].ratio_vs_none = 1.2
    assert "which cannot be" in answer(results)[0]


def test_failures_are_red_rows_with_their_message(results):
    results.rows.append(failed("hedgehog", 512, "gate"))
    whole = page(results)
    assert whole.count('<tr class="red">') == 2
    assert "gate: it failed" in whole and "out of memory: it failed" in whole
    assert "gate: it failed" in markdown(results)


def test_text_from_errors_is_escaped(results):
    results.rows[-1].error = "<script>alert(1)</script> | a"
    assert "<script>" not in page(results)
    assert "\\| a" in markdown(results)


def test_a_report_without_anything_measured_is_still_written(tmp_path):
    write_report(tmp_path, Results({}))
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("name", ["cpu", "h100/best", "h100/paper"])
def test_the_published_reports_are_read_and_told_as_they_were(name: str):
    """docs/bench: the same sentences, tables and notes, but for where GMACs come from."""
    published = DOCUMENT.parent / "bench" / name
    told = markdown(read_results(published / "results.json")).splitlines()
    before = (published / "report.md").read_text().splitlines()
    assert len(told) == len(before)
    changed = [line for line, earlier in zip(told, before, strict=True) if line != earlier]
    assert all("by pytorch's counter" in line.lower() for line in changed)


def test_empty_columns_are_left_out_and_missing_numbers_are_dashes(results):
    told = markdown(results)
    assert "| mechanism | ms p20 | p50 | p80 | images/s | vs softmax | vs none | gate |" in told
    assert "train images/s" not in told
    results.rows[1].train_img_s = 3.0
    assert "| linear (AdaLA) | 9.9 | 10.0 | 10.1 | 100.00 | 0.50 x | 0.50 x | 3.00 | green |" in markdown(results)
    assert "| monarch | - | - | - | - | - | - | not run | out of memory: it failed |" in markdown(results)
