"""Tasks by name and by description, here and from other packages; and how recipes and command lines say them."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_tiny_recipe

from adala.config import load_recipe, recipe_to_yaml
from adala.tasks import Task, describe_task, read_task, registry, resolve_task, task_names

# One description of each task with every option set to something that is not its default.
FULL: dict[str, dict[str, Any]] = {
    "classification": {"num_classes": 3, "pooling": "patch", "label_smoothing": 0.3},
    "multilabel": {"num_classes": 3, "pooling": "cls"},
    "segmentation": {
        "num_classes": 3,
        "head": "pmt",
        "head_options": {"num_queries": 8, "patch_attention_options": {"eps": 1e-6}},
        "mask": {"label_map": {"7": 0, "8": 1, "9": 2, "0": 255}, "ignore_index": 255},
        "mask_field": "label.png",
        "inference": "slide",
        "window_overlap": 0.25,
    },
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("is_full", [True, False], ids=["full", "defaults"])
def test_a_task_is_read_as_it_was_described(name: str, is_full: bool) -> None:
    options = FULL[name] if is_full else {"num_classes": 7}
    task = read_task({"name": name, **options})
    description = describe_task(task)
    assert set(description) == {"name"} | {field.name for field in dataclasses.fields(task)}
    assert {key: description[key] for key in options} == options
    written = json.loads(json.dumps(description))
    assert written == description and read_task(written) == task and describe_task(read_task(written)) == description
    assert type(task) is resolve_task(name) and task.name == name


def test_every_option_of_every_task_is_tried() -> None:
    assert list(FULL) == [name for name in task_names() if name in registry.BUILT_IN]
    for name, options in FULL.items():
        fields = dataclasses.fields(resolve_task(name))
        assert [field.name for field in fields] == list(options)
        assert all(options[field.name] != field.default for field in fields)


def test_numbers_of_a_label_map_may_be_texts() -> None:
    """As JSON has them; or numbers, as YAML has them."""
    task = read_task({"name": "segmentation", **FULL["segmentation"]})
    assert task.mask_format.table() == {7: 0, 8: 1, 9: 2, 0: 255}
    in_yaml = {"label_map": {7: 0, 8: 1, 9: 2, 0: 255}, "ignore_index": 255}
    assert read_task({"name": "segmentation", **FULL["segmentation"], "mask": in_yaml}) == task
    colours = {"encoding": "rgb", "colors": [[0, 0, 0], [128, 0, 0], [0, 128, 0]]}
    task = read_task({"name": "segmentation", "num_classes": 3, "mask": colours})
    assert read_task(describe_task(task)).mask_format == task.mask_format


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "the name of the task is missing: known are classification, multilabel, segmentation"),
        ({"name": ["segmentation"]}, r"name is \['segmentation'\], which is no name: known are classification"),
        ({"name": "detection"}, "unknown task 'detection': known are classification, multilabel, segmentation"),
        ({"name": "multilabel"}, "task multilabel: it needs the option 'num_classes'$"),
        ({"name": "segmentation", "num_clases": 3}, "task segmentation: it has no option 'num_clases', but num_cl"),
        ({"name": "multilabel", "num_classes": 3, "label_smoothing": 0.1}, "it has no option 'label_smoothing', but"),
        ({"name": "classification", "num_classes": 1}, "task classification: num_classes is 1: it must be a whole"),
        ({"name": "classification", "num_classes": True}, "num_classes is true: it must be a whole number, 2 or more"),
        ({"name": "multilabel", "num_classes": "3"}, "num_classes is '3': it must be a whole number, 2 or more"),
        ({"name": "classification", "num_classes": 3, "pooling": "mean"}, "pooling is 'mean': it must be one of cls,"),
        ({"name": "classification", "num_classes": 3, "label_smoothing": 1}, "label_smoothing is 1: it must be a num"),
        ({"name": "segmentation", "num_classes": 3, "window_overlap": 1.0}, "window_overlap is 1.0: it must be a num"),
        ({"name": "segmentation", "num_classes": 3, "inference": "tta"}, "inference is 'tta': it must be one of crop"),
        ({"name": "segmentation", "num_classes": 3, "head_options": [1]}, r"head_options is \[1\]: it must be a mapp"),
        ({"name": "segmentation", "num_classes": 3, "mask": "ade20k"}, "mask is 'ade20k': it must be a mapping"),
        ({"name": "segmentation", "num_classes": 3, "mask": {"labels": 1}}, "mask has no option 'labels': it has enc"),
        ({"name": "segmentation", "num_classes": 3, "mask": {"encoding": "x"}}, "mask.encoding must be index or rgb"),
        ({"name": "segmentation", "num_classes": 3, "mask": {"encoding": "rgb"}}, "mask.colors lists the colours of"),
        ({"name": "segmentation", "num_classes": 3, "mask_field": ""}, "mask_field is '': it must be a text that is"),
        (
            {"name": "segmentation", "num_classes": 300},
            r"mask.ignore_index is 255: it must be 300 \(num_classes\) or more, since 0 to 299 are classes",
        ),
        ({"name": "segmentation", "num_classes": 3, "mask": {"ignore_index": -1}}, "ignore_index is -1: it must be 3"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_description_cannot_say(description: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_task(description)
    assert "\n" not in str(raised.value)


# Tasks of other packages.

DEPTH = """
from dataclasses import dataclass
from typing import ClassVar
from adala.tasks import Task

