"""What the pages say is so: commands and examples run, options, names and links are those of the code."""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from timm.layers import Attention
from tiny_teacher import TINY_ARGS, build_tiny_teacher

import adala
from adala.config import RECIPE_FOLDER, Recipe, SearchConfig, load_recipe, parse_command
from adala.data import load_index
from adala.data.images import IMAGE_FIELDS
from adala.data.labels import JSON_KEYS, LABEL_FIELDS, LABELS_FIELDS, LABELS_JSON_KEYS
from adala.data.masks import MASK_FIELDS, MaskFormat
from adala.evaluation_command import build_evaluation_parser, parse_evaluation
from adala.export import StudentDescription, save_student
from adala.export.command import build_export_parser
from adala.export.portable import ENDINGS
from adala.heads import SEGMENTATION_HEADS
from adala.protocol import DEFAULT_PROTOCOL, PROTOCOL_FOLDER, load_protocol
from adala.rules import MEASURES
from adala.search.command import parse_search_command
from adala.students import linearize
from adala.tasks import describe_task, resolve_task
from adala.tasks.registry import BUILT_IN

PROJECT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8")
    for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
}
DATA, TASKS, EVALUATION = (PAGES[f"docs/{name}.md"] for name in ("DATA", "TASKS", "EVALUATION"))


def python_environment() -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment


def test_the_commands_of_the_page_on_data_run_in_their_order(tmp_path: Path) -> None:
    for name, colour in (("cat", 40), ("dog", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), colour + number, np.uint8)).save(
                tmp_path / f"photos/{name}/{number}.png"
            )
    blocks = re.findall(r"```(bash|python)\n(.*?)```", DATA, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    for language, block in blocks:
        command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=python_environment(), text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "shards/classes.json").read_text()) == ["cat", "dog"]
    index = load_index([str(tmp_path / "shards")])
    assert {shard.name: shard.samples for shard in index.shards} == {
        "cats-00000.tar": 2,
        "train-00000.tar": 6,
        "val-00000.tar": 6,
    }


def test_the_page_on_data_names_every_extension_and_key() -> None:
    assert f"`.{' .'.join(IMAGE_FIELDS)}`" in DATA
    assert all(f"`.{field}`" in DATA for field in (*LABEL_FIELDS, *LABELS_FIELDS))
    assert all(f"`{key}`" in DATA for key in (*JSON_KEYS, *LABELS_JSON_KEYS))
    assert all(f"`.{field}`" in DATA for field in MASK_FIELDS if field.endswith("png"))
    section = DATA.partition("## Masks")[2].partition("\n## ")[0]
    assert [row[0] for row in table(section, "key")] == [field.name for field in dataclasses.fields(MaskFormat)]


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table whose first column has this heading, without it; one word in code style is bare."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in line.strip("| ").split(" | ")])
    return rows


OPTION_TABLES = {name: (f"## {name}\n", "option", resolve_task(name)) for name in BUILT_IN} | {
    f"head {name}": ("### Heads\n", f"option of `{name}`", head.Options) for name, head in SEGMENTATION_HEADS.items()
}


@pytest.mark.parametrize("name", OPTION_TABLES)
def test_the_page_on_tasks_has_every_option_and_its_default(name: str) -> None:
    section, heading, options = OPTION_TABLES[name]
    found = {row[0]: row[1] for row in table(TASKS.partition(section)[2], heading)}
    assert list(found) == [field.name for field in dataclasses.fields(options)]
    for field in dataclasses.fields(options):
        assert _default_on_page(found[field.name], field) == _default(field), field.name


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _default_on_page(cell: str, field: dataclasses.Field) -> Any:
    if cell == "required":
        return dataclasses.MISSING
    return float(Fraction(cell)) if isinstance(field.default, float) else yaml.safe_load(cell)


