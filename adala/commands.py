"""How a command runs: parse, run, close. What goes wrong is told once, and ends every rank with a code of failure."""

import sys
from collections.abc import Callable
from pathlib import Path

from adala.distributed import SharedError, close_distributed, init_distributed, local_rank
from adala.failures import report_failure
from adala.preemption import stop_listening


def run_command(prepare: Callable[[], tuple[Path, Callable[[], None]]]) -> int:
    """Carries out a command on this rank.

    Args:
        prepare: Reads the command line: the folder where a bug's traceback is left, and what is then to be done on all
            ranks. What cannot be imported is told as any other fault is, so it imports, too.

    Returns:
        The process's exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # A file's name that the locale cannot print must not end a run.
        stream.reconfigure(errors="backslashreplace")
    folder = None
    try:
        try:
            folder, carry_out = prepare()
        except ValueError as error:
            if local_rank() == 0:
                raise
            # The ranks of one machine read the same: one of them tells.
            raise SharedError(str(error)) from error
        init_distributed()
        carry_out()
    except (Exception, KeyboardInterrupt) as error:
        return report_failure(error, folder)
    finally:
        stop_listening()
    close_distributed()
    return 0