@dataclass(frozen=True)
class Depth(Task):
    name: ClassVar[str] = "depth"
    score: ClassVar[str] = "rmse"
    score_title: ClassVar[str] = "RMSE (m)"
    largest: float
    smallest: float = 0.5

class Undecorated:
    pass
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Installs a package that offers tasks, as lines ``name = module:attribute``, in a folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install_package(name: str, entries: str) -> None:
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[adala.tasks]\n{entries}\n")
        (tmp_path / f"{name}.py").write_text(DEPTH)
        registry._targets.cache_clear()

    yield install_package
    registry._targets.cache_clear()
    for name in ("depths", "others"):
        sys.modules.pop(name, None)


def test_a_task_of_another_package_is_found_by_its_name(install) -> None:
    install("depths", "depth = depths:Depth")
    assert task_names() == [*registry.BUILT_IN, "depth"]
    task = read_task({"name": "depth", "largest": 80.0})
    assert isinstance(task, Task) and (task.largest, task.smallest) == (80.0, 0.5)
    assert describe_task(task) == {"name": "depth", "largest": 80.0, "smallest": 0.5}
    assert read_task(describe_task(task)) == task
    assert task.probe is None and task.is_labelled(3.0) and task.target_field is None
    with pytest.raises(ValueError, match="task depth: it needs the option 'largest'"):
        read_task({"name": "depth"})
    with pytest.raises(ValueError, match="task depth: largest is 'far': it must be a finite number"):
        read_task({"name": "depth", "largest": "far"})
    with pytest.raises(ValueError, match=r"unknown task 'detection': known are .*segmentation, depth$"):
        resolve_task("detection")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "depth = nowhere_at_all:Depth",
            r"task 'depth' cannot be imported from nowhere_at_all:Depth \(ModuleNotFoundE",
        ),
        ("depth = depths:Height", r"task 'depth' cannot be imported from depths:Height \(AttributeError: .*uninstall"),
        (
            "depth = depths:Undecorated",
            "what depths:Undecorated offers as the task 'depth' is none: it must be a datac",
        ),
        ("depth = depths:DEPTH", "task 'depth' cannot be imported"),
    ],
)
def test_a_package_that_offers_no_task_is_named(install, entry: str, message: str) -> None:
    install("depths", entry)
    with pytest.raises(ValueError, match=message):
        read_task({"name": "depth", "largest": 80.0})
    # The others are none the worse for it.
    assert read_task({"name": "classification", "num_classes": 3}).num_classes == 3


def test_two_packages_with_one_name_are_both_named(install) -> None:
    install("depths", "depth = depths:Depth")
    install("others", "depth = others:Depth")
    with pytest.raises(ValueError, match=r"two installed packages offer the task 'depth' \(") as raised:
        read_task({"name": "depth", "largest": 80.0})
    assert "depths:Depth" in str(raised.value) and "others:Depth" in str(raised.value)


def test_the_name_of_a_task_of_this_package_is_taken(install) -> None:
    install("depths", "segmentation = depths:Depth")
    with pytest.raises(ValueError, match="two installed packages offer the task 'segmentation'"):
        read_task({"name": "segmentation", "num_classes": 3})


# In recipes and on command lines.


