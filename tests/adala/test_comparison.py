"""Models compared: every measure against its plain computation, on one rank and two, and nothing computed twice."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import on_ranks
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from tiny_run import read_tiny_val, write_tiny_recipe, write_tiny_shards
from tiny_scenes import IGNORED, NUM_CLASSES, write_scene_recipe
from tiny_teacher import build_tiny_teacher
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from adala.attention import TokenLayout
from adala.comparison import Comparer, Comparison
from adala.config import load_recipe
from adala.contenders import TEACHER, Contender, build_teacher_contender, linearize_contender, load_contender
from adala.data import write_shards
from adala.evaluation import DenseFeatures, DenseHead, DenseSettings, FeatureStore, fit_dense_probe, precision
from adala.evaluation.feature_store import ROWS
from adala.evaluation.token_rows import FrozenHead
from adala.export import save_student
from adala.plan import RunPlan, resolve_run
from adala.protocol import KnnConfig, ProbeConfig, Protocol, SegmentationConfig
from adala.tasks import describe_task, read_task

PROBE = ProbeConfig(l2=1e-2)
SEGMENTATION = SegmentationConfig(rates=[0.03], epochs=8, batch_size=3, colour_bins=16)


def protocol(*measures: str, **changes: Any) -> Protocol:
    sections = {"knn": KnnConfig(k=[3, 10]), "probe": PROBE, "segmentation": SEGMENTATION, **changes}
    return Protocol(name="of the test", measures=list(measures), **sections)


def plan_of(recipe: Path, *overrides: str) -> RunPlan:
    return resolve_run(load_recipe(str(recipe), list(overrides)), ())


def export(plan: RunPlan, folder: Path, seed: int, task: Mapping[str, Any] | None = None) -> Path:
    """A student whose weights have been moved at random, with a random head for ``task`` where there is one."""
    teacher = build_teacher_contender(plan.model)
    student = linearize_contender(plan.model, teacher).model
    generator, head = torch.Generator().manual_seed(seed), None
    with torch.no_grad():
        for block in student.blocks:
            block.attn.proj.weight += 0.1 * torch.randn(block.attn.proj.weight.shape, generator=generator)
    if task is not None:
        head = read_task(dict(task)).build_head(student)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        task = describe_task(read_task(dict(task)))
    description = dataclasses.replace(plan.model.student, task=task)
    save_student(folder, student.state_dict(), description, None if head is None else head.state_dict())
    return folder


def contenders_of(plan: RunPlan, **folders: Path) -> dict[str, Contender]:
    teacher = build_teacher_contender(plan.model)
    students = {name: load_contender(folder) for name, folder in folders.items()}
    return {TEACHER: teacher, "linearized": linearize_contender(plan.model, teacher), **students}


def compare(plan: RunPlan, contenders: Mapping[str, Contender], asked: Protocol, store: Path) -> Comparison:
    return Comparer(contenders, plan.data, plan.evaluation, asked, FeatureStore(store)).compare()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose classes are hard to tell, and a student with a head."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = write_tiny_recipe(folder)
    write_tiny_shards(folder / "shards", contrast=12)
    export(plan_of(recipe), folder / "tuned", 1, {"name": "classification", "num_classes": 3})
    return folder


def pooled(model: torch.nn.Module, images: Tensor, pooling: str) -> np.ndarray:
    with torch.no_grad():
        tokens = model(images)
    parts = {"cls": tokens[:, 0], "patch": tokens[:, 1:].mean(1)}
    return torch.cat([parts[part] for part in pooling.split("_")], 1).double().numpy()


def standardised(train: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(0), train.std(0, ddof=1)
    return (train - mean) / std, (held_out - mean) / std


@torch.no_grad()
@pytest.mark.parametrize(
    ("knn_pooling", "probe_pooling", "train_samples", "held_out_samples"),
    [("cls", "cls_patch", None, None), ("patch", "cls", 22, 9)],
    ids=["all", "the first"],
)
def test_classification_is_measured_as_computed_plainly(
    tiny: Path,
    tmp_path: Path,
    knn_pooling: str,
    probe_pooling: str,
    train_samples: int | None,
    held_out_samples: int | None,
) -> None:
    plan = plan_of(tiny / "recipe.yaml")
    contenders = contenders_of(plan, tuned=tiny / "tuned")
    probe = dataclasses.replace(PROBE, pooling=probe_pooling, train_samples=train_samples)
    knn = KnnConfig(k=[3, 10], temperature=0.2, pooling=knn_pooling)
    asked = protocol("features", "knn", "probe", "head", knn=knn, probe=probe, held_out_samples=held_out_samples)
    found = compare(plan, contenders, asked, tmp_path)
    images, labels = (part[:held_out_samples] for part in read_tiny_val(tiny / "shards"))
    train_images, train_labels = (part[:train_samples] for part in read_tiny_val(tiny / "shards", "train"))
    teacher = contenders[TEACHER].model
    for name, one in contenders.items():
        ours, theirs = one.model(images), teacher(images)
        cosine = F.cosine_similarity(ours, theirs, dim=-1)
        expected = {
            "feature_cosine": cosine.mean().item(),
            "patch_cosine": cosine[:, 1:].mean().item(),
            "cls_cosine": cosine[:, 0].mean().item(),
            "relative_error": ((ours - theirs).norm() / theirs.norm()).item(),
        }
        for k in (3, 10):
            neighbours = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.2))
            neighbours.fit(pooled(one.model, train_images, knn_pooling), train_labels)
            expected[f"knn{k}_top1"] = 100 * neighbours.score(pooled(one.model, images, knn_pooling), labels)
        values = [pooled(one.model, each, probe_pooling) for each in (train_images, images)]
        train, held_out = standardised(*values)
        linear = LogisticRegression(C=1 / (len(train) * 1e-2), tol=1e-6, max_iter=2000).fit(train, train_labels)
        expected["probe_top1"] = 100 * linear.score(held_out, labels)
        if one.head is not None:
            logits = one.head(ours, one.model.token_layout(images))
            expected["head_top1"] = 100 * (logits.argmax(1) == labels).double().mean().item()
        assert found.measures[name] == pytest.approx(expected, abs=1e-5), name
    of_all = [list(measures.values()) for measures in found.measures.values()]
    assert len({tuple(values[:2]) for values in of_all}) == 3, "models that a mistake would mix up"
    assert list(found.measures) == [TEACHER, "linearized", "tuned"] and not any(found.notes.values())
    assert found.samples == {"held-out": held_out_samples or 14, "training": train_samples or 40}
    assert found.unusable == 0
    assert found.left_out == {}


def test_the_grid_of_rates_is_told(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny / "recipe.yaml")
    sgd = ProbeConfig(solver="sgd", rates=[1e-3, 0.1], epochs=2, batch_size=8, pooling="cls")
    contenders = {TEACHER: build_teacher_contender(plan.model)}
    found = compare(plan, contenders, protocol("probe", probe=sgd), tmp_path)
    chosen = found.details["chosen_rates"][TEACHER]["probe"]
    assert chosen["rate"] in (1e-3, 0.1) and list(chosen["scores_on_training_samples_held_back"]) == ["0.001", "0.1"]
    assert list(found.measures[TEACHER]) == ["probe_top1"]
    (single,) = [compare(plan, contenders, protocol("probe"), tmp_path)]
    assert "chosen_rates" not in single.details


@torch.no_grad()
def test_of_many_classes_the_best_five_are_scored_too(tmp_path: Path) -> None:
    rng, samples = np.random.default_rng(0), []
    for number in range(56):
        pixels = rng.integers(0, 150, (16, 16, 3), dtype=np.uint8)
        pixels[..., number % 3] += np.uint8(number % 7 * 5)
        samples.append({"png": Image.fromarray(pixels), "cls": number % 7})
    plan = plan_of(recipe_of_images(tmp_path, train=samples[:40], val=samples[40:]), "--stage3.task.num_classes=7")
    tuned = export(plan, tmp_path / "tuned", 1, {"name": "classification", "num_classes": 7})
    contenders = contenders_of(plan, tuned=tuned)
    found = compare(plan, contenders, protocol("probe", "head"), tmp_path / "store")
    (train_images, train_labels), (images, labels) = (read_tiny_val(tmp_path / "shards", of) for of in ("train", "val"))
    for name, one in contenders.items():
        train, held_out = standardised(*(pooled(one.model, each, "cls_patch") for each in (train_images, images)))
        linear = LogisticRegression(C=1 / (40 * 1e-2), tol=1e-6, max_iter=2000).fit(train, train_labels)
        logits = {"probe": linear.decision_function(held_out)}
        if one.head is not None:
            logits["head"] = one.head(one.model(images), one.model.token_layout(images)).numpy()
        expected = {
            f"{kind}_top{k}": 100 * top_k_accuracy_score(labels, scores, k=k, labels=range(7))
            for kind, scores in logits.items()
            for k in (1, 5)
        }
        assert found.measures[name] == pytest.approx(expected), name
        assert expected["probe_top1"] < expected["probe_top5"] < 100


def recipe_of_images(folder: Path, **splits: Sequence[Mapping[str, Any]]) -> Path:
    """The tiny recipe on samples of one's own."""
    recipe = write_tiny_recipe(folder)
    for split, samples in splits.items():
        write_shards(samples, folder / "shards", split, samples_per_shard=15)
    return recipe


