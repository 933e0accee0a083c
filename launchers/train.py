"""Adapts a pretrained softmax ViT to linear attention.

deepspeed launchers/train.py --stage 2
deepspeed launchers/train.py --stage all --recipe dinov2_large --stage1.lr 5e-4
"""

import sys

from adala.distributed import SharedError, close_distributed, init_distributed, local_rank
from adala.failures import report_failure


def main(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        # A file's name that the locale cannot print must not end a run.
        stream.reconfigure(errors="backslashreplace")
    folder = None
    try:
        # Not above: what cannot be imported is told as any other fault is.
        from adala.config import parse_command
        from adala.pipeline import run_stages
        from adala.plan import run_folder

        try:
            command = parse_command(arguments)
        except ValueError as error:
            if local_rank() == 0:
                raise
            # The ranks of one machine read the same: one of them tells.
            raise SharedError(str(error)) from error
        folder = run_folder(command.recipe).path
        init_distributed()
        run_stages(command.recipe, command.stages, command.overwrite)
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, folder)
    close_distributed()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
