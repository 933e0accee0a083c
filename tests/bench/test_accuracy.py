"""Budgets, rows from what the runs left behind, and one real adaptation of a tiny recipe."""

import dataclasses

import accuracy
import pytest
import torch
import torch.nn.functional as F
from accuracy import conversion_names, divide_images, measure_accuracy
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tiny_run import read_tiny_val, write_tiny_recipe, write_tiny_shards
from tiny_teacher import build_tiny_teacher

from adala import load_student, load_task_model
from adala.config import load_recipe
from adala.contenders import build_teacher_contender, linearize_contender
from adala.data import write_shards
from adala.export import save_student
from adala.plan import resolve_run, run_folder
from adala.tasks import describe_task


def images(recipe, steps):
    return sum(count * recipe.stage(number).global_batch_size for number, count in steps.items())


def native(mechanism):
    return load_recipe("tiny", ["--mechanism", mechanism, "--conversion", "native"])


def test_every_conversion_sees_as_many_images():
    for mechanism in ("hedgehog", "lolcats", "linformer", "monarch"):
        for recipe in (native(mechanism), load_recipe("tiny", ["--mechanism", mechanism])):
            assert images(recipe, divide_images(recipe, 9600)) == pytest.approx(9600, abs=3 * 32)
    assert set(divide_images(native("hedgehog"), 9600)) == {1, 3}
    assert set(divide_images(native("linformer"), 9600)) == {3}


def test_images_keep_the_recipes_proportions(tmp_path):
    """Stages of 4, 8 and 4 steps, the second in batches of twice the size: 1 to 4 to 1 in images."""
    overrides = ["--stage2.steps", "8", "--stage2.global_batch_size", "16"]
    recipe = load_recipe(str(write_tiny_recipe(tmp_path)), overrides)
    assert divide_images(recipe, 960) == {1: 20, 2: 40, 3: 20}


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="100 images are fewer than one batch for each of 3 stages"):
        divide_images(load_recipe("tiny"), 100)


def test_softmax_and_linear_have_no_conversion_of_their_own():
    assert conversion_names("softmax") == conversion_names("linear") == ["adala"]
    assert conversion_names("hedgehog") == ["adala", "native"]


def test_a_real_adaptation_and_one_that_fails(tmp_path, monkeypatch):
    """Cosformer natively, which is a single stage; under AdaLA's the training command is given a bad value."""
    train_stage = accuracy.train_stage

    def broken(arguments, number, steps):
        train_stage(arguments, number, steps if "native" in arguments else -1.5)

    monkeypatch.setattr(accuracy, "train_stage", broken)
    recipe = write_tiny_recipe(tmp_path)
    left_behind = tmp_path / "runs" / "cosformer-native" / "stage2"
    left_behind.mkdir(parents=True)
    kept: list[int] = []
    failed, done = measure_accuracy(
        str(recipe), ["cosformer"], 24, tmp_path / "runs", ["seed=3"], lambda rows: kept.append(len(rows))
    )
    assert kept == [1, 2], "an interruption costs one adaptation"
    assert (failed.conversion, done.conversion) == ("adala", "native")
    assert "stage1.steps" in failed.error and failed.error.startswith("stage 1: error:") and failed.top1 is None
    assert done.error is None and done.steps == {"3": 3} and done.images_seen == 24
    tuned = load_task_model(tmp_path / "runs" / "cosformer-native" / "stage3")
    pixels, labels = read_tiny_val(tmp_path / "shards")
    right = tuned(pixels).argmax(-1) == labels
    assert done.top1 == pytest.approx(100 * right.float().mean().item()) and done.aligned_top1 is None
    cosine = F.cosine_similarity(tuned.student(pixels), build_tiny_teacher()(pixels), dim=-1).mean().item()
    assert done.feature_cosine == pytest.approx(cosine, abs=1e-5) and done.teacher_top1 == 100.0
    assert done.kept == done.top1 / done.teacher_top1
    config = (tmp_path / "runs" / "cosformer-native" / "stage3" / "config.yaml").read_text()
    assert "seed: 3" in config and "steps: 3" in config
    assert not left_behind.exists(), "a stage would start from it"