def noise(seed: int, shape: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def test_all_labels_alike_give_no_score(tmp_path: Path) -> None:
    alike = [{"png": noise(seed), "cls": 1} for seed in range(8)]
    recipe = recipe_of_images(tmp_path, val=alike)
    plan = plan_of(recipe)
    contenders = {TEACHER: build_teacher_contender(plan.model)}
    found = compare(plan, contenders, protocol("features", "knn", "probe"), tmp_path / "store")
    assert set(found.measures[TEACHER]) == {"feature_cosine", "patch_cosine", "cls_cosine", "relative_error"}
    assert ["all labels are the same" in note for note in found.notes[TEACHER]] == [True]
    other = plan_of(recipe_of_images(tmp_path, train=alike * 2))
    assert list(compare(other, contenders, protocol("probe"), tmp_path / "store").measures[TEACHER]) == []


def test_what_cannot_be_decoded_is_left_out_of_all_rows_alike_and_counted(tiny: Path, tmp_path: Path, caplog) -> None:
    """As if it were not there: of 11 held-out samples the first, of 21 training samples the last."""
    rng = np.random.default_rng(0)
    samples = [{"png": noise(number), "cls": int(rng.integers(3))} for number in range(32)]
    broken = [{"png": b"no image", "cls": number % 3} for number in range(2)]
    (tmp_path / "bad").mkdir(), (tmp_path / "good").mkdir()
    good = plan_of(recipe_of_images(tmp_path / "good", val=samples[:10], train=samples[10:30]))
    bad = plan_of(
        recipe_of_images(tmp_path / "bad", val=[broken[0], *samples[:10]], train=[*samples[10:30], broken[1]])
    )
    contenders = contenders_of(good, tuned=tiny / "tuned")
    asked = protocol("features", "knn", "probe", "head")
    plain = compare(good, contenders, asked, tmp_path / "store")
    found = compare(bad, contenders, asked, tmp_path / "store")
    assert (plain.unusable, found.unusable) == (0, 1)
    assert found.samples == plain.samples == {"held-out": 10, "training": 20}
    for name in contenders:
        assert found.measures[name] == pytest.approx(plain.measures[name], abs=1e-6), name
    again = compare(bad, contenders, protocol("knn"), tmp_path / "store")
    assert again.unusable == 1, "counted also where nothing is read again"


def test_without_labels_features_alone_are_compared(tmp_path: Path) -> None:
    recipe = recipe_of_images(tmp_path, val=[{"png": noise(seed)} for seed in range(8)])
    plan = plan_of(recipe)
    task = {"name": "classification", "num_classes": 3}
    contenders = contenders_of(plan, tuned=export(plan, tmp_path / "tuned", 1, task))
    asked = protocol("features", "knn", "probe", "head", "segmentation", "blocks")
    found = compare(plan, contenders, asked, tmp_path / "store")
    assert all(list(one) == list(found.measures[TEACHER]) for one in found.measures.values())
    assert found.measures[TEACHER]["feature_cosine"] > 0.9999 > found.measures["tuned"]["feature_cosine"]
    assert found.left_out == dict.fromkeys(["head", "knn", "probe", "segmentation"], "the samples have no targets")
    assert found.samples == {"held-out": 8} and not (tmp_path / "store").exists()
    assert set(found.blocks.students) == set(found.details["blocks"]["students"]) == {"linearized", "tuned"}


def test_what_the_samples_do_not_allow_is_told(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny / "recipe.yaml")
    alone = {TEACHER: build_teacher_contender(plan.model)}
    found = compare(plan, alone, protocol("head", "segmentation", "blocks", "probe"), tmp_path)
    assert set(found.left_out) == {"head", "segmentation", "blocks"}
    assert found.left_out["segmentation"] == "the samples are for classification"


MULTILABEL = {"name": "multilabel", "num_classes": 4}


def multilabel_samples(count: int, seed: int) -> list[dict[str, Any]]:
    """Colours tell two of three labels, in part; the fourth never holds."""
    rng, samples = np.random.default_rng(seed), []
    for _ in range(count):
        pixels, labels = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8), []
        for channel in range(3):
            if rng.random() < 0.4:
                pixels[..., channel] += np.uint8(rng.integers(0, 40))
                labels.append(channel)
        samples.append({"png": Image.fromarray(pixels), "json": json.dumps(labels).encode()})
    return samples


