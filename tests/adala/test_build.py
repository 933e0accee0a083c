"""From a plan to the things of a stage: what trains, from which start, and a head that begins as a probe."""

import dataclasses
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_recipe
from tiny_stage import build_tiny_stage, plan_stage

from adala.build import (
    build_evaluation_loader,
    build_monitor_loader,
    build_teacher,
    build_train_loader,
    find_start,
    load_start,
    preparation_of,
    prepare_student,
    rehearse,
    unaligned_student,
)
from adala.config import load_recipe
from adala.data import StreamState, write_shards
from adala.data.samples import BadDataError
from adala.evaluation import collect_features
from adala.export import save_student
from adala.plan import resolve_run
from adala.runs import RunFolder, StageRecord


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_tiny_recipe(tmp_path)


def trains(plan) -> set[str]:
    student = unaligned_student(plan.model, build_teacher(plan.model.teacher))
    prepare_student(plan, student)
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def test_what_trains_in_each_stage(recipe: Path) -> None:
    qkv = {f"blocks.{block}.attn.qkv.{kind}" for block in range(3) for kind in ("weight", "bias")}
    teacher = build_teacher(plan_stage(recipe, 2).model.teacher)
    everything = {name for name, _ in teacher.named_parameters()}
    assert trains(plan_stage(recipe, 1)) == qkv
    assert trains(plan_stage(recipe, 2)) == trains(plan_stage(recipe, 3)) == everything
    assert trains(plan_stage(recipe, 2, ["--stage2.trainable=qkv"])) == qkv
    frozen = trains(plan_stage(recipe, 2, ['--stage2.freeze=["pos_embed", "blocks.0.*"]']))
    assert everything - frozen == {name for name in everything if name == "pos_embed" or name.startswith("blocks.0.")}
    stage = build_tiny_stage(plan_stage(recipe, 3, ["--stage3.freeze_backbone=true"]))
    assert {n for n, p in stage.named_parameters() if p.requires_grad} == {"head.linear.weight", "head.linear.bias"}


def test_the_stages_are_built_as_the_recipe_says(recipe: Path) -> None:
    overrides = ["--stage3.task.label_smoothing=0.2", "--stage3.task.pooling=patch", "--stage3.task.num_classes=4"]
    stage = build_tiny_stage(plan_stage(recipe, 3, overrides))
    assert (stage.task.label_smoothing, stage.task.pooling, stage.task.num_classes) == (0.2, "patch", 4)
    assert stage.head.linear.weight.shape == (4, 32) and not stage.freeze_backbone
    for number in (1, 2):
        assert build_tiny_stage(plan_stage(recipe, number, [f"--stage{number}.loss=mse"])).calibrated_targets == ()
        assert build_tiny_stage(plan_stage(recipe, number)).target_variance != {}
    native = build_tiny_stage(plan_stage(recipe, 3, ["--mechanism=lolcats", "--conversion=native"]))
    adapters = {n for n, p in native.student.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)


