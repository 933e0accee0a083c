"""What this process holds in memory."""

import re
import resource
import sys
from pathlib import Path
from typing import Literal

STATUS = Path("/proc/self/status")


def resident_mib(which: Literal["VmRSS", "VmHWM"]) -> float:
    """The resident set of this process in MiB: now (``VmRSS``), or its highest (``VmHWM``) since the program began, or
    since :func:`forget_peak`. Where the system does not say (no /proc, or one of a sandbox), the highest.

    On Linux getrusage's own figure is none of these: it begins with what the process held that started this one.
    """
    text = STATUS.read_text() if STATUS.exists() else ""
    if said := re.search(rf"^{which}:\s+(\d+)", text, re.MULTILINE):
        return int(said[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there and KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def forget_peak() -> bool:
    """Has the highest resident set begin anew; returns whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
