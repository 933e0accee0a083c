"""Adapts a pretrained softmax ViT to linear attention.

deepspeed launchers/train.py --stage 2
deepspeed launchers/train.py --stage all --recipe dinov2_large --stage1.lr 5e-4
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adala.commands import run_command
from adala.preemption import listen


def main(arguments: list[str]) -> int:
    def prepare() -> tuple[Path, Callable[[], None]]:
        # What follows is imported for seconds, within which a job may be asked to end, too.
        listen()
        from adala.config import parse_command
        from adala.pipeline import run_stages
        from adala.plan import run_folder

        command = parse_command(arguments)
        carry_out = partial(run_stages, command.recipe, command.stages, command.overwrite)
        return run_folder(command.recipe).path, carry_out

    return run_command(prepare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