def read_multilabel(folder: Path, split: str) -> tuple[Tensor, np.ndarray]:
    images, labels = [], []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member).read()
                if member.name.endswith(".png"):
                    images.append(np.array(Image.open(io.BytesIO(content))))
                else:
                    labels.append([number in json.loads(content) for number in range(4)])
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5, np.array(labels)


def multilabel_recipe(folder: Path) -> Path:
    recipe = recipe_of_images(folder, train=multilabel_samples(31, 0), val=multilabel_samples(13, 1))
    values = json.loads(recipe.read_text())
    values["stage3"]["task"] = MULTILABEL
    recipe.write_text(json.dumps(values))
    return recipe


@torch.no_grad()
def test_several_labels_are_measured_as_scikit_learn_does(tmp_path: Path) -> None:
    plan = plan_of(multilabel_recipe(tmp_path))
    contenders = contenders_of(plan, tuned=export(plan, tmp_path / "tuned", 1, MULTILABEL))
    found = compare(plan, contenders, protocol("features", "knn", "probe", "head"), tmp_path / "store")
    assert found.left_out == {"knn": "the samples are for multilabel"}
    train_images, train_labels = read_multilabel(tmp_path / "shards", "train")
    images, labels = read_multilabel(tmp_path / "shards", "val")

    def scores_of(logits: np.ndarray, kind: str) -> dict[str, float]:
        return {
            f"{kind}_map": 100 * average_precision_score(labels[:, :3], logits[:, :3], average="macro"),
            f"{kind}_micro_f1": 100 * f1_score(labels, logits > 0, average="micro"),
        }

    for name, one in contenders.items():
        values = [pooled(one.model, each, "cls_patch") for each in (train_images, images)]
        train, held_out = standardised(*values)
        logits = np.full(labels.shape, -9.0)
        for number in range(3):
            linear = LogisticRegression(C=1 / (len(train) * 1e-2), tol=1e-6, max_iter=2000)
            logits[:, number] = linear.fit(train, train_labels[:, number]).decision_function(held_out)
        expected = scores_of(logits, "probe")
        if one.head is not None:
            expected |= scores_of(one.head(one.model(images), one.model.token_layout(images)).numpy(), "head")
        measured = {key: value for key, value in found.measures[name].items() if key.startswith(("probe", "head"))}
        assert measured == pytest.approx(expected, abs=1e-4), name


