"""What every rank and every worker of a run imports before it can say a word."""

import subprocess
import sys


def test_the_trainer_imports_nothing_that_takes_seconds_and_that_few_runs_need() -> None:
    """torchmetrics brings transformers, SciPy and Matplotlib along; a run of Stage 1 has no metric of a task."""
    program = "import sys, adala.trainer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "adala.trainer" in loaded
    assert not {"torchmetrics", "transformers", "scipy", "matplotlib", "pandas"} & set(loaded)
