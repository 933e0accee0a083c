"""The commands of docs/DATA.md run as they stand there, and what it says of files is what the code reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from adala.data import load_index
from adala.data.images import IMAGE_FIELDS
from adala.data.labels import JSON_KEYS, LABEL_FIELDS

PROJECT = Path(__file__).resolve().parents[1]
PAGE = (PROJECT / "docs/DATA.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_run_in_their_order(tmp_path: Path) -> None:
    for name, colour in (("cat", 40), ("dog", 200)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), colour + number, np.uint8)).save(
                tmp_path / f"photos/{name}/{number}.png"
            )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    blocks = re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    for language, block in blocks:
        command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "shards/classes.json").read_text()) == ["cat", "dog"]
    index = load_index([str(tmp_path / "shards")])
    assert {shard.name: shard.samples for shard in index.shards} == {
        "cats-00000.tar": 2,
        "train-00000.tar": 6,
        "val-00000.tar": 6,
    }


def test_the_page_names_every_extension_and_key() -> None:
    assert f"`.{' .'.join(IMAGE_FIELDS)}`" in PAGE
    assert all(f"`.{field}`" in PAGE for field in LABEL_FIELDS)
    assert all(f"`{key}`" in PAGE for key in JSON_KEYS)
