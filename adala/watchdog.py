"""Ends a run that hangs, with the stacks of all its ranks: which of them waits for what says where to look.

Every rank notes each step. Where nothing was noted for too long, each writes the stacks of its threads into
``stacks-rankN.txt`` beside the run, asks its data workers for theirs, and ends; launchers then end what is left.
"""

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adala.distributed import rank

# Of ranks that all hang, the first to end has the launcher end the others, which have their stacks to write first.
OTHERS_WRITE_S = 10.0
# When something in C keeps the interpreter's lock, the watching thread stands still; after this long C itself writes.
LOCKED_LONGER_S = 60.0
# By which data workers write their stacks; in these NCCL, which has a use of its own for it, never runs.
WORKER_STACKS = signal.SIGUSR1
# Written by the rank that notices first, so that the others look too.
NOTICED = ".hangs"


class Watchdog:
    """Watches over one rank."""

    def __init__(self, folder: Path, minutes: float):
        """Does nothing before :meth:`watching`.

        Args:
            folder: Where stacks go, which all ranks share.
            minutes: Without a beat, after which the run hangs; 0 is never.
        """
        self._folder, self._limit_s = folder, 60 * minutes
        self._beat_at = time.monotonic()
        self._is_over = threading.Event()

    def beat(self) -> None:
        """Notes that the run goes on."""
        self._beat_at = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the run must go on."""
        if not self._limit_s:
            yield
            return
        self.beat()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        (self._folder / NOTICED).unlink(missing_ok=True)
        with self._stacks.open("w", encoding="utf-8") as stacks:
            while not self._is_over.wait(min(5.0, self._limit_s / 20)):
                faulthandler.dump_traceback_later(self._limit_s + LOCKED_LONGER_S, exit=True, file=stacks)
                silent_s = time.monotonic() - self._beat_at
                if silent_s > self._limit_s or (silent_s > self._limit_s / 2 and (self._folder / NOTICED).exists()):
                    self._end(stacks)
        self._stacks.unlink()

    @property
    def _stacks(self) -> Path:
        return self._folder / f"stacks-rank{rank()}.txt"

    def _end(self, stacks) -> None:
        if self._is_first():
            # Written past Python's buffers, whose locks the main thread may hold.
            os.write(2, f"error: {self._sentence()}\n".encode())
        faulthandler.dump_traceback(stacks, all_threads=True)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, WORKER_STACKS)
        time.sleep(OTHERS_WRITE_S)
        os._exit(1)

    def _is_first(self) -> bool:
        try:
            os.close(os.open(self._folder / NOTICED, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            # A folder that can no longer be written is a reason to hang, and none to say nothing.
            return True
        return True

    def _sentence(self) -> str:
        return (
            f"the run hangs: rank {rank()} has done no step for {self._limit_s / 60:g} minutes; what each rank was at "
            f"stands in {self._folder}/stacks-rank*.txt; the same command goes on from what was saved last, and "
            "hang_minutes says how long a step may take"
        )


def write_stacks_when_asked() -> None:
    """Has this data worker write its stacks to stderr by :data:`WORKER_STACKS`."""
    # By its number: what Python calls stderr may be no file.
    faulthandler.register(WORKER_STACKS, file=2, all_threads=True)
