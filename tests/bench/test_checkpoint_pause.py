"""The command on a tiny model: what it measures is there, and nothing is left behind."""

import json
import subprocess
import sys
from pathlib import Path

from launch import PROJECT, environment


def test_it_measures_and_cleans_up(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/checkpoint_pause.py", "--model", "vit_tiny_patch16_224", "--folder", str(tmp_path),
         "--rounds", "1"],
        cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=480, check=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    # Two moments and the weights, 4 bytes each, of ViT-Ti without its classifier and 16 instead of 196 + 1 positions.
    assert 60 < found["mib"] < 66
    assert 0 < found["pause"] and 0 < found["waited"] and 0 < found["deepspeed"] and 0 < found["step"]
    assert "training stands still for" in done.stdout
    assert list(tmp_path.iterdir()) == []
