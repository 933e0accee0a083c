"""Compares models under one protocol: a recipe's teacher, its linearization, and exported students.

python launchers/evaluate.py --recipe R --models linearized runs/x/stage1 runs/x/stage2 --protocol dinov2_linear
deepspeed launchers/evaluate.py --recipe R --models runs/x/stage3 --pictures
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adala.commands import run_command


def main(arguments: list[str]) -> int:
    def prepare() -> tuple[Path, Callable[[], None]]:
        from adala.evaluate import output_folder, run_evaluation
        from adala.evaluation_command import parse_evaluation

        command = parse_evaluation(arguments)
        return output_folder(command), partial(run_evaluation, command)

    return run_command(prepare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
