"""Recipes resolved into plans: what is stated where, and what is refused before anything is touched."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import write_tiny_recipe, write_tiny_shards

from adala.build import rehearse
from adala.config import load_recipe
from adala.data import write_shards
from adala.ds_config import load_ds_config
from adala.plan import STAGES, resolve_run


@pytest.fixture
def plan_of(tmp_path: Path):
    """Resolves stages of the tiny recipe under ``overrides``."""
    recipe = str(write_tiny_recipe(tmp_path))

    def plan(*overrides: str, stages=(1, 2, 3)):
        return resolve_run(load_recipe(recipe, list(overrides)), stages)

    return plan


def test_a_plan_holds_every_stage_and_touches_nothing(plan_of, tmp_path: Path) -> None:
    plan = plan_of()
    rehearse(plan)
    assert [stage.number for stage in plan.stages] == [1, 2, 3] == list(STAGES)
    assert [stage.task is None for stage in plan.stages] == [True, True, False]
    assert plan.data.view.mean == (0.5, 0.5, 0.5) and plan.stages[0].micro_batch_size == 8
    assert not (tmp_path / "runs").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages[0].number = 2


# What decides the result, by an override of it and the condition that it must change.
DECIDING = {
    "seed": (["--seed", "1"], "seed"),
    "mechanism": (["--mechanism", "cosformer"], "mechanism"),
    "mechanism option": (["--mechanism_options.den_added", "1e-3"], "mechanism_options"),
    "kept blocks": (["--keep", "[1]"], "keep"),
    "mechanisms of blocks": (["--block_mechanisms.1=window"], "block_mechanisms"),
    "their options": (
        ["--block_mechanisms.1=window", "--block_mechanism_options.window.window=2"],
        "block_mechanism_options",
    ),
    "conversion": (["--mechanism", "hedgehog", "--conversion", "native"], "conversion"),
    "image size": (["--data.image_size", "[8, 8]"], "data.image_size"),
    "normalisation": (["--data.mean", "[0.1, 0.1, 0.1]"], "data.mean"),
    "order": (["--data.shuffle_buffer", "2"], "data.shuffle_buffer"),
    "loss": (["--stage1.loss", "mse"], "stage1.loss"),
    "rate": (["--stage1.lr", "0.1"], "stage1.lr"),
    "length": (["--stage1.steps", "5"], "stage1.steps"),
    "batch": (["--stage1.global_batch_size", "4"], "stage1.global_batch_size"),
    "augmentation": (["--stage1.augmentation", "crop"], "stage1.augmentation"),
    "weight decay": (["--stage1.weight_decay", "0.1"], "stage1.weight_decay"),
    "clipping": (["--stage1.gradient_clipping", "0"], "stage1.gradient_clipping"),
    "precision": (["--ds_config", "zero1_bf16"], "ds_config (its precision)"),
}


@pytest.mark.parametrize(("overrides", "condition"), DECIDING.values(), ids=DECIDING)
def test_everything_that_decides_the_result_is_a_condition(plan_of, overrides: list[str], condition: str) -> None:
    before, after = plan_of(stages=(1,)).stages[0].conditions, plan_of(*overrides, stages=(1,)).stages[0].conditions
    assert before.get(condition) != after[condition]
    assert json.loads(json.dumps(after[condition])) == after[condition], "as it is read back"


def test_an_image_size_from_a_step_on_is_planned(plan_of) -> None:
    def plan(micro: int, size: str = "[8, 12]"):
        sizes = f"[{{from_step: 2, image_size: {size}, micro_batch_size: {micro}}}]"
        return plan_of("--stage2.image_sizes", sizes, stages=(1, 2))

    stage = plan(2).stages[1]
    before, after = stage.at(1), stage.at(2)
    assert (before.data.view.image_size, before.micro_batch_size) == ((16, 16), 8)
    assert (after.data.view.image_size, after.micro_batch_size) == ((8, 12), 2)
    assert (after.gradient_accumulation_steps, stage.at(3)) == (4, after)
    assert plan(4).stages[1].conditions == stage.conditions, "how batches are cut is no condition"
    with pytest.raises(ValueError, match=r"or another stage2\.image_sizes\[0\]\.micro_batch_size"):
        plan(3)
    with pytest.raises(ValueError, match="image size 8 x 10 is not divisible by the patch size 4 x 4"):
        rehearse(plan(2, "[8, 10]"))


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [("[0, 3]", "the model has the blocks 0 to 2, not 3"), ("4", "the model has 3 blocks; choose fewer")],
)
def test_intermediate_blocks_that_are_not_there_are_refused(plan_of, blocks: str, sentence: str) -> None:
    asked = ["--stage2.intermediate_weight", "1", "--stage2.intermediate_blocks", blocks]
    with pytest.raises(ValueError, match=rf"^stage2\.intermediate_blocks.*{sentence}"):
        rehearse(plan_of(*asked, stages=(2,)))


# Keys that are no condition at their default, which was the only way once.
LATER = {
    "global_weight": "0.5",
    "intermediate_weight": "0.5",
    "intermediate_blocks": "[1]",
    "ema": "0.9",
    "image_sizes": "[{from_step: 2, image_size: [8, 8]}]",
}


@pytest.mark.parametrize("key", LATER)
def test_a_later_key_is_a_condition_where_it_asks_for_something(plan_of, key: str) -> None:
    condition = f"stage2.{key}"
    assert condition not in plan_of(stages=(2,)).stages[0].conditions
    assert condition in plan_of(f"--{condition}", LATER[key], stages=(2,)).stages[0].conditions


@pytest.mark.parametrize(
    "overrides",
    [
        ["--stage1.log_every", "7"],
        ["--stage1.save_every", "7"],
        ["--stage1.evaluate_every", "7"],
        ["--stage1.micro_batch_size", "2"],
        ["--stage1.max_skipped_steps", "9"],
        ["--data.num_workers", "1"],
        ["--data.remote_attempts", "3"],
        ["--data.stall_timeout_s", "5"],
        ["--data.total_timeout_s", "50"],
        ["--data.min_mib_per_s", "0.1"],
        ["--data.cache_dir", "/elsewhere"],
        ["--data.cache_gib", "5"],
        ["--run_name", "other"],
        ["--tensorboard", "true"],
        ["--stage2.lr", "0.1"],
        ["--ds_config", "zero2"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_does_not_decide_the_result_is_none(plan_of, overrides: list[str]) -> None:
    assert plan_of(*overrides, stages=(1,)).stages[0].conditions == plan_of(stages=(1,)).stages[0].conditions


def test_how_remote_shards_are_read_reaches_every_data_set(plan_of) -> None:
    plan = plan_of("--data.cache_dir", "/elsewhere", "--data.stall_timeout_s", "5", "--data.remote_attempts", "3")
    indexes = [plan.evaluation.held_out, plan.evaluation.probe_train, plan.stages[0].training, plan.stages[0].held_out]
    for index in indexes:
        remote = index.remote
        assert (remote.cache_dir, remote.stall_timeout_s, remote.remote_attempts) == ("/elsewhere", 5, 3)


def test_teacher_and_data_are_known_by_their_contents(plan_of, tmp_path: Path) -> None:
    before = plan_of(stages=(1,)).stages[0].conditions
    moved = (tmp_path / "teacher.safetensors").rename(tmp_path / "moved.safetensors")
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    data = [
        f"--data.{split}={json.dumps([str(tmp_path / 'elsewhere' / f'{split}-*.tar')])}" for split in ("train", "val")
    ]
    assert plan_of("--teacher.checkpoint", str(moved), *data, stages=(1,)).stages[0].conditions == before
    weights = load_file(moved)
    save_file({**weights, "norm.bias": weights["norm.bias"] + 1}, moved)
    changed = plan_of("--teacher.checkpoint", str(moved), *data, stages=(1,)).stages[0].conditions
    assert changed["teacher.checkpoint (its weights)"] != before["teacher.checkpoint (its weights)"]
    write_shards([{"png": Image.new("RGB", (16, 16))}] * 8, tmp_path / "elsewhere", "train", samples_per_shard=8)
    changed = plan_of("--teacher.checkpoint", str(moved), *data, stages=(1,)).stages[0].conditions
    key = "stage1.train_data or data.train (its shards)"
    assert changed[key] != before[key]


def test_the_weights_and_sources_of_a_mixture_are_conditions(plan_of, tmp_path: Path) -> None:
    folders = [write_tiny_shards(tmp_path / name) for name in ("one", "two")]

    def conditions(*weights: float) -> dict:
        sources = [
            {"source": f"{folder}/train-*.tar", "weight": weight}
            for folder, weight in zip(folders, weights, strict=True)
        ]
        return plan_of("--data.train", json.dumps(sources), stages=(1,)).stages[0].conditions

    keys = [f"stage1.train_data or data.train (its {what})" for what in ("weights", "shards")]
    mixed, other = conditions(3, 1), conditions(1, 3)
    assert mixed == conditions(6, 2) and list(mixed[keys[0]]) == [3, 1]
    assert all(mixed[key] != other[key] for key in keys)
    plain = plan_of("--data.train", json.dumps([f"{folder}/train-*.tar" for folder in folders]), stages=(1,))
    assert keys[0] not in plain.stages[0].conditions and plain.stages[0].conditions[keys[1]] != mixed[keys[1]]
    assert len(plain.stages[0].training.shards) == 6 and plain.stages[0].training.sources == ()


def test_a_native_conversion_states_its_values_in_the_recipe_and_says_so(plan_of) -> None:
    native = ["--mechanism", "hedgehog", "--conversion", "native"]
    plan = plan_of(*native)
    assert plan.recipe.stage1.lr == plan.stages[0].config.lr == 0.01
    assert "stage1.lr is 0.01 by hedgehog's native conversion, in place of 0.001" in plan.notes
    assert plan.left_out == (2,)
    asked = plan_of(*native, "--stage1.lr", "0.5")
    assert asked.recipe.stage1.lr == asked.stages[0].config.lr == 0.5
    assert asked.recipe.over_conversion == ["stage1.lr"]
    assert any("stage1.lr is 0.5, as asked for" in note for note in asked.notes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--teacher.checkpoint", "null"], "the teacher has no weights: name a file in teacher.checkpoint"),
        (["--teacher.checkpoint", "/nowhere.safetensors"], "teacher.checkpoint /nowhere.safetensors does not exist"),
        (
            ["--stage3.task.num_classes", "2"],
            r"data.train: the sample .*: it has the label 2, but stage3.task.num_classes is 2",
        ),
        (["--stage2.freeze", '["nothing.*"]'], "freeze: no parameter matches 'nothing"),
        (["--keep", "[7]"], "the model has the blocks 0 to 2, not 7"),
        (["--mechanism_options.eps", "1"], "no option 'eps'"),
        (["--stage1.loss", "attention_map_cross_entropy"], "has no feature maps to compare"),
        (["--stage3.augmentation", "crop", "--data.image_size", "[18, 16]"], "is not divisible by the patch size"),
        (["--stage3.global_batch_size", "41"], "data.train holds 40 samples, fewer than one global batch of 41"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_of_any_stage_are_told_before_the_first(plan_of, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearse(plan_of(*overrides))


def test_a_random_teacher_is_random_on_purpose(plan_of) -> None:
    plan = plan_of("--teacher.checkpoint", "random")
    assert any("RANDOM" in note for note in plan.notes)


def test_stage_3_needs_labels_and_says_where(tmp_path: Path) -> None:
    recipe = str(write_tiny_recipe(tmp_path))
    write_shards([{"png": Image.new("RGB", (16, 16))}] * 16, tmp_path / "plain", "val", samples_per_shard=16)
    overrides = ["--data.val", json.dumps([str(tmp_path / "plain" / "val-*.tar")])]
    with pytest.raises(ValueError, match=r"data.val has none: most samples of .*val-00000.tar are of no use"):
        resolve_run(load_recipe(recipe, overrides), (3,))
    plan = resolve_run(load_recipe(recipe, overrides), (1,))
    assert plan.evaluation.probe_train is None


def test_a_disk_without_room_is_told_first(plan_of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    with pytest.raises(ValueError, match="has 1 MiB left, and checkpoints and students of this run may need 4 MiB"):
        rehearse(plan_of())
    rehearse(plan_of("--stage1.save_every_minutes", "0", stages=(1,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a JSON object"),
        ('{"bf16": null}', "bf16 must be an object"),
        ('{"zero_optimization": {"stage": 4}}', "stage is 4: it must be 0, 1, 2 or 3"),
        ('{"bf16": {"enabled": true}}', "bf16 without ZeRO"),
        ('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 1}}', "fp16 overflows"),
        ('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}', "compute_grad_norm"),
        ('{"train_batch_size": 8}', "belongs into the recipe"),
        ("{", "not valid JSON"),
    ],
    ids=range(8),
)
def test_a_ds_config_that_would_go_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_ds_config(str(path))


def test_sets_and_batches_of_the_least_size_are_allowed(plan_of, tmp_path: Path) -> None:
    write_shards([{"png": Image.new("RGB", (16, 16)), "cls": 0}], tmp_path / "one", "val", samples_per_shard=1)
    (stage,) = plan_of("--data.val", json.dumps([str(tmp_path / "one" / "val-*.tar")]), stages=(3,)).stages
    assert stage.held_out.num_samples == 1
    for batch, micro, expected in ((1, None, (1, 1)), (8, 1, (1, 8)), (8, 4, (4, 2)), (40, None, (40, 1))):
        overrides = [f"--stage3.global_batch_size={batch}", *([f"--stage3.micro_batch_size={micro}"] if micro else [])]
        (stage,) = plan_of(*overrides, stages=(3,)).stages
        assert (stage.micro_batch_size, stage.gradient_accumulation_steps) == expected
    with pytest.raises(ValueError, match="8 does not divide into 1 ranks x micro-batches of 3: choose"):
        plan_of("--stage3.micro_batch_size=3", stages=(3,))