@pytest.mark.parametrize("key", ["num_classes", "pooling", "label_smoothing"])
def test_old_keys_name_the_new_one(tmp_path: Path, key: str) -> None:
    sentence = f"stage3.{key} is stage3.task.{key} now: a task's options stand together, beside its name"
    value = {"num_classes": 3, "pooling": "cls", "label_smoothing": 0.1}[key]
    path = tmp_path / "old.yaml"
    for text in (f"stage3: {{lr: 1.0e-3, {key}: {value}}}", f"stage3.{key}: {value}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^recipe {re.escape(str(path))}: {re.escape(sentence)}$"):
            load_recipe(str(path))
    for arguments in ([f"--stage3.{key}", str(value)], [f"--stage3.{key}={value}"]):
        with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
            load_recipe("tiny", arguments)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (["--stage3.task.num_classes", "4"], {"num_classes": 4}),
        (["--stage3.task.num_classes=4"], {"num_classes": 4}),
        (["--stage3.task.label_smoothing", "1e-1"], {"label_smoothing": 0.1}),
        (["--stage3.task.pooling", "cls"], {"pooling": "cls"}),
        (["--stage3.task.mask_field", "null"], {"mask_field": None}),
        (["--stage3.task.head_options.num_queries", "8"], {"head_options": {"num_queries": 8}}),
        (["--stage3.task.head_options.masked_attention", "false"], {"head_options": {"masked_attention": False}}),
        (["--stage3.task.head_options.mlp_ratio=2.0"], {"head_options": {"mlp_ratio": 2.0}}),
        (["--stage3.task.mask.label_map", "ade20k"], {"mask": {"label_map": "ade20k"}}),
        (["--stage3.task.mask.colors", "[[0, 0, 0], [1, 2, 3]]"], {"mask": {"colors": [[0, 0, 0], [1, 2, 3]]}}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_on_the_command_line_have_their_types(arguments: list[str], changes: dict[str, Any]) -> None:
    before = load_recipe("tiny").stage3.task
    found = load_recipe("tiny", arguments).stage3.task
    assert found == {**before, **changes}
    for key, value in changes.items():
        assert type(found[key]) is type(value)


def test_a_whole_task_on_the_command_line_takes_the_recipes_place() -> None:
    recipe = load_recipe("tiny", ["--stage3.task", "{name: segmentation, num_classes: 3}"])
    assert recipe.stage3.task == {"name": "segmentation", "num_classes": 3}
    recipe = load_recipe("tiny", ["--stage3.task={name: segmentation, num_classes: 3}", "--stage3.task.head=pmt"])
    assert recipe.stage3.task == {"name": "segmentation", "num_classes": 3, "head": "pmt"}
    with pytest.raises(ValueError, match=r"stage3.task is segmentation: it must be a mapping"):
        load_recipe("tiny", ["--stage3.task", "segmentation"])


def test_several_options_below_one_another_are_all_kept(tmp_path: Path) -> None:
    """Beside what the recipe says."""
    task = {"name": "segmentation", "num_classes": 2, "head_options": {"over_ranks": False}}
    path = write_tiny_recipe(tmp_path, stage3={"task": task})
    arguments = ["--stage3.task.head", "pmt", "--stage3.task.head_options.num_queries", "8"]
    arguments += ["--stage3.task.head_options.num_blocks", "2", "--stage3.task.mask.ignore_index", "9"]
    found = load_recipe(str(path), arguments).stage3.task
    assert found["head_options"] == {"over_ranks": False, "num_queries": 8, "num_blocks": 2}
    assert found["mask"] == {"ignore_index": 9} and found["head"] == "pmt"


def test_a_label_map_of_ones_own_stands_in_a_recipe_as_its_page_says(tmp_path: Path) -> None:
    """docs/DATA.md: with numbers to the left."""
    path = tmp_path / "mine.yaml"
    path.write_text("stage3: {task: {name: segmentation, num_classes: 2, mask: {label_map: {7: 0, 8: 1, 9: 255}}}}")
    recipe = load_recipe(str(path))
    task = read_task(recipe.stage3.task)
    assert task.mask_format.table() == {7: 0, 8: 1, 9: 255}
    assert json.loads(json.dumps(describe_task(task))) == describe_task(task)
    path.write_text(recipe_to_yaml(recipe))
    assert read_task(load_recipe(str(path)).stage3.task) == task


def test_a_mistake_in_the_task_is_told_with_its_key() -> None:
    from adala.plan import read_stage_task

    recipe = load_recipe("tiny", ["--stage3.task.num_clases", "4"])
    with pytest.raises(ValueError, match=r"^stage3.task: task classification: it has no option 'num_clases', but"):
        read_stage_task(recipe)
