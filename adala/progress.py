"""What a run says: JSONL always, TensorBoard unless switched off, a progress bar on a terminal, plain lines elsewhere.

Only rank 0 writes; on other ranks a writer does nothing.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from adala.distributed import rank

METRICS = "metrics.jsonl"
HIDDEN_IN_LINES = ("block",)


def say(message: str) -> None:
    """Prints a line on rank 0."""
    if rank() == 0:
        print(message, flush=True)


class MetricWriter:
    """One stage's metrics: a JSON object a line with ``split`` (train or val), ``step``, ``time_s`` and the values."""

    def __init__(self, folder: Path, title: str, steps: int, tensorboard: bool = True):
        """Opens the files for appending, so that a resumed stage continues them.

        Args:
            folder: The stage's folder.
            title: Shown before each line.
            steps: Optimizer steps of the stage.
            tensorboard: Whether to write event files into ``folder/tensorboard``.
        """
        self.active = rank() == 0
        self.title = title
        self.steps = steps
        self._start = time.monotonic()
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(folder / METRICS)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard")) if tensorboard else None
        self._bar = _build_bar() if sys.stdout.isatty() else None
        self._task = self._bar.add_task(title, total=steps, note="") if self._bar else None
        if self._bar:
            self._bar.start()

    def write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Records named scalars after ``step`` optimizer steps."""
        if not self.active:
            return
        elapsed = time.monotonic() - self._start
        row = {"split": split, "step": step, "time_s": round(elapsed, 3), **values}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        note = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if not k.startswith(HIDDEN_IN_LINES))
        if self._bar and split == "train":
            self._bar.update(self._task, completed=step, note=note)
        elif self._bar:
            self._bar.console.print(f"{self.title} {split} step {step}  {note}")
        else:
            print(f"{self.title} {split} step {step}/{self.steps}  {note}  [{elapsed:.0f} s]", flush=True)

    def close(self) -> None:
        if self.active:
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()
            if self._bar:
                self._bar.stop()


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


def _build_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(highlight=False),
    )