def test_the_page_on_evaluation_has_every_protocol_measure_and_option() -> None:
    assert sorted(row[0] for row in table(EVALUATION, "name")) == sorted(p.stem for p in PROTOCOL_FOLDER.glob("*.yaml"))
    assert f"`{DEFAULT_PROTOCOL}` (default)" in EVALUATION
    assert sorted(row[0] for row in table(EVALUATION, "measure")) == sorted(MEASURES)
    # Once it has parsed something, jsonargparse's parser also has hidden options of its own.
    actions = [a for a in build_evaluation_parser()._actions if "." not in a.dest and a.help != argparse.SUPPRESS]
    of_command = {action.dest for action in actions} - {field.name for field in dataclasses.fields(Recipe)}
    assert {row[0] for row in table(EVALUATION, "option")} == {
        f"--{name}" for name in of_command - {"help", "local_rank"}
    }


def test_the_protocol_on_the_page_can_be_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(name: .*?)```", EVALUATION, flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block)
    protocol = load_protocol(str(tmp_path / "mine.yaml"))
    assert (protocol.measures, protocol.knn.k) == (["knn"], [20])


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of the project's launchers, in words."""
    for line in re.sub(r"[ ]*\\\n\s*", " ", text).splitlines():
        found = re.search(r"launchers/(?:train|evaluate)\.py .*", line.partition("  #")[0])
        if found and not line.startswith(("|", "-", "`")) and "`" not in line:
            braces = re.sub(r"(\S+)\{1,2,3\}", r"\g<1>1 \g<1>2 \g<1>3", found[0])
            yield shlex.split(braces)


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands(text)]


def test_there_are_commands_on_the_pages() -> None:
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/TASKS.md", "docs/EVALUATION.md"}


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_recipe_protocol_and_keys_of_commands_are_there(page: str, command: list[str]) -> None:
    launcher, *arguments = command
    if "--help" not in arguments:
        (parse_evaluation if "evaluate" in launcher else parse_command)(arguments)


def test_recipes_named_on_the_pages_are_there() -> None:
    known = {path.stem for path in RECIPE_FOLDER.glob("*.yaml")}
    named = {name for row in table(TASKS, "recipe") for name in re.findall(r"\w+", row[0])}
    assert named == {name for name in known if name.startswith(("ade20k", "cityscapes"))}


def headings(text: str) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (PROJECT / page).parent / path if path else PROJECT / page
        assert there.exists(), target
        if anchor:
            assert anchor in headings(there.read_text(encoding="utf-8")), target


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which the test runs in, with a student without and one with a head, and a picture."""
    task, student = resolve_task("segmentation")(3), linearize(build_tiny_teacher(), "linear")
    of_student = StudentDescription(
        "vit_tiny_patch16_224", TINY_ARGS, [16, 16], "linear", {}, [], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    )
    save_student(tmp_path / "runs/mine/stage2", student.state_dict(), of_student)
    tuned = dataclasses.replace(of_student, task=describe_task(task))
    save_student(tmp_path / "runs/mine/stage3", student.state_dict(), tuned, task.build_head(student).state_dict())
    Image.new("RGB", (40, 30)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(page: str, number: int = 0, **names: Any) -> dict[str, Any]:
    """What the names of one of a page's examples stand for in the end."""
    exec(re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)[number], names)
    return names


def test_the_python_of_the_readme_runs(runs: Path) -> None:
    found = run_python("README.md", images=torch.zeros(2, 3, 24, 16))
    assert found["features"].shape == (2, 1 + 6 * 4, 32)
    assert found["model"](torch.zeros(2, 3, 16, 16)).shape == (2, 3, 16, 16)


def test_the_four_verbs_of_the_readme_run(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(adala.align.__kwdefaults__, "steps", (3, 3))
    images = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    teacher = build_tiny_teacher((28, 28), depth=12, patch_size=14)
    found = run_python("README.md", 1, teacher=teacher, loader=[(images, None)], held_out=[images])
    softmax = [index for index, block in enumerate(found["student"].blocks) if type(block.attn) is Attention]
    assert softmax == [3, 7]
    said = capsys.readouterr().out
    assert "on 8 images, after 3 + 3 steps" in said and "'speed_against_teacher': " in said
    session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
    (features,) = session.run(None, {"images": np.zeros((2, 3, 448, 448), np.float32)})
    assert features.shape == (2, 1 + 32 * 32, 32)


def test_the_python_of_the_page_on_hybrids_runs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    align = adala.align

    def align_shortly(*arguments: Any, steps: tuple[int, int]) -> Any:
        return align(*arguments, steps=[min(3, count) for count in steps])

    monkeypatch.setattr(adala, "align", align_shortly, raising=False)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = run_python("docs/HYBRIDS.md", teacher=build_tiny_teacher(depth=4), loader=[(images, None)])
    softmax = [index for index, block in enumerate(found["student"].blocks) if type(block.attn) is Attention]
    assert softmax == found["choice"].blocks and len(softmax) == 2
    assert "relative_error on 8 images, by block added: none " in capsys.readouterr().out


def test_the_page_on_hybrids_has_every_key_of_the_search_and_its_commands_parse() -> None:
    page = PAGES["docs/HYBRIDS.md"]
    defaults = {f"search.{field.name}": str(field.default) for field in dataclasses.fields(SearchConfig)}
    assert {row[0]: row[1].replace("null", "None") for row in table(page, "key")} == defaults
    for row in table(page, "`keep`"):
        load_recipe("tiny", ["--keep", re.search("[^`]+", row[0])[0]])
    found = re.findall(r"python -m adala\.search (.*)$", page, flags=re.MULTILINE)
    assert [parse_search_command(shlex.split(arguments)).budgets for arguments in found] == [(1, 2, 4)]


