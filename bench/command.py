"""The training command as a bench runs it: in a process of its own, from the project's folder."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
# Left over from a launcher, they would make the command wait for other ranks.
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# The last line of a traceback, as a rank or torch prints it.
EXCEPTION = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b")


class TrainingFailed(RuntimeError):
    """The training command did not end well; the message is its own, with the exit code."""


def resolved_recipe(name: str) -> str:
    """A recipe's name as it is, a path made absolute: the command runs in the project's folder, not here."""
    return str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name


def run_training(
    arguments: Sequence[str], ranks: int | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Runs ``launchers/train.py`` to its end.

    Args:
        arguments: Of the command.
        ranks: Processes, through the deepspeed launcher; None runs one without it.
        environment: Variables beside those of this process.

    Raises:
        TrainingFailed: It ended with another exit code than 0.
    """
    command = [sys.executable]
    if ranks is not None:
        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(_free_port())]
    command += [str(PROJECT / "launchers" / "train.py"), *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=inherited | dict(environment or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise TrainingFailed(f"{telling_line(done.stdout)} (exit code {done.returncode})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def telling_line(output: str) -> str:
    """The command's own sentence about a mistake, else the last exception of a traceback, else the last line."""
    said = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line for line in said if line.startswith("error:")]
    raised = [line for line in said if EXCEPTION.match(line)]
    return (own[:1] or raised[-1:] or said[-1:] or ["no output"])[0]
