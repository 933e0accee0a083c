"""python -m adala.search --recipe dinov2_small --run_name mine --budgets 1 2 4 [--macs_size 448]

deepspeed --module adala.search --recipe dinov2_small --run_name mine --budgets 1 2 4
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
        from adala.plan import run_folder
        from adala.search.command import parse_search_command, run_search_command

        command = parse_search_command(arguments)
        return run_folder(command.recipe).path, partial(run_search_command, command)

    return run_command(prepare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
