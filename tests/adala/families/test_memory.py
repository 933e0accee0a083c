"""The memory planner counts what stages of other families hold: tables, rotated copies and shared keys among it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import ALL, TINY, build_tiny
from tiny_run import write_tiny_recipe
from tiny_stage import build_tiny_stage, plan_stage

from adala.activations import SavedActivations
from adala.memory.tracing import trace_stage
from adala.plan import StagePlan


def saved_by_a_run(plan: StagePlan, images: int) -> int:
    """Bytes that autograd holds for a real micro-batch on the CPU."""
    stage = build_tiny_stage(plan).train()
    weights = [*stage.parameters(), *stage.buffers(), *stage.teacher.parameters(), *stage.teacher.buffers()]
    with SavedActivations(weights) as saved:
        stage({"image": torch.randn(images, 3, 16, 16), "label": torch.zeros(images, dtype=torch.int64)})
    return saved.peak_bytes


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ["dinov3_qkvb", "rope_mixed", "sapiens2", "distilled", "naflex"])
def test_what_is_saved_is_what_a_run_saves(kind: str, number: int, tmp_path: Path) -> None:
    name, arguments = ALL[kind]
    save_file(build_tiny(kind).state_dict(), tmp_path / "weights.safetensors")
    teacher = {"name": name, "checkpoint": str(tmp_path / "weights.safetensors"), "model_args": {**TINY, **arguments}}
    plan = plan_stage(write_tiny_recipe(tmp_path, teacher=teacher), number, ("--ds_config", "zero1", "--keep", "[1]"))
    traced = trace_stage(plan)
    assert [traced.saved.at(images) for images in (2, 5)] == [saved_by_a_run(plan, images) for images in (2, 5)]
