"""``metrics.jsonl``: a JSON object a line, appended while a stage trains, and read back whatever a kill left of it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adala.distributed import say

METRICS = "metrics.jsonl"


class MetricLog:
    """A stage's metrics on the disk, opened for appending, so that a resumed stage continues them."""

    def __init__(self, folder: Path):
        path = folder / METRICS
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row with ``split`` (train or val), ``step`` and values.

        Raises:
            ValueError: A value is not finite.
        """
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: Path, split: str) -> list[dict[str, float]]:
    """The rows of one split that a stage has written so far, in order.

    A resumed stage repeats the steps after its checkpoint; of rows with the same step the last one counts. Lines that
    are not whole are left out, and said.
    """
    path = folder / METRICS
    rows, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows += [row] if row["split"] == split else []
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        say(f"{path}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def held_out_splits(folder: Path) -> list[str]:
    """The splits of a stage's rows that are of held-out data, in order: ``val``, or ``val/NAME`` for each named set."""
    path = folder / METRICS
    found = re.findall(rb'"split": "(val(?:/\w+)?)"', path.read_bytes()) if path.is_file() else ()
    return list(dict.fromkeys(split.decode() for split in found))


def _drop_torn_line(path: Path) -> None:
    """Removes the beginning of a line that a killed process left at the end, so that the next one is not spoilt."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.truncate(len(whole))
            say(f"{path}: the last line was cut short, and is dropped")