@pytest.mark.parametrize("pooling", ["cls", "patch", "cls_patch"])
def test_a_head_that_starts_as_a_probe_is_at_the_probes_optimum(recipe: Path, pooling: str) -> None:
    """Of the very function that trains: normalised features through the head, see test_linear_probe.py."""
    # Features of very unequal scales: otherwise the final norm has left next to nothing for the head's to do.
    path = recipe.parent / "teacher.safetensors"
    save_file(load_file(path) | {"norm.weight": torch.logspace(-2, 1, 32)}, path)
    overrides = ["--stage3.head_init=probe", f"--stage3.task.pooling={pooling}", "--evaluation.probe_l2=0.05"]
    plan = plan_stage(recipe, 3, overrides)
    stage = build_tiny_stage(plan)
    assert stage.student.training and stage.head.linear.weight.requires_grad
    batches = build_evaluation_loader(plan.data, plan.training, task=plan.task)
    stage.eval()
    found = collect_features({"": stage.student}, batches, pooling, plan.task)[""]
    inputs, head = stage.head.norm(found.values), stage.head.linear
    with torch.no_grad():
        excess = head(inputs).softmax(-1) - F.one_hot(found.labels, 3)
        torch.testing.assert_close(excess.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
        spread = inputs.std(0)
        gradient = excess.T @ ((inputs - inputs.mean(0)) / spread) / len(inputs)
        torch.testing.assert_close(-gradient, 0.05 * head.weight * spread, atol=1e-3, rtol=0)


def test_a_probe_is_fitted_on_as_many_samples_as_the_recipe_says(recipe: Path) -> None:
    few, many = (
        build_tiny_stage(plan_stage(recipe, 3, ["--stage3.head_init=probe", f"--stage3.head_init_samples={count}"]))
        for count in (12, 40)
    )
    assert not torch.allclose(few.head.linear.weight, many.head.linear.weight, atol=1e-3)


def test_what_is_random_comes_from_the_seed_alone(recipe: Path) -> None:
    """Whatever was drawn before, and without moving the numbers that are drawn after."""

    def heads(seed: int) -> torch.Tensor:
        torch.manual_seed(99)
        expected = torch.rand(3)
        torch.manual_seed(99)
        stage = build_tiny_stage(plan_stage(recipe, 3, [f"--seed={seed}", "--teacher.checkpoint=random"]))
        assert torch.equal(torch.rand(3), expected)
        torch.rand(7)
        return torch.cat([stage.head.linear.weight.flatten(), stage.student.patch_embed.proj.weight.flatten()])

    assert torch.equal(heads(0), heads(0)) and not torch.equal(heads(0), heads(1))


def test_zero_3_keeps_the_whole_graph_and_refuses_what_needs_single_modules(recipe: Path) -> None:
    for zero, released in (("zero1", True), ("zero2", True), ("zero3", False)):
        stage = build_tiny_stage(plan_stage(recipe, 1, [f"--ds_config={zero}"]))
        assert stage.release_activations is released
    maps = ["--mechanism=hedgehog", "--stage1.loss=attention_map_cross_entropy"]
    build_tiny_stage(plan_stage(recipe, 1, [*maps, "--ds_config=zero2"]))
    with pytest.raises(ValueError, match="ds_config zero3: ZeRO-3 gathers weights for a module's forward pass only"):
        build_tiny_stage(plan_stage(recipe, 1, [*maps, "--ds_config=zero3"]))


@pytest.mark.parametrize(
    ("asked", "checkpoints"),
    [
        (["save_every=0", "save_every_minutes=0"], 1),
        (["save_every=3", "save_every_minutes=0"], 2),
        (["save_every=4", "save_every_minutes=0"], 1),
        (["save_every=1", "save_every_minutes=0"], 3),
        (["keep_last=1"], 2),
        ([], 3),
        (["keep_last=7"], 4),
        (["save_every=1", "save_every_minutes=0", "keep_last=1", "keep_every=2"], 4),
    ],
    ids=str,
)
def test_the_room_that_a_run_needs(recipe: Path, monkeypatch, asked: list[str], checkpoints: int) -> None:
    """Four steps. All weights, with what AdamW keeps of those that train, in each checkpoint; then the student's."""
    teacher = build_teacher(plan_stage(recipe, 1).model.teacher)
    weights = sum(p.numel() for p in teacher.parameters())
    qkv = sum(p.numel() for name, p in teacher.named_parameters() if ".attn.qkv." in name)
    needed = checkpoints * (4 * weights + 8 * qkv) + 4 * weights
    plan = resolve_run(load_recipe(str(recipe), [f"--stage1.{key}" for key in asked]), (1,))
    for free in (needed, needed - 1):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free == needed:
            rehearse(plan)
        else:
            with pytest.raises(ValueError, match="make room, or choose another runs_dir"):
                rehearse(plan)


def finish(plan, changes: dict | None = None, number: int = 1) -> Path:
    """A finished stage with a student in the run at the working directory, described as ``changes`` say."""
    folder = RunFolder(Path.cwd()).stage(number)
    folder.path.mkdir(parents=True)
    student = unaligned_student(plan.model, build_teacher(plan.model.teacher))
    with torch.no_grad():
        student.norm.bias.fill_(0.25)
    save_student(folder.path, student.state_dict(), dataclasses.replace(plan.model.student, **(changes or {})))
    folder.finish(StageRecord(plan.conditions, "sha256:student", {}, None))
    return folder.path


@pytest.fixture
def run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The recipe's run, which is the working directory."""
    folder = recipe.parent / "runs" / "tiny-run"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return RunFolder(Path.cwd())


def test_a_stage_starts_from_the_newest_one_before_it(recipe: Path, run: RunFolder) -> None:
    plan = plan_stage(recipe, 3)
    start = find_start(run, plan)
    assert (start.folder, start.digest) == (None, "linearized")
    assert start.origin == "the linearized teacher (no stage 2 in this run)"
    assert find_start(run, plan_stage(recipe, 2)).origin == "the linearized teacher (no stage 1 in this run)"
    assert find_start(run, plan_stage(recipe, 1)).origin == "the linearized teacher"
    finish(plan_stage(recipe, 1))
    start = find_start(run, plan)
    assert start.folder == run.stage(1).path and start.digest.startswith("sha256:")
    student = load_start(start, plan.model, build_teacher(plan.model.teacher))
    assert student.norm.bias.eq(0.25).all() and student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    finish(plan_stage(recipe, 2), number=2)
    assert find_start(run, plan).folder == run.stage(2).path
    assert find_start(run, plan_stage(recipe, 2)).folder == run.stage(1).path
    assert find_start(run, plan_stage(recipe, 1)).folder is None
    assert find_start(run, plan_stage(recipe, 3, ["--stage3.start_from=linearized"])).folder is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanism": "cosformer"}, "has mechanism 'cosformer', this recipe 'linear'"),
        ({"mechanism_options": {"den_added": 0.5}}, r"has mechanism_options {'den_added': 0.5}, this recipe {}"),
        ({"keep": [1]}, r"has keep \[1\], this recipe \[\]"),
        ({"block_mechanisms": {1: "window"}}, r"has block_mechanisms {1: 'window'}, this recipe {}"),
        ({"block_mechanism_options": {"window": {}}}, r"has block_mechanism_options {'window': {}}, this recipe {}"),
        ({"backbone": "vit_small_patch16_224"}, "has backbone 'vit_small_patch16_224'"),
        ({"model_args": {"depth": 2}}, r"has model_args {'depth': 2}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_student_of_another_make_is_no_start(recipe: Path, run: RunFolder, changes: dict, message: str) -> None:
    finish(plan_stage(recipe, 1), changes)
    with pytest.raises(ValueError, match=message):
        find_start(run, plan_stage(recipe, 2))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("--mechanism_options.den_added=0.5", "mechanism_options"),
        ("--mechanism=cosformer", "mechanism"),
        ("--keep=[1]", "keep"),
        ("--block_mechanisms={1: window}", "block_mechanisms"),
        ("--teacher.checkpoint=random", "teacher.checkpoint"),
    ],
    ids=lambda value: value.partition("=")[0],
)
def test_a_stage_of_another_teacher_or_mechanism_is_no_start(recipe: Path, run: RunFolder, override, key: str) -> None:
    finish(plan_stage(recipe, 1))
    with pytest.raises(ValueError, match=rf"stage 1 of .* was made with {key}"):
        find_start(run, plan_stage(recipe, 2, [override]))
    assert find_start(run, plan_stage(recipe, 2, ["--stage2.lr=0.5", "--stage1.lr=0.5"])).folder == run.stage(1).path


