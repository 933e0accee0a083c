"""Every mechanism on one pretrained model: how close it is zero-shot, and after Stage 1 at one small equal budget.

    deepspeed bench/mechanisms.py --recipe dinov2_small --steps 60 --out runs/mechanisms [any recipe override]

Each mechanism runs ViT-AdaLA's Stage 1 with the recipe's data, batch, rate and seed; the trainer's own evaluations
before the first step and after the last are the two columns. Writes ``mechanisms.json`` and ``mechanisms.md``.
"""

import argparse
import sys
from pathlib import Path

from adala.attention import mechanism_names
from adala.config import load_recipe
from adala.distributed import close_distributed, init_distributed, rank, report_error
from adala.files import write_json, write_whole
from adala.metrics import read_metrics
from adala.pipeline import run_stages
from adala.plan import run_folder

COLUMNS = ("patch_cosine", "cls_cosine", "relative_error")


def measure(recipe_name: str, mechanism: str, steps: int, out: Path, overrides: list[str]) -> dict[str, object]:
    """Runs Stage 1 of one mechanism; returns its row."""
    arguments = ["--mechanism", mechanism, "--run_name", mechanism, "--runs_dir", str(out), "--tensorboard", "false"]
    budget = ["--stage1.steps", str(steps), "--stage1.warmup_steps", str(max(1, steps // 10))]
    recipe = load_recipe(recipe_name, [*overrides, *arguments, *budget])
    run_stages(recipe, [1], overwrite=True)
    folder = run_folder(recipe).stage(1).path
    before, after = (read_metrics(folder, "val")[position] for position in (0, -1))
    rates = [row["images_per_s"] for row in read_metrics(folder, "train")]
    return {
        "mechanism": mechanism,
        **{f"zero_shot_{name}": before.get(name) for name in COLUMNS},
        **{f"stage1_{name}": after.get(name) for name in COLUMNS},
        "train_images_per_s": sorted(rates)[len(rates) // 2],
    }


def to_markdown(rows: list[dict[str, object]]) -> str:
    lines = [
        "| mechanism | patch cosine zero-shot | after Stage 1 | CLS cosine zero-shot | after Stage 1 | images/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row[f"{when}_{name}"] for name in COLUMNS[:2] for when in ("zero_shot", "stage1")]
        numbers = " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells)
        lines.append(f"| {row['mechanism']} | {numbers} | {row['train_images_per_s']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="dinov2_small")
    parser.add_argument("--steps", type=int, default=60, help="Stage 1 steps of each mechanism")
    parser.add_argument("--mechanisms", nargs="+", default=[name for name in mechanism_names() if name != "softmax"])
    parser.add_argument("--out", type=Path, default=Path("runs/mechanisms"))
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    args, overrides = parser.parse_known_args()
    try:
        init_distributed()
        rows = [measure(args.recipe, name, args.steps, args.out, overrides) for name in args.mechanisms]
    except ValueError as error:
        report_error(error)
        return 1
    if rank() == 0:
        write_json(args.out / "mechanisms.json", {"rows": rows})
        write_whole(args.out / "mechanisms.md", to_markdown(rows))
        print(to_markdown(rows))
    close_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main())
