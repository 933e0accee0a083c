"""Recipes and overrides, and that every error names its key."""

import pytest

from adala.config import load_recipe, parse_command, recipe_to_yaml


def test_defaults_recipe_and_overrides() -> None:
    command = parse_command(["--local_rank=1", "--stage", "2", "--stage2.lr", "5e-4", "--keep", "[0, 5]"])
    assert command.stages == (2,) and not command.overwrite
    assert command.recipe.stage2.lr == 5e-4
    assert command.recipe.keep == [0, 5]
    assert command.recipe.teacher.model_args["embed_dim"] == 64
    assert parse_command(["--stage", "all"]).stages == (1, 2, 3)


def test_a_recipe_written_out_reads_back_the_same(tmp_path) -> None:
    recipe = load_recipe("tiny", ["--mechanism", "performer", "--mechanism_options.num_features", "8", "--seed=3"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert recipe.mechanism_options == {"num_features": 8}
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nowhere"], "--recipe nowhere: there is no such recipe; known are .*tiny"),
        (["--stage2.lrr", "1"], "unrecognized arguments: --stage2.lrr"),
        (["--stage2.lr", "fast"], '"stage2.lr".*float.*fast'),
        (["--stage1.loss", "l1"], '"stage1.loss".*l1'),
        (["--stage", "4"], "--stage: invalid choice: '4'"),
    ],
    ids=["recipe", "key", "type", "choice", "stage"],
)
def test_command_line_errors_name_the_key(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_command(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage1: {stepz: 3}", "recipe .*stage1.*stepz"),
        ("speed: 3", "recipe .*speed"),
        ("stage1: {steps: many}", 'recipe .*"stage1.steps".*many'),
        ("stage1: [", "recipe .*expected"),
    ],
    ids=["nested", "top", "type", "syntax"],
)
def test_recipe_errors_name_file_and_key(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


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
