"""The embedded default: its size, and that its teacher is as good as its record says."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from adala.backbones import load_teacher
from adala.config import load_recipe
from adala.data.embedded import CLASS_NAMES, FOLDER, SLICE_PATH, TEACHER_PATH, load_split


def test_sizes_and_licence() -> None:
    assert SLICE_PATH.stat().st_size <= 8_000_000
    assert TEACHER_PATH.stat().st_size <= 4_000_000
    assert "MIT License" in (FOLDER / "LICENSE").read_text()
    for split, count in (("train", 16_000), ("val", 4_000)):
        images, labels = load_split(split)
        assert images.shape == (count, 28, 28) and labels.shape == (count,)
        assert set(labels.tolist()) == set(range(len(CLASS_NAMES)))


def test_the_teacher_is_as_good_as_its_record_says() -> None:
    record = json.loads(Path(TEACHER_PATH).with_suffix(".json").read_text())
    assert record["held_out_top1"] >= 85
    recipe = load_recipe("tiny")
    images, labels = (torch.from_numpy(array)[:1000] for array in load_split("val"))
    inputs = ((images.float() / 255 - recipe.data.mean[0]) / recipe.data.std[0])[:, None].expand(-1, 3, -1, -1)
    teacher = load_teacher(recipe.teacher.name, [28, 28], TEACHER_PATH, model_args=recipe.teacher.model_args)
    head = load_file(TEACHER_PATH)
    # It was trained on the mean of all tokens after the final norm: see bench/embedded/train_teacher.py.
    with torch.no_grad():
        logits = teacher(inputs).mean(1) @ head["head.weight"].T + head["head.bias"]
    top1 = 100 * (logits.argmax(1) == labels).float().mean().item()
    assert abs(top1 - record["held_out_top1"]) < 3.5, "about three standard errors of 1000 images"
    assert timm.is_model(record["architecture"])