def test_loaders_follow_the_plan(recipe: Path) -> None:
    plan = plan_stage(recipe, 3, ["--stage3.micro_batch_size=2", "--evaluation.monitor_samples=9"])
    batches = iter(build_train_loader(plan))
    first, second = next(batches), next(batches)
    assert first["image"].shape == (2, 3, 16, 16) and first["label"].shape == (2,)
    assert first["image"].dtype == torch.uint8
    assert first["id"] != second["id"] and build_train_loader(plan).steps_per_epoch == 5
    assert next(iter(build_train_loader(plan)))["id"] == first["id"]
    other = plan_stage(recipe, 3, ["--stage3.micro_batch_size=2", "--seed=1"])
    assert next(iter(build_train_loader(other)))["id"] != first["id"]
    loader = build_train_loader(plan)
    next(iter(loader))
    state = StreamState.from_dict(loader.state.to_dict())
    assert next(iter(build_train_loader(plan, state)))["id"] == second["id"]
    assert [len(batch["id"]) for batch in build_monitor_loader(plan)] == [4, 4, 1]
    assert all("label" in batch for batch in build_monitor_loader(plan))
    unlabelled = plan_stage(recipe, 2)
    assert all("label" not in batch for batch in build_monitor_loader(unlabelled))
    assert "label" not in next(iter(build_train_loader(unlabelled)))


