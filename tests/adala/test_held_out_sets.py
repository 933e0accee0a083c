"""Several held-out sets by name: each gets the numbers that it has alone, whatever ranks, stage and measure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import write_tiny_recipe
from tiny_scenes import write_scene_recipe
from tiny_stage import build_trainer, run

from adala.comparison import Comparer, Comparison
from adala.config import load_recipe
from adala.contenders import TEACHER, build_teacher_contender, linearize_contender
from adala.data import write_shards
from adala.distributed import SharedError, rank
from adala.evaluate import output_folder, run_evaluation
from adala.evaluation import FeatureStore
from adala.evaluation_command import parse_evaluation
from adala.metrics import held_out_splits, read_metrics
from adala.plan import RunPlan, resolve_run
from adala.protocol import KnnConfig, ProbeConfig, Protocol, SegmentationConfig
from adala.report import read_report
from adala.runs import RunFolder

# Of the run's own shards 14; of a darker kind 9; one.
SETS = {"photos": "val", "dark": "dark", "single": "single"}


def write_set(folder: Path, split: str, count: int, contrast: int) -> None:
    generator, samples = np.random.default_rng(count), []
    for index in range(count):
        pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[..., index % 3] += contrast
        samples.append({"png": Image.fromarray(pixels), "cls": index % 3})
    write_shards(samples, folder, split, samples_per_shard=5)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_tiny_recipe(tmp_path)
    write_set(tmp_path / "shards", "dark", 9, 8)
    write_set(tmp_path / "shards", "single", 1, 40)
    return path


def shards(recipe: Path, name: str) -> str:
    return str(recipe.parent / "shards" / f"{SETS[name]}-*.tar")


def named(recipe: Path, *names: str) -> list[str]:
    """Options that give ``data.val`` sets of these names."""
    return [f"--data.val.{name}={shards(recipe, name)}" for name in names]


def plain(recipe: Path, name: str) -> list[str]:
    return [f"--data.val={shards(recipe, name)}"]


def evaluate(recipe: Path, number: int, overrides: list[str]) -> dict[str, float]:
    return build_trainer(recipe, number, ["--evaluation.monitor_samples=13", *overrides]).evaluate()


@pytest.mark.parametrize(("number", "zero"), [(1, "zero3"), (2, "zero1"), (3, "zero3")])
def test_each_set_is_measured_as_if_it_were_alone(recipe: Path, number: int, zero: str) -> None:
    """On two ranks, of which one has no sample of the smallest set; under ZeRO-3 it computes along."""
    expected = {}
    for name in SETS:
        (alone,) = on_ranks(1, evaluate, recipe, number, plain(recipe, name))
        expected |= {f"{name}/{key}": value for key, value in alone.items()}
    assert "photos/loss" in expected and len({expected[f"{name}/loss"] for name in SETS}) == 3
    (recipe.parent / "metrics.jsonl").unlink()
    first, second = on_ranks(2, evaluate, recipe, number, [*named(recipe, *SETS), f"--ds_config={zero}"])
    assert first == second == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert list(first) == list(expected), "in the recipe's order"
    assert held_out_splits(recipe.parent) == ["val/photos", "val/dark", "val/single"]
    for name in SETS:
        (row,) = read_metrics(recipe.parent, f"val/{name}")
        assert {f"{name}/{key}": row[key] for key in row if f"{name}/{key}" in first} == {
            key: value for key, value in first.items() if key.startswith(name)
        }


def without_usable(recipe: Path, empty: str, on: tuple[int, ...]) -> str:
    trainer = build_trainer(recipe, 2, named(recipe, *SETS))
    if rank() in on:
        trainer.evaluation_loaders = {**trainer.evaluation_loaders, empty: []}
    with pytest.raises(SharedError) as raised:
        trainer.evaluate()
    return str(raised.value)


@pytest.mark.parametrize(("empty", "on"), [("photos", (1,)), ("dark", (0, 1))])
def test_a_set_without_a_usable_sample_is_told_by_name(recipe: Path, empty: str, on: tuple[int, ...]) -> None:
    """Of the first every rank needs one, of the others any rank."""
    said = on_ranks(2, without_usable, recipe, empty, on)
    assert said == [f"a rank found no usable held-out sample: name other shards in data.val.{empty}"] * 2


def test_a_run_scores_every_model_on_every_set(recipe: Path, capfd: pytest.CaptureFixture) -> None:
    """The same numbers as in a report on one set alone; the first is the one that counts."""
    folder = RunFolder(recipe.parent / "runs" / "tiny-run")
    on_ranks(2, run, recipe, (1, 2, 3), *named(recipe, *SETS), "--tensorboard=true")
    said, found = capfd.readouterr().out, read_report(folder)
    assert "stage 1 val/dark step 4" in said and "photos:" in said and "single:" in said
    assert [row.model for row in found.rows] == ["teacher", "linearized", "stage 1", "stage 2", "stage 3"]
    assert all(list(row.sets) == list(SETS) for row in found.rows)
    assert all((row.score, row.feature_cosine) == _numbers(row.sets["photos"]) for row in found.rows)
    stored = json.loads(folder.report.read_text())["rows"][0]
    assert (
        set(stored["sets"]["dark"]) == {"top1", "feature_cosine"} and stored["top1"] == stored["sets"]["photos"]["top1"]
    )
    metrics = folder.stage(3).record().metrics
    assert {key.partition("/")[0] for key in metrics} == set(SETS) and "dark/top1" in metrics
    events = EventAccumulator(str(folder.stage(3).path / "tensorboard"))
    assert "val/dark/top1" in events.Reload().Tags()["scalars"]
    with Image.open(folder.picture) as picture:
        assert picture.width == pytest.approx(9 * 4.2 * 110, abs=2)
    for name in ("dark", "single"):
        on_ranks(1, run, recipe, (1, 2, 3), *plain(recipe, name))
        alone = read_report(folder)
        assert [row.sets for row in alone.rows] == [{}] * 5
        for row, one in zip(found.rows, alone.rows, strict=True):
            assert _numbers(row.sets[name]) == pytest.approx((one.score, one.feature_cosine), abs=2e-2), (
                name,
                row.model,
            )
    # Of a single label nothing is learnt.
    assert [row.sets["single"].score for row in found.rows[:4]] == [None] * 4


def _numbers(scores: Any) -> tuple[float | None, float]:
    return scores.score, scores.feature_cosine


def test_a_report_is_of_all_sets_in_their_order(recipe: Path) -> None:
    """Its conditions, as JSON gives them back: of a plain source a digest, as ever."""

    def conditions(overrides: list[str]) -> Any:
        found = resolve_run(load_recipe(str(recipe), overrides), ()).evaluation.conditions["data.val"]
        assert json.loads(json.dumps(found)) == found
        return found

    one, both = conditions(plain(recipe, "photos")), conditions(named(recipe, "photos", "dark"))
    assert one.startswith("sha256:") and both[0] == ["photos", one] and both[1][0] == "dark"
    assert conditions(named(recipe, "photos")) != one
    assert conditions(named(recipe, "dark", "photos")) == both[::-1] != both, "another one counts"
    write_set(recipe.parent / "shards", "dark", 12, 8)
    assert conditions(named(recipe, "photos", "dark"))[0] == both[0] != conditions(named(recipe, "photos", "dark"))[1]
    assert conditions(named(recipe, "photos", "dark"))[1] != both[1]


def refusal(recipe: Path, *overrides: str, stages: tuple[int, ...] = (2,)) -> str:
    with pytest.raises(ValueError) as raised:
        resolve_run(load_recipe(str(recipe), list(overrides)), stages)
    return str(raised.value)


def test_what_a_set_cannot_be_is_said_by_its_key(recipe: Path) -> None:
    assert refusal(recipe, "--data.val.2nd=a").startswith("data.val is {'2nd': ['a']}: it must be at least one shard")
    assert refusal(recipe, "--data.val.a=a", "--data.val.a=b") == "command line: --data.val.a stands there twice"
    photos = named(recipe, "photos")
    assert refusal(recipe, *photos, f"--data.val={shards(recipe, 'dark')}").startswith(
        "command line: data.val.photos lies below val, which is"
    )
    missing = refusal(recipe, *photos, f"--data.val.none={recipe.parent}/none-*.tar")
    assert missing.startswith("data.val.none: cannot read the shard index")
    write_shards([{"png": Image.new("RGB", (16, 16))}] * 16, recipe.parent / "plain", "val", samples_per_shard=16)
    unlabelled = refusal(recipe, *photos, f"--data.val.plain={recipe.parent}/plain", stages=(3,))
    assert unlabelled.startswith("Stage 3 needs targets for classification, and data.val.plain has none: most samples")


def test_sets_without_samples_or_fewer_than_ranks(recipe: Path) -> None:
    def of_ranks(overrides: list[str]) -> str:
        return refusal(recipe, *overrides)

    index = recipe.parent / "shards" / "index.json"
    stored = json.loads(index.read_text())
    said = on_ranks(2, of_ranks, named(recipe, "single", "photos"))
    assert said == ["data.val.single holds 1 samples, fewer than the 2 ranks"] * 2
    for shard in stored["shards"]:
        if shard["name"].startswith("dark"):
            (index.parent / shard["name"]).write_bytes(bytes(10240))  # an archive without a file
            shard |= {"samples": 0, "bytes": 10240}
    index.write_text(json.dumps(stored))
    said = refusal(recipe, *named(recipe, "photos", "dark"))
    assert said.startswith("data.val.dark") and "no" in said, said


def compare(plan: RunPlan, store: Path) -> Comparison:
    teacher = build_teacher_contender(plan.model)
    contenders = {TEACHER: teacher, "linearized": linearize_contender(plan.model, teacher)}
    asked = Protocol(
        name="of the test",
        measures=["features", "knn", "probe", "segmentation"],
        knn=KnnConfig(k=[3]),
        probe=ProbeConfig(l2=1e-2),
        segmentation=SegmentationConfig(rates=[0.03], epochs=3, batch_size=3, colour_bins=4),
    )
    return Comparer(contenders, plan.data, plan.evaluation, asked, FeatureStore(store)).compare()


def compare_sets(recipe: Path, overrides: list[str], store: Path) -> Comparison:
    return compare(resolve_run(load_recipe(str(recipe), overrides), ()), store)


@pytest.mark.parametrize("task", ["classification", "segmentation", "sliding"])
def test_every_measure_of_a_set_is_that_of_it_alone(tmp_path: Path, task: str) -> None:
    if task == "classification":
        recipe = write_tiny_recipe(tmp_path)
        folder = tmp_path / "shards"
        write_set(folder, "dark", 9, 8)
    else:
        recipe = write_scene_recipe(tmp_path)
        folder = tmp_path / "scenes"
    sets = {
        "one": str(folder / "val-*.tar"),
        "two": str(folder / ("dark-*.tar" if task == "classification" else "train-*.tar")),
    }
    options = ["--stage3.task.inference=slide"] if task == "sliding" else []
    together = [*options, *(f"--data.val.{name}={shards}" for name, shards in sets.items())]
    first, second = on_ranks(2, compare_sets, recipe, together, tmp_path / "together")
    assert first.measures == second.measures
    expected = {}
    for name, shards in sets.items():
        alone = compare_sets(recipe, [*options, f"--data.val={shards}"], tmp_path / "alone")
        for model, measures in alone.measures.items():
            expected.setdefault(model, {}).update({f"{name}/{key}": value for key, value in measures.items()})
        assert first.samples[f"held-out {name}"] == alone.samples["held-out"]
    assert {model: set(found) for model, found in first.measures.items()} == {m: set(f) for m, f in expected.items()}
    for model, measures in expected.items():
        assert first.measures[model] == pytest.approx(measures, rel=1e-4), model
    wanted = {"classification": "probe_top1", "segmentation": "probe_miou", "sliding": "probe_miou"}[task]
    assert first.measures[TEACHER][f"one/{wanted}"] != first.measures[TEACHER][f"two/{wanted}"]
    assert list(first.measures)[2:] == ([] if task == "classification" else ["majority class", "colour table"])


@torch.no_grad()
def test_the_command_tells_of_every_set(recipe: Path, tmp_path: Path) -> None:
    measures = "--protocol.measures=[features,blocks,knn,probe]"
    command = parse_evaluation(
        ["--recipe", str(recipe), "--models", "linearized", "--pictures", measures, "--protocol.blocks.images=4",
         "--protocol.probe.epochs=1", "--protocol.knn.k=[3]", *named(recipe, "photos", "dark")]
    )  # fmt: skip
    run_evaluation(command)
    folder = output_folder(command)
    found = json.loads((folder / "evaluation.json").read_text())
    assert list(found["data"]["held_out"]) == list(found["data"]["held_out_digest"]) == ["photos", "dark"]
    assert found["data"]["samples"] == {"held-out photos": 14, "held-out dark": 9, "training": 40}
    measured = found["models"][0]["measures"]
    of_one = {"feature_cosine", "patch_cosine", "cls_cosine", "relative_error", "knn3_top1", "probe_top1"}
    assert set(measured) == {f"{name}/{key}" for name in ("photos", "dark") for key in of_one}
    assert set(found["kept"]["linearized"]) >= {"photos/probe_top1", "dark/knn3_top1"}
    text = (folder / "evaluation.md").read_text()
    assert "photos/probe top-1" in text and "dark/feature_cosine" not in text and "dark/feature cosine" in text
    assert {path.stem for path in folder.glob("*.png")} == {"features_photos", "features_dark", "blocks"}
