"""Teachers of other families through all stages on two ranks under ZeRO 1 and 3, one of their blocks kept as it is."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import PROJECT, environment
from safetensors.torch import load_file, save_file
from tiny_families import ALL, TINY, build_tiny
from tiny_run import read_tiny_val, write_tiny_recipe
from warm import train

from adala import load_student
from adala.metrics import read_metrics


@pytest.fixture(scope="module")
def run_under(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Runs all stages with a kind of teacher under a configuration, once; gives the folder around the run."""

    @functools.cache
    def run(kind: str, ds_config: str) -> Path:
        folder, (name, arguments) = tmp_path_factory.mktemp(f"{kind}-{ds_config}"), ALL[kind]
        save_file(build_tiny(kind).state_dict(), folder / "rotary.safetensors")
        teacher = {"name": name, "checkpoint": str(folder / "rotary.safetensors"), "model_args": {**TINY, **arguments}}
        images = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": [16, 16]}
        shards = {key: [str(folder / "shards" / f"{key}-*.tar")] for key in ("train", "val")}
        # DeepSpeed leaves weights below 100,000 elements whole under ZeRO-3: all of these, unless told not to.
        zero = {"stage": int(ds_config[-1]), "stage3_param_persistence_threshold": 0}
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        recipe = write_tiny_recipe(
            folder, ds_config=str(folder / "zero.json"), teacher=teacher, keep=[1], data={**images, **shards}
        )
        # Weights are gathered a second time where blocks are computed again.
        again = [word for n in (1, 2, 3) for word in (f"--stage{n}.activation_checkpointing", "true")]
        done = train("--recipe", str(recipe), "--stage", "all", *again)
        assert done.returncode == 0, done.stdout
        return folder

    return run


def losses_of(folder: Path) -> list[float]:
    run = folder / "runs" / "tiny-run"
    return [row["loss"] for n in (1, 2, 3) for row in read_metrics(run / f"stage{n}", "train")]


@pytest.mark.parametrize("kind", ["dinov3_qkvb", "rope_mixed"])
def test_zero_3_trains_what_zero_1_does(kind: str, run_under) -> None:
    losses = losses_of(run_under(kind, "zero1"))
    assert len(losses) == 12
    assert losses_of(run_under(kind, "zero3")) == pytest.approx(losses, rel=2e-4)


@pytest.mark.parametrize(
    ("kind", "ds_config"),
    [
        ("dinov3_qkvb", "zero1"),
        ("dinov3_qkvb", "zero3"),
        ("rope_mixed", "zero1"),
        ("rope_mixed", "zero3"),
        ("naflex", "zero3"),
    ],
)
def test_what_is_exported_is_what_was_trained(kind: str, ds_config: str, run_under, tmp_path: Path) -> None:
    folder = run_under(kind, ds_config)
    images, _ = read_tiny_val(folder / "shards")
    before = build_tiny(kind)
    reference = before.state_dict()
    for number in (1, 2):
        stage = folder / "runs" / "tiny-run" / f"stage{number}"
        state = load_file(stage / "student.safetensors")
        assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in reference.items()}
        moved = {key for key, value in state.items() if not torch.equal(value, reference[key])}
        if number == 1:
            assert {tuple(key.split(".")[:3]) for key in moved} == {("blocks", block, "attn") for block in "02"}
            assert not any(".proj." in key for key in moved)
        else:
            assert "rope.freqs" in moved if kind == "rope_mixed" else "norm.weight" in moved
        features = load_student(stage)(images)
        if number == 2:
            assert torch.equal(features_in_a_fresh_process(stage, images, tmp_path / "images.pt"), features)
        ours, theirs = features.double(), before(images).double()
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean().item()
        # What the trainer measured last, of the student in its engine.
        metrics = json.loads((stage / "finished.json").read_text())["metrics"]
        assert metrics["feature_cosine"] == pytest.approx(cosine, abs=1e-5)


def features_in_a_fresh_process(student: Path, images: torch.Tensor, path: Path) -> torch.Tensor:
    torch.save(images, path)
    program = (
        "import sys, torch, adala; torch.set_num_threads(1); images = torch.load(sys.argv[2]); "
        "torch.save(adala.load_student(sys.argv[1])(images).detach(), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(student), str(path)]
    subprocess.run(command, check=True, cwd=PROJECT, env=environment())
    return torch.load(path)
