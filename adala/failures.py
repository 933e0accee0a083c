"""What ends a command, in one sentence: a mistake, a fault of the machine, or a bug, whose traceback is kept."""

import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from adala.distributed import STARTED_BY, Interrupted, SharedError, first_line, rank
from adala.preemption import REQUEUE

# How long rank 0 may take to end, and the launcher to end the others, on a machine with much to do.
OTHER_RANKS_WAIT_S = 10.0
# What the machine failed at, by what torch's RuntimeError says, and what helps. The first that fits counts.
MACHINE_FAULTS = (
    (
        ("DataLoader worker", "bus error", "shared memory object", "shared memory(shm)", "unable to mmap"),
        "a data worker died, most often because main memory or /dev/shm is full: lower data.num_workers or "
        "data.shuffle_buffer, or give the container more shared memory (--shm-size)",
    ),
    (
        ("out of memory", "allocate memory", "bad_alloc", "MemoryError"),
        "there is not enough memory: lower stageN.micro_batch_size, evaluation.batch_size or data.num_workers, or take "
        "a ds_config of a higher ZeRO stage",
    ),
    (
        ("ancdata", "open files"),
        "there are too many open files: raise their limit (ulimit -n), or lower data.num_workers",
    ),
    (
        ("PytorchStreamWriter", "inline_container"),
        "a file could not be written or read to its end: look whether the disk is full or the file damaged",
    ),
    (
        ("Timed out", "timed out", "Timeout", "timeout"),
        "another rank did not answer in time: look for what it says, and whether its machine still runs",
    ),
    (
        (
            "CUDA error",
            "CUDA driver",
            "NCCL error",
            "ncclInternalError",
            "ncclSystemError",
            "CUBLAS_STATUS",
            "CUDNN_STATUS",
        ),
        "a GPU or the connection between GPUs failed: look at nvidia-smi and the system's log, and start again",
    ),
)


def has_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone; what was wrong there is that rank's to say."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe")
    return isinstance(error, dist.DistBackendError) or any(text in str(error) for text in gone)


def report_failure(error: BaseException, folder: Path | None = None) -> int:
    """Says in one sentence what ended a command.

    Args:
        error: A mistake of the user's, a fault of the machine's, or, where it is neither, a bug of ours, whose
            traceback goes into a file.
        folder: Where that file goes, if it is there; else it goes where temporary files lie.

    Returns:
        The command's exit status.
    """
    if isinstance(error, KeyboardInterrupt):
        if _told_rank() == 0:
            report_error("interrupted; the same command goes on from what was saved last")
        return 130
    if isinstance(error, Interrupted):
        if _told_rank() == 0:
            print(f"asked to end ({error}); the same command goes on from there", file=sys.stderr, flush=True)
        return REQUEUE
    if isinstance(error, ValueError | OSError):
        report_error(error)
    elif isinstance(error, ImportError):
        report_error(
            f"{_one_sentence(error)}: the installation lacks it, or has it in another version (pip install -e .)"
        )
    elif isinstance(error, RuntimeError) and has_lost_peer(error):
        print(f"rank {rank()}: another rank has ended, and says why", file=sys.stderr, flush=True)
    elif isinstance(error, RuntimeError | MemoryError) and (advice := _machine_fault(error)):
        report_error(f"{advice} ({first_line(error)})")
    else:
        what = f"{type(error).__name__}: {_one_sentence(error)}"
        report_error(
            f"this is a bug of the program, not your mistake: {what}; please report it with {_keep(error, folder)}"
        )
    return 1


def _machine_fault(error: BaseException) -> str | None:
    text = f"{type(error).__name__}: {error}"
    return next((advice for signs, advice in MACHINE_FAULTS if any(sign in text for sign in signs)), None)


def _keep(error: BaseException, folder: Path | None) -> str:
    """Writes an error's traceback into a file of this rank's own; says where."""
    text = "".join([f"{sys.argv}\n", *traceback.format_exception(error)])
    name = f"error-rank{_told_rank()}"
    try:
        # Where the run's disk is full or gone, its traceback is needed as well.
        with suppress(OSError):
            if folder is not None and folder.is_dir():
                return _write_traceback(folder / f"{name}.txt", text)
        descriptor, path = tempfile.mkstemp(prefix=f"adala-{name}-", suffix=".txt")
        os.close(descriptor)
        return _write_traceback(Path(path), text)
    except OSError as failure:
        print(text, file=sys.stderr, flush=True)
        return f"the traceback above, which could not be written to a file ({failure})"


def _write_traceback(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return f"the traceback in {path}"


def report_error(error: Exception | str) -> None:
    """Prints an error as one sentence, once: rank 0 at once, another rank only what rank 0 may not know.

    That is an error of that rank alone; it waits a moment, since rank 0's exit makes the launcher end the others.
    """
    if _told_rank() != 0:
        if isinstance(error, SharedError):
            return
        time.sleep(OTHER_RANKS_WAIT_S)
    sentence = error if isinstance(error, str) else _one_sentence(error)
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _told_rank() -> int:
    """This process's rank by its environment: a mistake may be found before there is a process group."""
    told = (os.environ.get(name, "") for name in ("RANK", *STARTED_BY.values()))
    return next((int(number) for number in told if number.isdecimal()), 0)


def _one_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Caught "):
        # A data worker's exception arrives with its traceback as text around it.
        return lines[-1].removeprefix(f"{type(error).__name__}: ")
    return " ".join(lines)
