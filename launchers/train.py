"""Adapts a pretrained softmax ViT to linear attention.

deepspeed launchers/train.py --stage 2
deepspeed launchers/train.py --stage all --recipe dinov2_large --stage1.lr 5e-4
"""

import sys

from adala.config import parse_command
from adala.distributed import (
    SharedError,
    close_distributed,
    has_lost_peer,
    init_distributed,
    rank,
    report_error,
)
from adala.pipeline import run_stages


def main(arguments: list[str]) -> int:
    try:
        command = parse_command(arguments)
    except ValueError as error:
        report_error(SharedError(str(error)))
        return 1
    try:
        init_distributed()
        run_stages(command.recipe, command.stages, command.overwrite)
    except (ValueError, OSError) as error:
        report_error(error)
        return 1
    except RuntimeError as error:
        if not has_lost_peer(error):
            raise
        print(f"rank {rank()}: another rank has ended, and says why", file=sys.stderr, flush=True)
        return 1
    close_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