SCENES = {"name": "segmentation", "num_classes": NUM_CLASSES}


def read_scenes(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels and masks."""
    files: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, _, kind = member.name.partition(".")
                content = np.array(Image.open(io.BytesIO(tar.extractfile(member).read())))
                files.setdefault(f"{path.name}/{key}", {})[kind] = content
    return [(each["png"], each["seg.png"]) for each in files.values()]


def normalised(pixels: np.ndarray) -> Tensor:
    return ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5)[None]


def iou_of(masks: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> float:
    """Mean over the classes that occur on either side, in percent."""
    mask, decision = (np.concatenate([each.ravel() for each in those]) for those in (masks, predicted))
    known = mask != IGNORED
    return 100 * jaccard_score(mask[known], decision[known], average="macro")


def baselines_of(train: Sequence, held_out: Sequence, bins: int) -> dict[str, dict[str, float]]:
    """By counting, pixel after pixel."""
    table: dict[tuple, np.ndarray] = {}
    total = np.zeros(NUM_CLASSES, int)
    for pixels, mask in train:
        for colour, number in zip((pixels.astype(int) * bins // 256).reshape(-1, 3), mask.ravel(), strict=True):
            if number != IGNORED:
                table.setdefault(tuple(colour), np.zeros(NUM_CLASSES, int))[number] += 1
                total[number] += 1
    masks = [mask for _, mask in held_out]
    looked_up = [
        np.array(
            [table.get(tuple(colour), total).argmax() for colour in (pixels.astype(int) * bins // 256).reshape(-1, 3)]
        )
        for pixels, _ in held_out
    ]
    majority = [np.full(mask.size, total.argmax()) for mask in masks]
    return {
        "majority class": {"probe_miou": iou_of(masks, majority)},
        "colour table": {"probe_miou": iou_of(masks, looked_up)},
    }


def write_sharp_recipe(folder: Path, image_size: tuple[int, int] = (56, 56)) -> Path:
    """The recipe of scenes with a teacher whose features differ by patch, and from its linearization's."""
    recipe = write_scene_recipe(folder)
    teacher = build_tiny_teacher(image_size, patch_size=8, depth=2)
    # More of each patch than of what attention mixes into all alike.
    teacher.patch_embed.proj.weight *= 20
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    values = json.loads(recipe.read_text())
    values["teacher"]["checkpoint"] = str(folder / "teacher.safetensors")
    values["data"]["image_size"] = list(image_size)
    recipe.write_text(json.dumps(values))
    return recipe


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    recipe = write_sharp_recipe(folder)
    # What is ignored is the recipe's to say.
    export(plan_of(recipe), folder / "tuned", 1, {**SCENES, "mask": {"ignore_index": 254}})
    return folder


@torch.no_grad()
def frozen_head(model: torch.nn.Module, train: Sequence[tuple[np.ndarray, np.ndarray]]) -> DenseHead:
    """Fitted on features that are computed one image at a time."""
    tokens = torch.cat([model(normalised(pixels)) for pixels, _ in train])
    side = int(tokens[:, 1:].shape[1] ** 0.5)
    features = DenseFeatures(tokens[:, 1:].unflatten(1, (side, side)).half(), tokens[:, 0])
    settings = DenseSettings(NUM_CLASSES, IGNORED, rates=[0.03], epochs=8, batch_size=3)
    return fit_dense_probe(features, torch.from_numpy(np.stack([mask for _, mask in train])), settings)


@torch.no_grad()
def test_segmentation_is_measured_as_computed_plainly(scenes: Path, tmp_path: Path) -> None:
    plan = plan_of(scenes / "recipe.yaml")
    contenders = contenders_of(plan, tuned=scenes / "tuned")
    found = compare(plan, contenders, protocol("features", "segmentation", "head", "knn", "probe"), tmp_path)
    train, held_out = (read_scenes(scenes / "scenes", split) for split in ("train", "val"))
    masks = [mask for _, mask in held_out]
    for name, one in contenders.items():
        head, frozen, own = frozen_head(one.model, train), [], []
        for pixels, _ in held_out:
            tokens = one.model(normalised(pixels))
            logits = head(tokens[:, 1:].unflatten(1, (7, 7)).half().float(), tokens[:, 0])
            frozen.append(F.interpolate(logits, (56, 56), mode="bilinear").argmax(1).numpy())
            if one.head is not None:
                logits = one.head(tokens, one.model.token_layout(normalised(pixels)))
                own.append(F.interpolate(logits, (56, 56), mode="bilinear").argmax(1).numpy())
        expected = {"probe_miou": iou_of(masks, frozen)}
        if own:
            known = np.concatenate(masks) != IGNORED
            right = (np.concatenate([each[0] for each in own]) == np.concatenate(masks))[known]
            expected |= {"head_miou": iou_of(masks, own), "head_pixel_accuracy": 100 * right.mean()}
        measured = {key: value for key, value in found.measures[name].items() if key.startswith(("probe", "head"))}
        assert measured == pytest.approx(expected, abs=0.02), name
        by_class = torch.tensor(found.details["iou_by_class"][name])
        assert by_class.nanmean().item() == pytest.approx(found.measures[name]["probe_miou"]) and len(by_class) == 11
    for name, measures in baselines_of(train, held_out, bins=16).items():
        assert found.measures[name] == pytest.approx(measures, abs=1e-4), name
    assert list(found.measures) == [*contenders, "majority class", "colour table"] == list(found.notes)
    assert found.left_out == dict.fromkeys(["knn", "probe"], "the samples are for segmentation")
    assert found.heads["tuned"] is contenders["tuned"].head and found.heads[TEACHER] is not None


@torch.no_grad()
@pytest.mark.parametrize("has_class_token", [True, False])
def test_a_frozen_head_computes_as_it_was_fitted(has_class_token: bool) -> None:
    """In float32, whatever the model computes in; without a class token beside the mean patch."""
    generator, prefix = torch.Generator().manual_seed(0), 2 if has_class_token else 0
    features = torch.randn(3, prefix + 6, 5, generator=generator)
    head = DenseHead(torch.randn(10, generator=generator), torch.rand(10, generator=generator) + 0.5, 5, 4)
    torch.nn.init.normal_(head.weight, generator=generator)
    patches = features[:, prefix:]
    beside = (features[:, :1] if has_class_token else patches.mean(1, keepdim=True)).expand_as(patches)
    inputs = (torch.cat([patches, beside], -1) - head.mean) / head.std
    expected = (inputs @ head.weight.T + head.bias).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    for autocast in (None, torch.bfloat16):
        with precision(autocast):
            found = FrozenHead(head, has_class_token)(features, TokenLayout((2, 3), prefix))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


WIDE = (40, 72)


def write_wide_recipe(folder: Path) -> Path:
    """Landscapes of 40 x 72 pixels that are seen at 32 x 32: whole ones have 32 x 56, the nearest in whole patches."""
    recipe = write_sharp_recipe(folder, (32, 32))
    rng = np.random.default_rng(5)
    for split, count in (("train", 11), ("val", 5)):
        samples = []
        for _ in range(count):
            mask = rng.integers(0, NUM_CLASSES, (5, 9)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            pixels = (mask[..., None] * 20 + rng.integers(0, 50, (*WIDE, 3))).astype(np.uint8)
            mask[:4] = IGNORED
            samples.append({"png": Image.fromarray(pixels), "seg.png": Image.fromarray(mask)})
        write_shards(samples, folder / "scenes", split, samples_per_shard=4)
    return recipe


def crop(pixels: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What training sees: the shorter side at 32 pixels, and the middle."""
    image = transforms.pil_to_tensor(Image.fromarray(pixels))
    image = transforms.resize(image, [32, 57], transforms.InterpolationMode.BICUBIC, antialias=True)[..., 12:44]
    mask = transforms.resize(torch.from_numpy(mask)[None], [32, 57], transforms.InterpolationMode.NEAREST_EXACT)
    return image.permute(1, 2, 0).numpy(), mask[0, :, 12:44].numpy()


@torch.no_grad()
@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_heads_are_scored_as_the_recipes_task_says(tmp_path: Path, inference: str) -> None:
    """Own and frozen ones, whatever the student's own task says, and the baselines on the same pixels."""
    recipe = write_wide_recipe(tmp_path)
    plan = plan_of(recipe, f"--stage3.task.inference={inference}")
    tuned = export(plan, tmp_path / "tuned", 1, {**SCENES, "inference": "crop"})
    contenders = contenders_of(plan, tuned=tuned)
    found = compare(plan, contenders, protocol("features", "segmentation", "head"), tmp_path / "store")
    train = [crop(*each) for each in read_scenes(tmp_path / "scenes", "train")]
    held_out, resized = read_scenes(tmp_path / "scenes", "val"), []
    for pixels, _ in held_out:
        image = transforms.pil_to_tensor(Image.fromarray(pixels))
        image = transforms.resize(image, [32, 56], transforms.InterpolationMode.BICUBIC, antialias=True)
        resized.append(image.permute(1, 2, 0).numpy())

    def predict(logits_of) -> list[np.ndarray]:
        decisions = []
        for pixels in resized:
            images = normalised(pixels)
            if inference == "whole":
                scores = logits_of(images)
            else:
                # Windows of 32 that overlap by a third, the last one flush with the edge.
                scores, seen = torch.zeros(1, NUM_CLASSES, 32, 56), torch.zeros(56)
                for left in (0, 21, 24):
                    window = F.interpolate(logits_of(images[..., left : left + 32]), (32, 32), mode="bilinear")
                    scores[..., left : left + 32] += window
                    seen[left : left + 32] += 1
                scores = scores / seen
            decisions.append(F.interpolate(scores, WIDE, mode="bilinear").argmax(1).numpy())
        return decisions

    masks = [mask for _, mask in held_out]
    for name, one in contenders.items():
        head = frozen_head(one.model, train)

        def frozen(images: Tensor, one=one, head=head) -> Tensor:
            tokens, grid = one.model(images), (4, images.shape[-1] // 8)
            return head(tokens[:, 1:].unflatten(1, grid), tokens[:, 0])

        def own(images: Tensor, one=one) -> Tensor:
            return one.head(one.model(images), one.model.token_layout(images))

        assert found.measures[name]["probe_miou"] == pytest.approx(iou_of(masks, predict(frozen)), abs=0.05), name
        scores = {name for name in found.measures[name] if not name.endswith(("cosine", "error"))}
        of_heads = {"head_miou", "head_pixel_accuracy"} if one.head is not None else set()
        assert scores == {"probe_miou", "probe_pixel_accuracy"} | of_heads
        if one.head is not None:
            assert found.measures[name]["head_miou"] == pytest.approx(iou_of(masks, predict(own)), abs=0.05)
    # The nearest pixel of 32 x 56 to each of 40 x 72.
    rows, columns = ((2 * np.arange(of) + 1) * side // (2 * of) for side, of in ((32, 40), (56, 72)))
    enlarged = [(pixels[rows][:, columns], mask) for pixels, mask in zip(resized, masks, strict=True)]
    for name, measures in baselines_of(train, enlarged, bins=16).items():
        assert found.measures[name] == pytest.approx(measures, abs=1e-4), name


def compare_everything(folder: Path, store: Path) -> dict[str, Comparison]:
    """As a rank: every task, on numbers of samples that do not divide, with bad ones, and a rank that has none left."""
    found = {}
    for name, measures in {
        "classes": ("features", "blocks", "knn", "probe", "head"),
        "few": ("features", "probe", "head"),
        "few labels": ("features", "probe", "head"),
        "labels": ("features", "probe", "head"),
        "masks": ("features", "segmentation", "head"),
    }.items():
        plan = plan_of(folder / name / "recipe.yaml")
        contenders = contenders_of(plan, tuned=folder / name / "tuned")
        found[name] = dataclasses.replace(compare(plan, contenders, protocol(*measures), store), heads={})
    return found


def test_two_ranks_find_what_one_finds(tiny: Path, tmp_path: Path) -> None:
    bad = {"png": b"no image", "cls": 0, "json": b"[]", "seg.png": b""}
    labelled = [{"png": noise(number), "cls": number % 3} for number in range(32)]
    for name in ("classes", "few", "labels", "few labels", "masks"):
        (tmp_path / name).mkdir()
    # On two ranks the first has a single held-out sample, which is bad.
    recipe_of_images(tmp_path / "few", val=[bad, *labelled[:2]], train=labelled[:21])
    recipe_of_images(tmp_path / "classes", val=[*labelled[:10], bad], train=[bad, *labelled[10:]])
    multilabel_recipe(tmp_path / "labels")
    multilabel_recipe(tmp_path / "few labels")
    write_shards([bad, *multilabel_samples(2, 1)], tmp_path / "few labels" / "shards", "val", 3)
    scenes = write_wide_recipe(tmp_path / "masks")
    scenes.write_text(scenes.read_text().replace('"num_classes": 11', '"num_classes": 11, "inference": "slide"'))
    tasks = {"classes": {"name": "classification", "num_classes": 3}, "labels": MULTILABEL, "masks": SCENES}
    for name, task in {**tasks, "few": tasks["classes"], "few labels": MULTILABEL}.items():
        export(plan_of(tmp_path / name / "recipe.yaml"), tmp_path / name / "tuned", 1, task)
    ((alone,), (first, second)) = (
        on_ranks(ranks, compare_everything, tmp_path, tmp_path / f"store{ranks}", timeout_s=120) for ranks in (1, 2)
    )
    assert (alone["few"].unusable, alone["classes"].unusable) == (1, 1)
    for name, one in alone.items():
        assert repr(first[name]) == repr(second[name]), "to the last digit"
        two = first[name]
        assert list(two.measures) == list(one.measures) and (two.samples, two.unusable) == (one.samples, one.unusable)
        for model, measures in one.measures.items():
            assert two.measures[model] == pytest.approx(measures, rel=1e-4, abs=1e-4), (name, model)
        assert two.notes == one.notes and two.left_out == one.left_out
    errors = [found["classes"].blocks.students["tuned"].stream[-1]["relative_error"] for found in (alone, first)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4) and alone["classes"].blocks.images == 10


def fail_on_a_rank(recipe: Path, store: Path, *measures: str) -> tuple[str, str]:
    plan = plan_of(recipe)
    try:
        compare(plan, {TEACHER: build_teacher_contender(plan.model)}, protocol(*measures), store)
    except ValueError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_one_rank_cannot_read_ends_all_alike(tmp_path: Path, split: str) -> None:
    """While features are being written, and where none are."""
    samples = [{"png": noise(number), "cls": number % 3} for number in range(12)]
    bad = [{"png": b"no image", "cls": 0}] * 4
    recipe = recipe_of_images(tmp_path, **{split: [*samples[:8], *bad, *samples[8:]]})
    for measures in (("features", "probe"), ("features", "blocks")) if split == "val" else (("probe",),):
        first, second = on_ranks(2, fail_on_a_rank, recipe, tmp_path / "store", *measures, timeout_s=60)
        assert first == second and first[0] == "SharedError"
        assert "samples of one data worker's range are bad" in first[1]
    assert [path for path in (tmp_path / "store").glob(".*") if path.is_dir()] == []


class Counter:
    """How many images each model has seen."""

    def __init__(self, contenders: Mapping[str, Contender]):
        self.seen = dict.fromkeys(contenders, 0)
        for name, one in contenders.items():
            one.model.register_forward_hook(lambda _, inputs, __, name=name: self.count(name, len(inputs[0])))

    def count(self, name: str, images: int) -> None:
        self.seen[name] += images

    def taken(self) -> dict[str, int]:
        """Since the last call, of models that saw some."""
        seen, self.seen = self.seen, dict.fromkeys(self.seen, 0)
        return {name: images for name, images in seen.items() if images}


def test_a_model_whose_own_head_is_scored_need_not_be_probed(tiny: Path, tmp_path: Path) -> None:
    """As in a run's table: of its features only those of the 14 held-out images are computed."""
    plan = plan_of(tiny / "recipe.yaml")
    contenders = contenders_of(plan, tuned=tiny / "tuned")
    counter, store = Counter(contenders), FeatureStore(tmp_path)
    asked = protocol("probe", "head")
    found = Comparer(contenders, plan.data, plan.evaluation, asked, store, probes_tuned=False).compare().measures
    assert counter.taken() == {TEACHER: 54, "linearized": 54, "tuned": 14}
    assert [set(found[name]) for name in contenders] == [{"probe_top1"}, {"probe_top1"}, {"head_top1"}]


class TestStoredFeatures:
    """Of 14 held-out and 40 training images."""

    asked = protocol("knn", "probe")

    @pytest.fixture
    def compared(self, tiny: Path, tmp_path: Path):
        """The features of teacher, linearization and student are stored; a function that says what another comparison
        computes."""
        export(plan_of(tiny / "recipe.yaml"), tmp_path / "student", 1)

        def images_seen(*overrides: str, asked: Protocol = self.asked, recipe: Path = tiny / "recipe.yaml") -> dict:
            plan = plan_of(recipe, *overrides)
            contenders = contenders_of(plan, student=tmp_path / "student")
            counter = Counter(contenders)
            self.found = compare(plan, contenders, asked, tmp_path / "store")
            return counter.taken()

        assert images_seen() == dict.fromkeys([TEACHER, "linearized", "student"], 54)
        return images_seen

    def test_nothing_is_computed_twice(self, compared) -> None:
        first = self.found
        assert compared() == {}
        assert repr(self.found) == repr(first)
        other = dataclasses.replace(PROBE, pooling="cls", l2=1.0)
        assert compared(asked=protocol("probe", "knn", knn=KnnConfig(k=[1], pooling="patch"), probe=other)) == {}
        assert compared("--stage3.task.pooling=cls", "--stage3.task.label_smoothing=0.1") == {}
        assert compared("--evaluation.batch_size=3", "--evaluation.probe_samples=7") == {}
        # What is asked of features themselves, and not only of what was stored of them.
        assert compared(asked=protocol("features", "knn")) == dict.fromkeys([TEACHER, "linearized", "student"], 14)

    def test_a_student_with_other_weights_is_computed_anew(self, compared, tiny: Path, tmp_path: Path) -> None:
        export(plan_of(tiny / "recipe.yaml"), tmp_path / "student", 2)
        assert compared() == {"student": 54}
        export(plan_of(tiny / "recipe.yaml"), tmp_path / "student", 1)
        assert compared() == {}

    def test_two_heads_on_one_backbone_share_features(self, compared, tiny: Path, tmp_path: Path) -> None:
        plan = plan_of(tiny / "recipe.yaml")
        task = {"name": "classification", "num_classes": 3}
        folders = {name: export(plan, tmp_path / name, 7, {**task, "pooling": name}) for name in ("cls", "patch")}
        contenders = contenders_of(plan, **folders)
        counter = Counter(contenders)
        found = compare(plan, contenders, self.asked, tmp_path / "store")
        assert counter.taken() == {"cls": 54}
        assert found.measures["cls"] == found.measures["patch"] != found.measures["linearized"]

    @pytest.mark.parametrize(
        ("override", "images"),
        [
            ("--data.image_size=[8,16]", {TEACHER: 54, "linearized": 54, "student": 54}),
            ("--data.mean=[0.4,0.5,0.5]", {TEACHER: 54, "linearized": 54, "student": 54}),
            ("--stage3.task.num_classes=4", {TEACHER: 54, "linearized": 54, "student": 54}),
            ("--mechanism_options.den_added=0.5", {"linearized": 54}),
            ("--keep=[1]", {"linearized": 54}),
        ],
        ids=["image_size", "normalisation", "task", "mechanism_options", "keep"],
    )
    def test_what_features_depend_on_is_computed_anew(self, compared, override: str, images: dict) -> None:
        assert compared(override) == images
        assert compared(override) == {}

    def test_a_protocol_in_another_precision_or_of_fewer_samples_is_computed_anew(self, compared) -> None:
        everything = dict.fromkeys([TEACHER, "linearized", "student"], 54)
        assert compared(asked=protocol("knn", "probe", precision="bf16")) == everything
        fewer = protocol("knn", "probe", probe=dataclasses.replace(PROBE, train_samples=30))
        assert compared(asked=fewer) == dict.fromkeys(everything, 30)
        # All that there are.
        assert compared(asked=protocol("knn", probe=dataclasses.replace(PROBE, train_samples=4000))) == {}

    def test_other_data_are_computed_anew(self, compared, tmp_path: Path) -> None:
        samples = [{"png": noise(number), "cls": number % 3} for number in range(9)]
        (tmp_path / "other").mkdir()
        other = recipe_of_images(tmp_path / "other", val=samples)
        assert compared(recipe=other)[TEACHER] == 9 + 40

    def test_data_that_were_mended_in_place_are_computed_anew(self, compared, tiny: Path, tmp_path: Path) -> None:
        """Labels are others now, and every file as large as before."""
        shards = shutil.copytree(tiny / "shards", tmp_path / "shards")
        override = f"--data.val=[{shards}/val-*.tar]"
        assert compared(override) == {} and self.found.measures[TEACHER]["knn3_top1"] < 100
        first = self.found
        for path in shards.glob("val-*.tar"):
            content = bytearray(path.read_bytes())
            with tarfile.open(path) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".cls"):
                        content[member.offset_data] = ord("0") + (content[member.offset_data] - ord("0") + 1) % 3
            path.write_bytes(content)
        assert set(compared(override).values()) == {14}
        assert self.found.measures[TEACHER]["knn3_top1"] != first.measures[TEACHER]["knn3_top1"]

    def test_a_damaged_entry_is_computed_anew(self, compared, tmp_path: Path, caplog) -> None:
        first = self.found
        entries = sorted(path.parent for path in (tmp_path / "store").glob(f"*/{ROWS}"))
        assert len(entries) == 2 * 4, "of three models and of targets, by split"
        damaged = max(entries, key=lambda path: (path / ROWS).stat().st_size)
        content = bytearray((damaged / ROWS).read_bytes())
        content[100] ^= 1
        (damaged / ROWS).write_bytes(content)
        seen = compared()
        assert list(seen.values()) == [40] and "are damaged" in caplog.text
        assert repr(self.found) == repr(first)

    def test_targets_are_read_again_by_themselves(self, compared, tmp_path: Path) -> None:
        first = self.found
        sizes = {path.parent: path.stat().st_size for path in (tmp_path / "store").glob(f"*/{ROWS}")}
        for folder, size in sizes.items():
            if size in (14 * 8, 40 * 8):
                (folder / ROWS).unlink()
        seen = compared()
        assert seen == {TEACHER: 14} and repr(self.found) == repr(first)


def test_code_of_a_mechanism_that_changes_is_computed_anew(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """Its weights are the same ones."""
    plan = plan_of(tiny / "recipe.yaml")
    for code in ("one", "two"):
        monkeypatch.setattr("adala.contenders._code_digest", lambda mechanism, code=code: f"{code} {mechanism}")
        contenders = contenders_of(plan)
        counter = Counter(contenders)
        compare(plan, contenders, protocol("knn"), tmp_path)
        assert counter.taken() == {TEACHER: 54, "linearized": 54}


def test_samples_of_two_folders_of_one_name_keep_their_labels(tmp_path: Path) -> None:
    """Their ids are the same: two commands that read with other numbers of workers must not mix them up."""
    folders = []
    for number in range(2):
        samples = [{"png": noise(100 * number + each), "cls": (each + number) % 3} for each in range(10)]
        write_shards(samples, tmp_path / f"of{number}", "val", samples_per_shard=10)
        folders.append(str(tmp_path / f"of{number}" / "val-*.tar"))
    recipe, found = write_tiny_recipe(tmp_path), []
    for store, workers, names in (("a", 0, [TEACHER]), ("a", 2, [TEACHER, "linearized"]), ("b", 2, ["linearized"])):
        plan = plan_of(recipe, f"--data.val=[{','.join(folders)}]", f"--data.num_workers={workers}")
        contenders = {name: one for name, one in contenders_of(plan).items() if name in names}
        asked = protocol("knn", "probe", knn=KnnConfig(k=[1, 3, 7]))
        found.append(compare(plan, contenders, asked, tmp_path / store).measures)
    assert found[0][TEACHER] == found[1][TEACHER]
    assert found[1]["linearized"] == found[2]["linearized"]