def test_a_stage_normalises_the_images_of_its_loader(recipe: Path) -> None:
    """To the bits of the worker's own normalisation, which evaluations have; without it uint8 is refused."""
    plan = plan_stage(recipe, 2)
    stage, batch = build_tiny_stage(plan), next(iter(build_train_loader(plan)))
    in_worker = preparation_of(None, plan.data.view, plan.config.augmentation)
    image = stage.images_for(stage.student, {"image": batch["image"][:1]})
    picture = Image.fromarray(batch["image"][0].permute(1, 2, 0).numpy())
    assert torch.equal(image[0], in_worker.transform(picture, None)["image"])
    assert torch.equal(stage.images_for(stage.student, {"image": image}), image)
    stage.normalise = None
    with pytest.raises(ValueError, match=r"images of torch\.uint8 are not normalised"):
        stage(batch)


def test_a_stage_trains_at_an_image_size_of_its_own(recipe: Path) -> None:
    """The model keeps its position embedding, and a stage's result is one of the size that it saw."""
    usual, small = (plan_stage(recipe, 2, overrides) for overrides in ([], ["--stage2.image_size", "[8, 12]"]))
    stage = build_tiny_stage(small)
    assert stage.student.pos_embed.shape == build_tiny_stage(usual).student.pos_embed.shape == (1, 17, 32)
    batch = next(iter(build_train_loader(small)))
    assert batch["image"].shape == (8, 3, 8, 12)
    assert next(iter(build_monitor_loader(small)))["image"].shape[2:] == (8, 12)
    assert stage.eval()(batch)["features"].shape == (8, 1 + 2 * 3, 32)
    differs = {key for key, value in small.conditions.items() if value != usual.conditions[key]}
    assert differs == {"stage2.image_size"}
    run = resolve_run(load_recipe(str(recipe), ["--stage2.image_size", "[8, 10]"]), (1, 2))
    with pytest.raises(ValueError, match="image size 8 x 10 is not divisible by the patch size 4 x 4"):
        rehearse(run)


@pytest.mark.parametrize("number", [1, 3])
def test_the_recipe_says_how_many_samples_may_be_bad(recipe: Path, number: int) -> None:
    """In training and evaluation; it decides whether a run comes to its end, and not to which."""
    images = [b"no image" if n % 3 == 0 else Image.new("RGB", (16, 16), (6 * n, 90, 5)) for n in range(40)]
    for split in ("train", "val"):
        samples = [{"__key__": f"{n:02d}", "png": image, "cls": n % 3} for n, image in enumerate(images)]
        write_shards(samples, recipe.parent / "shards", split, samples_per_shard=20)
    strict, lenient = plan_stage(recipe, number), plan_stage(recipe, number, ["--data.max_bad_fraction=0.4"])
    assert strict.conditions == lenient.conditions
    for build, split in [(build_train_loader, "train"), (build_monitor_loader, "val")]:
        with pytest.raises(BadDataError, match=r"more than \d+ samples .*: repair the shards"):
            list(islice(build(strict), 5))
        loader = build(lenient)
        assert list(islice(loader, 5 if split == "train" else None))
        assert loader.bad_samples == {f"{split}-00000.tar": 7, f"{split}-00001.tar": 7}
