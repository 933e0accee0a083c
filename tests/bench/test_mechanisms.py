"""The table of mechanisms, on a tiny model through the launcher."""

import json
from pathlib import Path

from launch import PROJECT, launch
from tiny_run import write_tiny_recipe


def test_every_row_is_measured_by_the_trainer(tmp_path: Path) -> None:
    recipe = write_tiny_recipe(tmp_path)
    out = tmp_path / "table"
    names = ["linear", "hedgehog"]
    arguments = ["--recipe", str(recipe), "--steps", "2", "--mechanisms", *names, "--out", str(out)]
    done = launch(PROJECT / "bench" / "mechanisms.py", *arguments, ranks=1)
    assert done.returncode == 0, done.stdout
    rows = json.loads((out / "mechanisms.json").read_text())["rows"]
    assert [row["mechanism"] for row in rows] == names
    for row in rows:
        assert row["stage1_patch_cosine"] != row["zero_shot_patch_cosine"]
        final = json.loads((out / row["mechanism"] / "stage1" / "finished.json").read_text())
        assert row["stage1_patch_cosine"] == final["metrics"]["patch_cosine"]
    assert (out / "mechanisms.md").read_text().count("\n") == 4
