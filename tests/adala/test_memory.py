"""The memory planner: what it counts against what real runs hold, and what it says."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from tiny_run import write_tiny_recipe
from tiny_stage import build_tiny_stage, plan_stage

from adala.activations import SavedActivations
from adala.build import build_engine
from adala.config import RECIPE_FOLDER, load_recipe
from adala.ds_config import load_ds_config
from adala.memory import tracing
from adala.memory.__main__ import main
from adala.memory.planner import StagePlanner, batch_changes, plan_memory
from adala.memory.states import count_parameters, model_states, step_traffic
from adala.memory.text import verdict
from adala.memory.tracing import LiveTensors, trace_stage
from adala.plan import StagePlan, outline_run

# The tiny recipe with a single block, which is traced in a moment.
SHALLOW = ["--recipe", "tiny", "--teacher.model_args", "{patch_size: 14, embed_dim: 32, depth: 1, num_heads: 2}"]
LARGE = sorted(path.stem for path in RECIPE_FOLDER.glob("*large*.yaml"))
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("memory"))


def batch(images: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(images, 3, 16, 16), "label": torch.zeros(images, dtype=torch.int64)}


def saved_by_a_run(plan: StagePlan, images: int) -> int:
    """Bytes that autograd holds for a real micro-batch on the CPU."""
    stage = build_tiny_stage(plan).to(plan.model.precision.dtype).train()
    weights = [*stage.parameters(), *stage.buffers(), *stage.teacher.parameters(), *stage.teacher.buffers()]
    dtype = plan.model.precision.autocast_dtype
    with SavedActivations(weights) as saved, torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = stage(batch(images))
    assert losses["loss"].isfinite()
    return saved.peak_bytes


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        ("--ds_config", "zero1"),
        ("--ds_config", "zero3"),
        ("--ds_config", "zero1", "--keep", "[1]"),
        ("--ds_config", "zero1_autocast"),
    ],
    ids=" ".join,
)
def test_what_is_saved_is_what_a_run_saves(recipe: Path, number: int, overrides: tuple[str, ...]) -> None:
    plan = plan_stage(recipe, number, overrides)
    traced = trace_stage(plan)
    assert [traced.saved.at(images) for images in (2, 5)] == [saved_by_a_run(plan, images) for images in (2, 5)]


@pytest.mark.parametrize("number", [2, 3])
def test_checkpointed_activations_are_those_of_a_run(recipe: Path, number: int) -> None:
    asked = ("--ds_config", "zero1", f"--stage{number}.activation_checkpointing", "true")
    plan, whole = plan_stage(recipe, number, asked), plan_stage(recipe, number, asked[:2])
    traced = trace_stage(plan)
    assert traced.saved.at(4) == saved_by_a_run(plan, 4)
    # One block is computed again: more than nothing, less than what all three held.
    assert traced.saved.at(4) < traced.peak.at(4) < trace_stage(whole).saved.at(4)


def test_live_tensors_count_each_memory_once_until_it_is_let_go_of() -> None:
    weight = torch.zeros(10)
    with LiveTensors([weight]) as live:
        first = weight.view(2, 5) + 1
        second = first.T.contiguous()
        assert live.bytes == 80
        del first
        assert (live.bytes, live.peak_bytes) == (40, 80)
        second.add_(1)
    assert live.bytes == 40


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def states_of_an_engine(recipe: Path, zero: str) -> dict[str, int]:
    """What DeepSpeed holds on this rank after a step and one micro-batch of the next."""
    plan = plan_stage(recipe, 2, ("--ds_config", zero, "--stage2.micro_batch_size", "2", "--stage2.ema", "0.9"))
    stage = build_tiny_stage(plan)
    engine = build_engine(plan, stage)
    optimizer, in_backward = engine._engine.optimizer, {}

    def look(parameter: torch.Tensor) -> None:
        held = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
        in_backward["buckets"] = bytes_of([each for b in held for each in (b if isinstance(b, list) else [b])])

    next(stage.student.blocks[0].parameters()).register_post_accumulate_grad_hook(look)
    engine.train()
    for _ in range(plan.gradient_accumulation_steps + 1):
        engine.backward(engine(batch(2))["loss"])
        engine.step()
    state = optimizer.state.values()
    found = {"moments": bytes_of(each[key] for each in state for key in ("exp_avg", "exp_avg_sq"))}
    parameters = list(stage.parameters())
    if zero.startswith("zero3"):
        weights = {part.untyped_storage()._cdata for part in (p.ds_tensor for p in parameters)}
        masters = [m for m in optimizer.fp32_partitioned_groups_flat if m.untyped_storage()._cdata not in weights]
        gradients, found["student"] = [optimizer.grad_partitions_flat_buffer], bytes_of(p.ds_tensor for p in parameters)
    else:
        masters = getattr(optimizer, "single_partition_of_fp32_groups", [])
        gradients = [p.grad for p in parameters if p.grad is not None]
        if zero == "zero1_bf16":
            masters = optimizer.fp32_groups_flat_partition
            gradients += optimizer.fp32_groups_gradients_flat
        if zero == "zero2":
            gradients = [gradient for group in optimizer.all_grad_tensors.values() for gradient in group]
        if zero == "zero2_bf16":
            gradients = [gradient for group in optimizer.averaged_gradients.values() for gradient in group]
        found["student"] = bytes_of([*parameters, *stage.buffers()])
    found |= {"masters": bytes_of(masters), "gradients": bytes_of(gradients)}
    found["average"] = bytes_of(engine._averages.values())
    found["teacher"] = bytes_of([*stage.teacher.parameters(), *stage.teacher.buffers()])
    return found | {"buckets": in_backward.get("buckets", 0)}


ONE_RANK = ["zero0", "zero1", "zero2", "zero3", "zero1_bf16", "zero2_bf16", "zero3_bf16", "zero1_autocast"]


@pytest.mark.parametrize(
    ("zero", "ranks"), [*((zero, 1) for zero in ONE_RANK), ("zero1_bf16", 2), ("zero2", 2), ("zero3_bf16", 2)]
)
def test_states_are_those_of_an_engine(recipe: Path, zero: str, ranks: int) -> None:
    found = on_ranks(ranks, states_of_an_engine, recipe, zero)
    plan = plan_stage(recipe, 2, ("--ds_config", zero))
    counts = StagePlanner(plan).counts
    # ZeRO-2 holds one micro-batch's gradients after the first, and two for a moment.
    states = model_states(counts, plan.model.precision, ranks, accumulates=False, keeps_average=True)
    for of_rank in found:
        for name, size in of_rank.items():
            # Groups, under ZeRO-3 parameters, are padded to a multiple of the ranks; those of a share's ends are whole.
            padding = 8 * 60 * ranks if name != "gradients" or ranks == 1 else 0.5 * getattr(states, name)
            assert abs(size - getattr(states, name)) <= padding, name


def test_the_parameters_are_counted() -> None:
    plan = outline_run(load_recipe("tiny"))[1]
    counts, teacher = StagePlanner(plan).counts, plan.model.teacher
    assert teacher.name == "vit_tiny_patch16_224"
    assert counts.trained + counts.frozen == counts.teacher
    assert counts.trained > 0 and counts.buffers == 0


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_traffic_of_a_step(zero_stage: int) -> None:
    counts = dataclasses.replace(StagePlanner(outline_run(load_recipe("tiny"))[1]).counts, trained=1000, frozen=200)
    traffic = step_traffic(counts, load_ds_config(f"zero{zero_stage}_bf16"), ranks=4, accumulation=3)
    # Gradients in float32, weights in bf16.
    expected = {1: (2 * 3000, 1500), 2: (3 * 2 * 3000, 1500), 3: (3 * 3000, 3 * 2 * 1800)}
    assert (traffic.gradients, traffic.weights) == expected[zero_stage]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_fit_80_gib_as_they_stand(name: str, number: int) -> None:
    plan = outline_run(load_recipe(name))[number - 1]
    if number == 3 and getattr(plan.task, "head", None) == "mask2former" and not HAS_TRANSFORMERS:
        pytest.skip("the head mask2former needs the extra mask2former")
    planner, config = StagePlanner(plan), plan.config
    assert config.micro_batch_size is not None
    for gpus in (1, 4, 8):
        images = config.global_batch_size // gpus
        assert config.global_batch_size % (gpus * config.micro_batch_size) == 0
        demand = planner.demand(plan.model.precision, config.activation_checkpointing, gpus, images, gpu_gib=80)
        assert demand.fits(config.micro_batch_size), demand.total(config.micro_batch_size) / 2**30


def test_a_smaller_gpu_takes_smaller_micro_batches() -> None:
    recipe = load_recipe("tiny")
    plan = outline_run(recipe)[1]
    planner = StagePlanner(plan)
    sizes = [planner.report(1, gib).as_it_stands.largest for gib in (8, 1.1, 1.01)]
    assert sizes[0] == recipe.stage2.global_batch_size and sizes[2] is None
    demand = planner.report(1, 8).as_it_stands
    capacity = demand.total(4) / 2**30
    assert planner.report(1, capacity).as_it_stands.largest == 4
    assert planner.report(1, math.nextafter(capacity, 0) - 1e-6).as_it_stands.largest == 2


def test_what_is_asked_for_is_judged(capsys: pytest.CaptureFixture) -> None:
    assert main([*SHALLOW, "--gpus", "2", "--gpu_gib", "24", "--stage2.micro_batch_size", "7"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Stage 2: micro_batch_size 7 does not divide the" in said
    assert "--stage2.micro_batch_size 16 --stage2.activation_checkpointing false --ds_config zero1" in said


def test_every_image_size_of_a_stage_is_planned(capsys: pytest.CaptureFixture) -> None:
    sizes = "[{from_step: 3, image_size: [56, 56], micro_batch_size: 4}]"
    assert main([*SHALLOW, "--gpus", "1", "--json", "--stage2.image_sizes", sizes]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(each["stage"], each["from_step"]) for each in stages] == [(1, 0), (2, 0), (2, 3), (3, 0)]
    usual, large = stages[1:3]
    assert (large["image_size"], large["micro_batch_size"]) == ([56, 56], 4)
    per_image = [each["settings"][0]["saved_activations"]["per_image"] for each in (usual, large)]
    assert 3 < per_image[1] / per_image[0] < 5, "four times the patches"
    assert "from step 3 on" in large["verdict"][0] and "stage2.image_sizes" in large["verdict"][1]


def test_where_nothing_fits_one_sentence_says_what_would(capsys: pytest.CaptureFixture) -> None:
    assert main([*SHALLOW, "--gpus", "2", "--gpu_gib", "1.0001"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Stage 1: nothing fits into 1.0001 GiB; one image needs" in said and "more GPUs" in said


def test_json_says_the_same(capsys: pytest.CaptureFixture) -> None:
    assert main([*SHALLOW, "--gpus", "2", "--json", "--data.image_size", "[56, 28]"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in document["stages"]] == [1, 2, 3]
    stage = document["stages"][1]
    assert stage["image_size"] == [56, 28]
    reports = plan_memory(load_recipe("tiny", [*SHALLOW[2:], "--data.image_size", "[56, 28]"]), 2, 80)
    assert stage["verdict"] == list(verdict(reports[1], 80))
    assert [s["needs"] for s in stage["settings"]] == [d.total(d.largest) for d in reports[1].demands]


def test_more_gpus_than_images_raise_the_batch_and_the_rate_by_its_root() -> None:
    config = load_recipe("ade20k_dinov2_large").stage3
    at_64, at_512 = batch_changes(config, 512)
    assert (at_64.gpus, at_64.global_batch_size, at_64.lr) == (64, 64, pytest.approx(2 * config.lr))
    assert (at_512.gpus, at_512.global_batch_size, at_512.lr) == (512, 512, pytest.approx(32**0.5 * config.lr))
    assert at_512.head_lr == pytest.approx(32**0.5 * config.head_lr)
    assert not list(batch_changes(config, 8))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "0"], "--gpus is 0: it must be a whole number, 1 or more"),
        (["--gpu_gib", "-1"], "--gpu_gib is -1: it must be a number above 0"),
        (["--recipe", "nothing"], "there is no such recipe"),
        (["--data.image_size", "[29, 28]"], "is not divisible by the patch size"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_neither_deepspeed_nor_data_are_needed() -> None:
    """Nor weights: the recipe names shards and a teacher that are not here."""
    program = (
        "import sys; sys.modules['deepspeed'] = None; from adala.memory.__main__ import main; "
        "sys.exit(main(['--recipe', 'dinov2_small', '--teacher.model_args', '{depth: 1}']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Stage 3 fits as it stands" in done.stdout


def test_counting_leaves_nothing_trained_out(recipe: Path) -> None:
    plan = plan_stage(recipe, 3)
    stage = build_tiny_stage(plan)
    assert count_parameters(stage) == StagePlanner(plan).counts


@pytest.mark.parametrize("number", [1, 2])
def test_a_batch_is_counted_as_it_comes_and_as_it_is_normalised(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Both are there all the while: bytes of an image, and four times as many."""
    plan = outline_run(load_recipe("tiny"))[number - 1]
    counted = trace_stage(plan).peak.per_image
    there_before = torch.empty(64, 3, *plan.data.view.image_size, device="meta")
    monkeypatch.setattr(tracing, "_uint8_batch", lambda stage, plan, images: {"image": there_before[:images]})
    assert counted - trace_stage(plan).peak.per_image == (1 + 4) * 3 * math.prod(plan.data.view.image_size)
