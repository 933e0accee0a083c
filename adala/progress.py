"""What a run says: TensorBoard unless switched off, a progress bar on a terminal, plain lines elsewhere.

Only rank 0 writes; on other ranks a writer does nothing. What can be read back is :mod:`adala.metrics`.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from adala.distributed import rank
from adala.metrics import MetricLog

HIDDEN_IN_LINES = ("block",)


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
        self._log = MetricLog(folder)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard")) if tensorboard else None
        self._bar = build_bar() if sys.stdout.isatty() else None
        self._task = self._bar.add_task(title, total=steps, note="") if self._bar else None
        if self._bar:
            self._bar.start()

    def write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Records named scalars after ``step`` optimizer steps."""
        if not self.active:
            return
        elapsed = time.monotonic() - self._start
        row = {"split": split, "step": step, "time_s": round(elapsed, 3), **values}
        self._log.append(row)
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

    def note(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Records what is no curve, words among it, as a line of ``metrics.jsonl`` alone."""
        if self.active:
            self._log.append({"split": split, "step": step, **values})

    def close(self) -> None:
        if self.active:
            self._log.close()
            if self._tensorboard:
                self._tensorboard.close()
            if self._bar:
                self._bar.stop()


def build_bar(visible: bool = True) -> Progress:
    """A bar of steps with a note beside it; tasks need a ``note``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(highlight=False),
        disable=not visible,
    )