def test_the_python_of_the_page_on_exports_runs(runs: Path) -> None:
    student = linearize(build_tiny_teacher((28, 28), depth=1, patch_size=14), "linear")
    done = run_python("docs/EXPORT.md", 0, student=student)["done"]
    adala.export(student, "student.pt2", size=448)
    adala.export(student, "compiled.pt2", size=448, compiled=True)
    assert done.agreement.worst_cosine > 0.9999
    of_onnx, of_torch = run_python("docs/EXPORT.md", 1)["features"], run_python("docs/EXPORT.md", 2)
    assert of_onnx.shape == (3, 1 + 32 * 32, 32)
    compiled = of_torch["compiled"](torch.zeros(3, 3, 448, 448))
    for features in (of_torch["features"], compiled):
        assert torch.allclose(features, torch.from_numpy(of_onnx), atol=1e-4)


def test_the_page_on_exports_has_every_form() -> None:
    assert [row[0] for row in table(PAGES["docs/EXPORT.md"], "form")] == list(ENDINGS)
    for command in re.findall(r"python -m adala\.export (.*?)(?:  #.*)?$", PAGES["docs/EXPORT.md"], flags=re.MULTILINE):
        build_export_parser().parse_args(shlex.split(command))


def test_the_python_of_the_page_on_tasks_runs(runs: Path) -> None:
    found = run_python("docs/TASKS.md")
    assert (found["images"].shape, found["scores"].shape) == ((1, 3, 16, 16), (1, 3, 16, 16))
    assert torch.equal(found["classes"], found["scores"].argmax(1))


def test_the_task_on_the_page_is_the_one_that_is_tested() -> None:
    source = (PROJECT / "tests/fixtures/depth_task.py").read_text(encoding="utf-8")
    section = TASKS.partition("## A task of your own")[2]
    assert re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1] == source
    assert len(source.splitlines()) <= 60


def test_tests_that_pages_name_are_there() -> None:
    for page, text in PAGES.items():
        for name, function in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", text):
            found = [path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob(name)]
            assert any(f"def {function}(" in source for source in found) if function else found, (page, name, function)
