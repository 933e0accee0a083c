"""Where a run's files lie: ``runs/NAME/stage{1,2,3}/`` and, beside them, the run's report."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

FINISHED = "finished.json"


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Attributes:
        path: ``runs_dir / run_name``.
    """

    path: Path

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def picture(self) -> Path:
        return self.path / "report.png"

    def stage(self, number: int) -> Path:
        """The folder of stage 1, 2 or 3: config, metrics, checkpoints, exported student."""
        return self.path / f"stage{number}"

    def checkpoints(self, number: int) -> Path:
        return self.stage(number) / "checkpoints"

    def is_finished(self, number: int) -> bool:
        return (self.stage(number) / FINISHED).is_file()

    def mark_finished(self, number: int, metrics: dict[str, float]) -> None:
        """Says that the stage is through, with its last evaluation; the last file that a stage writes."""
        (self.stage(number) / FINISHED).write_text(json.dumps(metrics, indent=1) + "\n")

    def remove_stage(self, number: int) -> None:
        shutil.rmtree(self.stage(number), ignore_errors=True)
