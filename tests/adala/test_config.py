"""Recipes and overrides, and that every error names its key and says what is right."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from adala.config import (
    AttentionAlignmentConfig,
    DataConfig,
    EvaluationConfig,
    FeatureAlignmentConfig,
    FinetuningConfig,
    Recipe,
    SearchConfig,
    TeacherConfig,
    load_recipe,
    parse_command,
    recipe_to_yaml,
)


def test_defaults_recipe_and_overrides() -> None:
    command = parse_command(["--local_rank=1", "--stage", "2", "--stage2.lr", "5e-4", "--keep", "[0, 5]"])
    assert command.stages == (2,) and not command.overwrite
    assert command.recipe.stage2.lr == 5e-4
    assert command.recipe.keep == [0, 5]
    assert command.recipe.teacher.model_args["embed_dim"] == 64
    assert parse_command(["--stage", "all"]).stages == (1, 2, 3)


def test_single_blocks_have_other_mechanisms(tmp_path) -> None:
    given = ["--block_mechanisms.4", "window", "--block_mechanisms.7=performer"]
    recipe = load_recipe("tiny", [*given, "--block_mechanism_options.window.window", "4"])
    assert recipe.block_mechanisms == {4: "window", 7: "performer"}
    assert recipe.block_mechanism_options == {"window": {"window": 4}}
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(str(path)) == recipe
    more = load_recipe(str(path), ["--block_mechanisms", "{1: window}"])
    assert more.block_mechanisms == {1: "window"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "[4]"], "block 4 stands in keep and in block_mechanisms: leave it out of one of them"),
        (
            ["--block_mechanism_options.performer.eps", "1"],
            "options of performer, which no block has: name it in block_m",
        ),
        (["--mechanism", "window", "--block_mechanism_options.window.window", "4"], "give them as mechanism_options"),
        (["--block_mechanisms", "{a: window}"], "block_mechanisms is 'a': it must be a mapping from block numbers"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_blocks_cannot_have_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("tiny", ["--block_mechanisms", "{4: window}", *arguments])


def test_a_recipe_written_out_reads_back_the_same(tmp_path) -> None:
    recipe = load_recipe("tiny", ["--mechanism", "performer", "--mechanism_options.num_features", "8", "--seed=3"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert recipe.mechanism_options == {"num_features": 8}
    assert load_recipe("tiny", ["--mechanism_options.eps", "1e-6"]).mechanism_options == {"eps": 1e-6}
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nowhere"], "--recipe nowhere: there is no such recipe; known are .*tiny"),
        (["--stage2.lrr", "1"], "unrecognized arguments: --stage2.lrr"),
        (["--stage2.lr", "fast"], "stage2.lr is fast: it must be a number above 0"),
        (["--stage1.loss", "l1"], "stage1.loss is l1: it must be one of mse, normalized_mse"),
        (["--stage", "4"], "--stage: invalid choice: '4'"),
        (["--recipe"], "--recipe: expected one argument"),
        (["--recip", "tiny"], "unrecognized arguments: --recip tiny"),
        (["--data.train", "train-0.tar", "train-1.tar"], "unrecognized arguments: train-1.tar; .*needs quotes"),
        (["--stage1", "null"], '"stage1".*null'),
        (["--stage1.lr", ""], "stage1.lr is empty: it must be a number above 0"),
        (
            ["--stage1.micro_batch_size", "fast"],
            "stage1.micro_batch_size is fast: it must be a whole number, 1 or more$",
        ),
    ],
)
def test_command_line_errors_name_the_key(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage1: {stepz: 3}", "recipe .*stage1.*stepz"),
        ("speed: 3", "recipe .*speed"),
        ("stage1: {steps: many}", "recipe .*stage1.steps is many: it must be a whole number, 1 or more"),
        ("stage1: {lr: {a: 1}}", "recipe .*stage1.lr is .*: it must be a number above 0"),
        ("stage1: {lr: true}", "recipe .*stage1.lr is True: it must be a number above 0"),
        ("stage1: {lr: 1" + 400 * "0" + "}", "recipe .*too large"),
        ("stage1: {lr: " + 5000 * "1" + "}", "recipe .*digits"),
        ("data: {train: 3}", "recipe .*data.train is 3: it must be at least one shard"),
        ("data: {train: [a.tar, null]}", "recipe .*data.train is .*: it must be at least one shard"),
        ("stage1: [", "recipe .*expected"),
        ("stage1: " + 5000 * "[", "recipe .*"),
        ("stage1: {{}: 3}", "recipe .*unhashable"),
        ("1: 2", "recipe .*must be a string"),
        ("seed: 1\nseed: 2", "recipe .*seed stands here twice.*line 2"),
        ("stage2: {lr: 1.0, steps: 3, lr: 2.0}", "recipe .*lr stands here twice"),
        ("stage2: {lr: 1.0}\nstage2.lr: 2.0", "recipe .*stage2.lr stands here twice"),
        ("stage1: null", "recipe .*stage1 is null: it must have keys of its own"),
        ("stage1:", "recipe .*stage1 is null: it must have keys of its own"),
        ("data: [a.tar]", "recipe .*data is .'a.tar'.: it must have keys of its own"),
        ("teacher: embedded", "recipe .*teacher is 'embedded': it must have keys of its own"),
        ("evaluation: 3", "recipe .*evaluation is 3: it must have keys of its own"),
        ("", "recipe .*it is empty"),
        ("# nothing yet", "recipe .*it is empty"),
        ("[run_name, tiny]", "recipe .*it holds .*must be a mapping of keys"),
        ("tiny", "recipe .*it holds 'tiny'.*must be a mapping of keys"),
        ("run_name: a\x07", "recipe .*special characters"),
    ],
    ids=lambda value: value[:30],
)
def test_recipe_errors_name_file_and_key(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_recipe(str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "it is a folder"), (Path("/proc/self/mem"), "it cannot be read")):
        with pytest.raises(ValueError, match=message):
            load_recipe(str(path))
    path = tmp_path / "mine.yaml"
    for encoding in ("utf-16", "latin-1"):
        path.write_text("run_name: ö", encoding=encoding)
        with pytest.raises(ValueError, match=r"mine\.yaml: it is not UTF-8 text"):
            load_recipe(str(path))


def test_recipes_by_path(tmp_path: Path, monkeypatch) -> None:
    """A byte-order mark, names that are not ASCII, no suffix, a home folder."""
    (tmp_path / "réglage").write_text("run_name: été", encoding="utf-8-sig")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("réglage", "./réglage", "~/réglage", str(tmp_path / "réglage")):
        assert load_recipe(name).run_name == "été"


def test_numbers_and_dates_in_yaml_are_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "run_name: 2024-01-01\nstage1: {lr: 1e-3, weight_decay: 5E-2}\nmechanism_options: {eps: 1e-6, b: 1e3}"
    )
    recipe = load_recipe(str(path))
    assert (recipe.run_name, recipe.stage1.lr, recipe.stage1.weight_decay) == ("2024-01-01", 1e-3, 5e-2)
    assert recipe.mechanism_options == {"eps": 1e-6, "b": 1000.0}


LISTS = ["data.train", "stage3.train_data", "evaluation.probe_train", "stage2.freeze"]


@pytest.mark.parametrize("key", LISTS)
def test_one_name_is_a_list_of_one(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    path = tmp_path / "mine.yaml"
    for given, expected in (("a/train-*.tar", ["a/train-*.tar"]), (["a.tar", "{b,c}.tar"], ["a.tar", "{b,c}.tar"])):
        path.write_text(yaml.safe_dump({section: {name: given}}))
        assert getattr(getattr(load_recipe(str(path)), section), name) == expected
    for given, expected in (
        ("shards/train-*.tar", ["shards/train-*.tar"]),
        ("s/{0..3}.tar", ["s/{0..3}.tar"]),
        ('["a.tar"]', ["a.tar"]),
    ):
        assert getattr(getattr(load_recipe("tiny", [f"--{key}", given]), section), name) == expected
    if name != "freeze":
        for empty in ("[]", "", '[""]'):
            with pytest.raises(ValueError, match=f"{key} is .*: it must be at least one shard"):
                load_recipe("tiny", [f"--{key}", empty])


MIXTURE = "[{source: a, weight: 3}, {source: [b.tar, '{c,d}.tar'], weight: 1e-3}]"


@pytest.mark.parametrize("key", ["data.train", "stage3.train_data"])
def test_a_mixture_is_a_list_of_sources_with_weights(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    expected = [{"source": "a", "weight": 3}, {"source": ["b.tar", "{c,d}.tar"], "weight": 1e-3}]
    path = tmp_path / "mine.yaml"
    path.write_text(f"{section}: {{{name}: {MIXTURE}}}")
    for recipe in (load_recipe(str(path)), load_recipe("tiny", [f"--{key}", MIXTURE])):
        assert getattr(getattr(recipe, section), name) == expected
        path.write_text(recipe_to_yaml(recipe))
        assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    "mixture",
    [
        "[{source: a, weight: 0}]",
        "[{source: a, weight: -1}]",
        "[{source: a, weight: .inf}]",
        "[{source: a, weight: .nan}]",
        "[{source: a, weight: true}]",
        "[{source: a, weight: much}]",
        "[{source: a}]",
        "[{weight: 1}]",
        "[{source: a, weight: 1, name: b}]",
        "[{source: '', weight: 1}]",
        "[{source: [], weight: 1}]",
        "[{source: [a, ''], weight: 1}]",
        "[{source: 3, weight: 1}]",
        "[{source: a, weight: 1}, {source: b}]",
        "[a.tar, {source: b, weight: 1}]",
        "{source: a, weight: 1}",
    ],
)
def test_what_is_no_mixture_is_refused_wherever_it_stands(tmp_path: Path, mixture: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"stage2: {{train_data: {mixture}}}")
    for name, arguments in ((str(path), []), ("tiny", ["--stage2.train_data", mixture])):
        with pytest.raises(
            ValueError, match=r"stage2.train_data is .*: it must be at least one shard: .*or a mixture, "
        ):
            load_recipe(name, arguments)


NAN, INFINITE = float("nan"), float("inf")
MINUTES = [-1, NAN, INFINITE]
WEIGHTS = [-0.1, 1001, NAN, INFINITE]
STAGE = {
    "steps": [0, -1, 2**31, 1.5],
    "global_batch_size": [0, -1, 2**40],
    "micro_batch_size": [0, -1],
    "lr": [0, -1, 1e30, NAN, INFINITE],
    "min_lr": [-1e-9, NAN, INFINITE, 1e-2],
    "warmup_steps": [-1, 2**31],
    "weight_decay": [-1, 1e30, NAN, INFINITE],
    "betas": [[], [0.9], [0.9, 0.99, 0.999], [0.9, 1.0], [-0.1, 0.9], [0.9, NAN], [True, 0.9]],
    "gradient_clipping": [-1, NAN, INFINITE],
    "image_sizes": [
        [{"from_step": 0, "image_size": [8, 8]}],
        [{"from_step": 2, "image_size": [8]}],
        [{"image_size": [8, 8]}],
        [{"from_step": 2, "image_size": [8, 8], "lr": 1}],
        [{"from_step": 2, "image_size": [8, 8], "micro_batch_size": 0}],
        [{"from_step": 5, "image_size": [8, 8]}, {"from_step": 5, "image_size": [4, 4]}],
        [3],
    ],
    "ema": [-0.1, 1, 1.0, NAN],
    "train_data": [[], "", [""], ["a", 3], [{"source": "a", "weight": 0}], [{"source": "a", "weight": INFINITE}]],
    "start_from": ["", "~nobody-of-this-name/stage1"],
    "log_every": [0, -1],
    "save_every": [-1, 2**31],
    "save_every_minutes": MINUTES,
    "keep_last": [0, 2**31],
    "keep_every": [-1, 2**31],
    "evaluate_every": [-1],
    "max_skipped_steps": [0, -1],
    "image_size": [[], [28], [0, 28], [28, 10**9]],
}
# By section: values that each key must refuse.
FLOATS = (
    "lr", "head_lr", "weight_decay", "gradient_clipping", "probe_l2", "save_every_minutes", "hang_minutes",
    "stall_timeout_s", "total_timeout_s", "min_mib_per_s", "cache_gib", "global_weight", "intermediate_weight",
)  # fmt: skip
MAY_BE_EMPTY = ("keep", "freeze", "over_conversion", "image_sizes")
REFUSED: dict[str, dict[str, list]] = {
    "": {
        "run_name": [
            "",
            " ",
            ".",
            "..",
            "a/b",
            "/tmp/a",
            "../a",
            "a\0",
            "a\nb",
            " a",
            "embedded-fashion-mnist",
            "a" * 201,
        ],
        "runs_dir": ["", "a\0b", "~nobody-of-this-name/runs"],
        "seed": [-1, 2**63, 2**64],
        "hang_minutes": MINUTES,
        "mechanism": [""],
        "mechanism_options": [{"a": NAN}, {1: 2}],
        "keep": [[-1], [0, 0], [2**40], "auto", "auto:0", "auto:75%", "2"],
        "block_mechanisms": [{-1: "window"}, {1: ""}, {1: 2}, {2**40: "window"}, {True: "window"}],
        "block_mechanism_options": [{"window": {"a": NAN}}, {"": {}}, {"window": {1: 2}}, {"window": 3}],
        "over_conversion": [["stage1.steps"], ["lr"], "stage4.lr"],
        "ds_config": ["", "~nobody-of-this-name/z.json"],
    },
    "teacher": {"name": [""], "checkpoint": ["", "a\0"], "model_args": [{"a": INFINITE}, {"a": {2: 3}}]},
    "data": {
        "train": [[], "", ["a\0"]],
        "val": [[], [" "]],
        "classes": ["", "a\0"],
        "image_size": [[], [28], [28, 28, 3], [0, 28], [28, -1], [28, 10**9]],
        "mean": [[], [0.5], [0.5] * 4, [0.5, 0.5, NAN], [123.7, 116.3, 103.5], [-0.1, 0.5, 0.5]],
        "std": [[], [0.5], [0.0, 0.5, 0.5], [-0.5, 0.5, 0.5], [58.4, 57.1, 57.4], [0.5, 0.5, INFINITE]],
        "num_workers": [-1, 257],
        "shuffle_buffer": [-1, 2**31],
        "remote_attempts": [0, 1001],
        "stall_timeout_s": [0, NAN, 100000],
        "total_timeout_s": [0.0, INFINITE],
        "min_mib_per_s": [0, -1, INFINITE],
        "cache_dir": [""],
        "cache_gib": [0, NAN],
        "max_bad_fraction": [-0.01, 0.51, 1, NAN],
    },
    "stage1": STAGE,
    "stage2": {
        **STAGE,
        "freeze": [[""], ["a", "\0"]],
        "global_weight": WEIGHTS,
        "intermediate_weight": WEIGHTS,
        "intermediate_blocks": [0, -1, [], [-1], [1, 1], 2**40],
    },
    "search": {"images": [0, -1], "image_size": [[], [28], [0, 28], [28, 10**9]]},
    "stage3": {
        **STAGE,
        "task": [{"a": NAN}, {1: 2}],
        "head_init_samples": [0, -1],
        "head_lr": [0, -1, 1e30, NAN],
    },
    "evaluation": {
        "batch_size": [0, -1],
        "monitor_samples": [0, -1],
        "probe_train": [[], ""],
        "probe_samples": [0, -1],
        "probe_l2": [-1, NAN, INFINITE],
    },
}
SECTIONS = {
    "": Recipe,
    "teacher": TeacherConfig,
    "data": DataConfig,
    "stage1": AttentionAlignmentConfig,
    "stage2": FeatureAlignmentConfig,
    "stage3": FinetuningConfig,
    "search": SearchConfig,
    "evaluation": EvaluationConfig,
}
KEYS = [(section, key) for section, keys in REFUSED.items() for key in keys]


def refusal(name: str) -> str:
    return rf"^(recipe \S+: )?{re.escape(name)} is .*: it must be "


@pytest.mark.parametrize(("section", "key"), KEYS, ids=[".".join(key).strip(".") for key in KEYS])
def test_a_value_out_of_range_is_refused_by_its_full_name(tmp_path: Path, section: str, key: str) -> None:
    """In a recipe file (its first value, which takes a while), and where the dataclass is built directly."""
    name, path, values = f"{section}.{key}".strip("."), tmp_path / "mine.yaml", REFUSED[section][key]
    path.write_text(yaml.safe_dump({section: {key: values[0]}} if section else {key: values[0]}))
    with pytest.raises(ValueError, match=refusal(name)):
        load_recipe(str(path))
    for value in values:
        with pytest.raises(ValueError, match=refusal(key)):
            SECTIONS[section](**{key: value})
        with pytest.raises(ValueError, match=refusal(key)):
            dataclasses.replace(SECTIONS[section](), **{key: value})


def test_an_image_size_that_never_comes_is_refused() -> None:
    sizes = ["--stage2.image_sizes", "[{from_step: 9, image_size: [28, 28]}]"]
    assert load_recipe("tiny", [*sizes, "--stage2.steps", "10"]).stage2.image_sizes[0]["from_step"] == 9
    with pytest.raises(ValueError, match=r"stage2\.image_sizes has a size from step 9 on: it must be a step below"):
        load_recipe("tiny", [*sizes, "--stage2.steps", "9"])


def test_every_key_that_is_no_choice_has_values_that_it_refuses() -> None:
    """A new key of the recipe is a line in the table above."""
    for section, built in SECTIONS.items():
        for field in dataclasses.fields(built):
            is_choice = field.type is bool or "Literal" in str(field.type) or dataclasses.is_dataclass(field.type)
            assert is_choice or field.name in REFUSED[section], f"{section}.{field.name}"


@pytest.mark.parametrize("value", [None, "x", [], {}, 1.5], ids=str)
@pytest.mark.parametrize("built", SECTIONS.values(), ids=lambda built: built.__name__)
def test_a_value_of_a_wrong_type_is_refused_where_a_class_is_built(built: type, value: Any) -> None:
    for field in dataclasses.fields(built):
        suits = {
            "None": value is None,
            "str": value == "x" and field.name not in ("over_conversion", "keep") and "Literal" not in str(field.type),
            "list": value == [] and field.name in MAY_BE_EMPTY,
            "dict": value == {},
            "float": value == 1.5 and field.name in FLOATS,
        }
        if any(fits and kind in str(field.type) for kind, fits in suits.items()):
            continue
        with pytest.raises(ValueError, match=rf"{field.name} is .*: it must be "):
            built(**{field.name: value})


@pytest.mark.parametrize(
    "overrides",
    [
        ["--stage1.steps", "2", "--stage1.warmup_steps", "10"],
        ["--stage1.warmup_steps", "0", "--stage1.gradient_clipping", "0", "--stage1.betas", "[0.0, 0.999]"],
        ["--stage3.freeze_backbone", "true", "--stage3.head_lr", "1e-2", "--stage3.task.num_classes", "2"],
        ["--stage2.min_lr", "1e-3", "--stage2.lr", "1e-3", "--stage2.schedule", "constant"],
        ["--seed", str(2**63 - 1), "--data.shuffle_buffer", "0", "--evaluation.probe_l2", "0"],
        ["--data.mean", "[0, 0, 0]", "--data.std", "[1, 1, 1]", "--data.image_size", "[14, 28]"],
        ["--keep", "auto:11", "--search.images", "1", "--search.image_size", "[28, 56]"],
        ["--run_name", "vit-b_16.v2 (β)", "--teacher.checkpoint", "null", "--keep", "[]"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_what_is_unusual_but_right_is_taken(overrides: list[str]) -> None:
    load_recipe("tiny", overrides)


def test_a_native_conversion_below_the_least_rate_names_the_stage() -> None:
    recipe = load_recipe("tiny", ["--stage1.min_lr", "1e-3"])
    with pytest.raises(ValueError, match=r"^stage1.min_lr is 0.001: it must be a number from 0 to lr, which is 0.0001"):
        recipe.with_stage(1, lr=1e-4)


def test_help_explains_every_field(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_command(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "Samples per optimizer step over all ranks",
        "Blocks that keep their softmax attention",
        "--stage3.freeze_backbone",
    ):
        assert phrase in text
