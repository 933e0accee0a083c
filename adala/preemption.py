"""A run that is asked to end: by SIGTERM or SIGUSR2, as schedulers do ahead of a limit, or by the end of its launcher.

The trainer looks at the end of each step, saves on all ranks together, and the command ends with the code
:data:`REQUEUE`. Whatever one rank is told, all do: the question goes along with the step's own reduction.
"""

import os
import signal
from types import FrameType

from adala.distributed import STARTED_BY

# EX_TEMPFAIL of sysexits.h: it failed for now, the same command goes on.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_told: str | None = None
_launcher: int | None = None


class Preempted(Exception):
    """The run was asked to end, and has saved what it had."""


def listen() -> None:
    """Has this process note :data:`SIGNALS` from here on instead of ending at once.

    A rank that a launcher has started also notes when that is gone: nobody would see it train on.
    """
    global _launcher
    for number in SIGNALS:
        signal.signal(number, _note)
    if any(os.environ.get(name) for name in ("RANK", *STARTED_BY.values())):
        _launcher = os.getppid()


def _note(number: int, frame: FrameType | None) -> None:
    global _told
    _told = signal.Signals(number).name


def reason_to_end() -> str | None:
    """Why this rank is to end, in words; None where it is not."""
    if _told is not None:
        return _told
    if _launcher is not None and os.getppid() != _launcher:
        return "its launcher has ended"
    return None


def forget() -> None:
    """Forgets what was noted; for tests."""
    global _told, _launcher
    _told = _launcher = None