def export_stage(arguments, number, steps):
    """In place of training: the linearized teacher, moved by its stage, from Stage 3 on with a head."""
    recipe = load_recipe(arguments[1], arguments[2:])
    plan = resolve_run(recipe, ())
    student = linearize_contender(plan.model, build_teacher_contender(plan.model)).model
    generator, head = torch.Generator().manual_seed(number), None
    with torch.no_grad():
        student.blocks[-1].mlp.fc2.weight += number * torch.randn(32, 128, generator=generator)
    if number == 3:
        head = plan.evaluation.task.build_head(student)
        torch.nn.init.normal_(head.linear.weight, generator=generator)
    description = dataclasses.replace(plan.model.student, task=describe_task(plan.evaluation.task) if head else None)
    save_student(run_folder(recipe).stage(number).path, student.state_dict(), description, head and head.state_dict())


@torch.no_grad()
def test_scores_of_all_stages_and_a_teacher_that_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "train_stage", export_stage)
    recipe = write_tiny_recipe(tmp_path)
    write_tiny_shards(tmp_path / "shards", contrast=12)
    seen = []

    def built_and_watched(plan):
        teacher = build_teacher_contender(plan)
        teacher.model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        return teacher

    monkeypatch.setattr(accuracy, "build_teacher_contender", built_and_watched)
    overrides = ["evaluation.probe_samples=30", "evaluation.probe_l2=0.1"]
    rows = measure_accuracy(str(recipe), ["linear", "softmax"], 24, tmp_path / "runs", overrides)
    assert [row.error for row in rows] == [None, None]
    # 14 held-out images for the teacher and for each mechanism's comparison, and its 30 training images once.
    assert sum(seen) == 14 + 2 * 14 + 30
    (train_images, train_labels), (images, labels) = (read_tiny_val(tmp_path / "shards", of) for of in ("train", "val"))
    teacher = build_tiny_teacher()

    def probed(model):
        tokens = [model(each) for each in (train_images[:30], images)]
        train, held_out = (torch.cat([each[:, 0], each[:, 1:].mean(1)], 1).double() for each in tokens)
        held_out, train = ((each - train.mean(0)) / train.std(0) for each in (held_out, train))
        linear = LogisticRegression(C=1 / (30 * 0.1), tol=1e-6, max_iter=2000).fit(train, train_labels[:30])
        return 100 * linear.score(held_out, labels)

    for row in rows:
        run = tmp_path / "runs" / f"{row.mechanism}-adala"
        aligned, tuned = load_student(run / "stage2"), load_task_model(run / "stage3")
        right = tuned(images).argmax(-1) == labels
        expected = {
            "teacher_top1": probed(teacher),
            "aligned_top1": probed(aligned),
            "aligned_cosine": F.cosine_similarity(aligned(images), teacher(images), dim=-1).mean().item(),
            "top1": 100 * right.float().mean().item(),
            "feature_cosine": F.cosine_similarity(tuned.student(images), teacher(images), dim=-1).mean().item(),
        }
        assert {name: getattr(row, name) for name in expected} == pytest.approx(expected, abs=1e-5), row.mechanism
        assert row.kept == pytest.approx(expected["top1"] / expected["teacher_top1"])
    assert rows[0].aligned_cosine != rows[1].aligned_cosine


def test_a_recipe_without_labels_is_refused(tmp_path):
    write_shards([{"png": Image.new("RGB", (16, 16))}] * 14, tmp_path / "plain", "val", 14)
    recipe = write_tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match="needs labels"):
        measure_accuracy(str(recipe), ["linear"], 24, tmp_path / "runs", [f"data.val=[{tmp_path}/plain/val-*.tar]"])
