"""The training command with another working directory for each rank; arguments are a folder and a recipe."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launchers"))

from train import main

import adala.runs

if __name__ == "__main__":
    *_, folder, recipe = sys.argv
    mine = Path(folder) / f"rank{os.environ['RANK']}"
    mine.mkdir()
    os.chdir(mine)
    adala.runs.VISIBLE_WITHIN_S = 2.0
    sys.exit(main(["--recipe", recipe, "--stage", "1"]))
