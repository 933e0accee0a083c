"""Both conversions of every mechanism on the embedded default, two steps a stage, one after the other in one launch.

Run by test_conversions.py through the DeepSpeed launcher; the last argument is the folder for runs.
"""

import sys

from adala.attention import mechanism_names, resolve_mechanism
from adala.config import load_recipe
from adala.distributed import close_distributed, init_distributed
from adala.pipeline import run_stages
from adala.plan import STAGES, conversion_of

OVERRIDES = [
    "--tensorboard=false",
    "--evaluation.monitor_samples=16",
    "--stage3.head_init_samples=64",
    *(f"--stage{n}.{key}={value}" for n in (1, 2, 3) for key, value in (("steps", 2), ("global_batch_size", 8))),
]


def main(runs_dir: str) -> None:
    init_distributed()
    for mechanism in mechanism_names():
        for conversion in ("adala", "native"):
            if conversion == "native" and not hasattr(resolve_mechanism(mechanism), "native_conversion"):
                continue
            name = ["--run_name", f"{mechanism}-{conversion}", "--mechanism", mechanism, "--conversion", conversion]
            recipe = load_recipe("tiny", ["--runs_dir", runs_dir, *name, *OVERRIDES])
            for number, kind in STAGES.items():
                if conversion_of(recipe).step(kind.name) is not None:
                    run_stages(recipe, [number])
    close_distributed()


if __name__ == "__main__":
    main(sys.argv[-1])
