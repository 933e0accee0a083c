"""A run that is asked to end: by SIGTERM or SIGUSR2, as schedulers do ahead of a limit, or by the end of its launcher.

The trainer looks at the end of each step, saves on all ranks together, and the command ends with the code
:data:`REQUEUE`. Whatever one rank is told, all do: the question goes along with the step's own reduction.
"""

import os
import signal
from types import FrameType
from typing import Any

from adala.distributed import STARTED_BY, Interrupted

# EX_TEMPFAIL of sysexits.h: it failed for now, the same command goes on.
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

_told: str | None = None
# Of a rank that a launcher has started: its own process and the launcher. A process that is forked from it has neither.
_place: tuple[int, int] | None = None
_before: dict[signal.Signals, Any] = {}


class Preempted(Interrupted):
    """The run was asked to end, and has saved what it had."""

    def __init__(self, where: str):
        """Says why this rank ends, and ``where`` the run was."""
        super().__init__(f"{reason_to_end() or 'as another rank was'}: {where}")


def listen() -> None:
    """Has this process note :data:`SIGNALS` from here on instead of ending at once.

    A rank that a launcher has started also notes when that is gone: nobody would see it train on.
    """
    global _place
    for number in SIGNALS:
        _before[number] = signal.signal(number, _note)
    if any(os.environ.get(name) for name in ("RANK", *STARTED_BY.values())):
        _place = os.getpid(), os.getppid()


def stop_listening() -> None:
    """Has signals do again what they did before :func:`listen`, and forgets what was noted."""
    global _told, _place
    _told = _place = None
    while _before:
        number, action = _before.popitem()
        signal.signal(number, action)


def _note(number: int, frame: FrameType | None) -> None:
    global _told
    _told = signal.Signals(number).name


def reason_to_end() -> str | None:
    """Why this rank is to end, in words; None where it is not."""
    if _told is not None:
        return _told
    if _place is not None and _place[0] == os.getpid() and _place[1] != os.getppid():
        return "its launcher has ended"
    return None


def end_if_asked(where: str) -> None:
    """For what a rank does by itself: ends it where this rank is to end, which all ranks are then told.

    Raises:
        Preempted: It is; ``where`` says what it was at.
    """
    if reason_to_end() is not None:
        raise Preempted(where)
