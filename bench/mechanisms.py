"""Every mechanism on one pretrained model: how close it is zero-shot, and after Stage 1 at one small equal budget.

    deepspeed bench/mechanisms.py --recipe dinov2_small --steps 60 --out runs/mechanisms [any recipe override]

Each mechanism runs ViT-AdaLA's Stage 1 with the recipe's data, batch, rate and seed; the trainer's own evaluations
before the first step and after the last are compared. Writes ``mechanisms.json`` and ``mechanisms.md``.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

from throughput import Row, write_table

from adala.attention import mechanism_names
from adala.config import load_recipe
from adala.distributed import close_distributed, init_distributed, rank
from adala.failures import report_error
from adala.metrics import read_metrics
from adala.pipeline import run_stages
from adala.plan import run_folder

METRICS = ("patch_cosine", "cls_cosine", "relative_error")


def measure(recipe_name: str, mechanism: str, steps: int, out: Path, overrides: list[str]) -> Row:
    """Runs Stage 1 of one mechanism; returns its row."""
    arguments = ["--mechanism", mechanism, "--run_name", mechanism, "--runs_dir", str(out), "--tensorboard", "false"]
    budget = ["--stage1.steps", str(steps), "--stage1.warmup_steps", str(max(1, steps // 10))]
    recipe = load_recipe(recipe_name, [*overrides, *arguments, *budget])
    run_stages(recipe, (1,), overwrite=True)
    folder = run_folder(recipe).stage(1).path
    evaluations = read_metrics(folder, "val")
    row: Row = {"mechanism": mechanism}
    for metric in METRICS:
        row[f"zero_shot_{metric}"] = evaluations[0].get(metric)
        row[f"stage1_{metric}"] = evaluations[-1].get(metric)
    return {**row, "train_images_per_s": median(line["images_per_s"] for line in read_metrics(folder, "train"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="dinov2_small")
    parser.add_argument("--steps", type=int, default=60, help="Stage 1 steps of each mechanism (60)")
    parser.add_argument("--mechanisms", nargs="+", default=[name for name in mechanism_names() if name != "softmax"])
    parser.add_argument("--out", type=Path, default=Path("runs/mechanisms"), help="folder (runs/mechanisms)")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args, overrides = parser.parse_known_args()
    try:
        init_distributed()
        rows = [measure(args.recipe, name, args.steps, args.out, overrides) for name in args.mechanisms]
    except (ValueError, OSError) as error:
        report_error(error)
        return 1
    if rank() == 0:
        write_table(args.out, "mechanisms", rows, {"recipe": args.recipe, "steps": args.steps, "overrides": overrides})
    close_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
