"""Budgets, rows from a run's report, and one real adaptation of a tiny recipe."""

import json

import accuracy
import pytest
from accuracy import conversions_of, divide_steps, fill_in_scores, measure_accuracy
from report import AccuracyRow
from tiny_run import write_tiny_recipe

from adala.config import load_recipe
from adala.conversion import ADALA, Conversion, ConversionStep


def test_every_conversion_gets_the_same_number_of_steps():
    recipe = load_recipe("tiny")
    for mechanism in ("hedgehog", "lolcats", "linformer", "monarch"):
        for conversion in conversions_of(mechanism).values():
            assert sum(divide_steps(recipe, conversion, 240).values()) == 240
    assert set(divide_steps(recipe, conversions_of("hedgehog")["native"], 240)) == {1, 3}
    assert divide_steps(recipe, conversions_of("linformer")["native"], 240) == {3: 240}


def test_steps_keep_the_recipes_proportions(tmp_path):
    recipe = load_recipe(str(write_tiny_recipe(tmp_path)), ["--stage2.steps", "8"])
    assert divide_steps(recipe, ADALA, 40) == {1: 10, 2: 20, 3: 10}
    assert divide_steps(recipe, ADALA, 41) == {1: 10, 2: 20, 3: 11}


def test_budgets_that_cannot_be_equal_are_refused(tmp_path):
    recipe = load_recipe(str(write_tiny_recipe(tmp_path)), ["--stage2.global_batch_size", "16"])
    with pytest.raises(ValueError, match="batch sizes"):
        divide_steps(recipe, ADALA, 40)
    with pytest.raises(ValueError, match="1 steps do not divide over 3 stages"):
        divide_steps(load_recipe("tiny"), ADALA, 1)


def test_softmax_and_linear_have_no_conversion_of_their_own():
    assert set(conversions_of("softmax")) == set(conversions_of("linear")) == {"adala"}


def test_scores_of_a_row():
    scores = [("teacher", 80.0, 1.0), ("linearized", 10.0, 0.1), ("stage 1", 40.0, 0.5), ("stage 2", 70.0, 0.9)]
    scores += [("stage 3", 76.0, 0.8)]
    scores = [{"model": model, "top1": top1, "feature_cosine": cosine} for model, top1, cosine in scores]
    row = AccuracyRow("linear", "adala", {"1": 1, "2": 2, "3": 1})
    fill_in_scores(row, scores)
    assert (row.top1, row.aligned_top1, row.feature_cosine, row.aligned_cosine) == (76.0, 70.0, 0.8, 0.9)
    assert row.teacher_top1 == 80.0 and row.kept == 0.95
    row = AccuracyRow("hedgehog", "native", {"1": 2, "3": 2})
    fill_in_scores(row, [score for score in scores if score["model"] != "stage 2"])
    assert row.top1 == 76.0 and row.aligned_top1 is None


def test_a_run_that_fails_is_a_row(tmp_path, monkeypatch):
    def adapt(recipe, mechanism, name, *rest):
        if name == "native":
            return [], "error: it is not there yet (exit code 1)"
        return [{"model": m, "top1": None, "feature_cosine": 0.5} for m in ("teacher", "stage 2", "stage 3")], None

    monkeypatch.setattr(accuracy, "adapt", adapt)
    rows = measure_accuracy("tiny", ["linear", "lolcats"], 10, tmp_path)
    assert [(row.mechanism, row.conversion, row.error is None) for row in rows] == [
        ("linear", "adala", True),
        ("lolcats", "adala", True),
        ("lolcats", "native", False),
    ]
    assert rows[0].kept is None and rows[0].feature_cosine == 0.5
    assert {row.images_seen for row in rows} == {640}
    assert "not there yet" in rows[2].error


def test_a_real_adaptation(tmp_path):
    """Natively, so that only one stage is trained."""
    recipe = write_tiny_recipe(tmp_path)
    native = Conversion("native", (ConversionStep("finetuning"),))
    steps = divide_steps(load_recipe(str(recipe)), native, 2)
    scores, error = accuracy.adapt(str(recipe), "cosformer", "native", steps, tmp_path / "runs", ["seed=3"])
    assert error is None
    assert [score["model"] for score in scores] == ["teacher", "linearized", "stage 3"]
    config = (tmp_path / "runs" / "cosformer-native" / "stage3" / "config.yaml").read_text()
    assert "seed: 3" in config and "steps: 2" in config
    json.dumps(scores)
