"""What is wrong with weights or labels is said once, on all ranks, and nothing of the run is touched."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_tiny_recipe
from warm import train

from adala.data import write_shards


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or incomplete safetensors file"),
        (lambda path: path.write_bytes(b"<html></html>"), "is a web page, not weights"),
    ],
    ids=["cut", "web_page"],
)
def test_damaged_weights_end_every_rank_before_the_run_begins(tmp_path: Path, damage, message: str) -> None:
    recipe = write_tiny_recipe(tmp_path)
    damage(tmp_path / "teacher.safetensors")
    done = train("--recipe", str(recipe), "--stage", "1")
    assert done.returncode != 0
    assert done.stdout.count(message) == 1, done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_label_beyond_the_classes_ends_every_rank_before_a_head_is_fitted(tmp_path: Path) -> None:
    """The first samples, which the plan looks at, have labels that fit; one near the end has not."""
    recipe = write_tiny_recipe(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (600, 16, 16, 3), dtype=np.uint8)
    samples = [{"png": Image.fromarray(image), "cls": 7 if index == 550 else 0} for index, image in enumerate(pixels)]
    write_shards(samples, tmp_path / "late", "train", samples_per_shard=600)
    sources = json.dumps([str(tmp_path / "late" / "train-*.tar")])
    done = train("--recipe", str(recipe), "--stage", "3", f"--data.train={sources}", "--stage3.head_init", "probe")
    assert done.returncode != 0
    assert done.stdout.count("00000550: it has the label 7, but stage3.task.num_classes is 3") == 1, done.stdout
    assert "Traceback" not in done.stdout
