"""pytest plugins: one writes down which test calls what, one runs chosen tests only."""

import os
import sys
import threading
import time
from pathlib import Path


class Tracer:
    """Writes down which functions of adala/ a test calls, in the processes that it forks too, and how long it takes."""

    def __init__(self, tree: Path):
        self.prefix, self.known, self.test = f"{tree}/", set(), ""
        self.output = os.open(tree / "calls.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, frame, event: str, _) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.prefix + "adala/"):
            called = f"{code.co_filename.removeprefix(self.prefix)}:{code.co_firstlineno}\t{self.test}\n"
            if called not in self.known:
                self.known.add(called)
                os.write(self.output, called.encode())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test, self.begun = nodeid, time.monotonic()
        sys.settrace(self.note)
        threading.settrace(self.note)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        sys.settrace(None)
        threading.settrace(None)
        os.write(self.output, f"{time.monotonic() - self.begun}\t{nodeid}\n".encode())


def read_trace(tree: Path) -> tuple[dict[str, set[str]], dict[str, float]]:
    """The tests that call a function, by its file and first line; and each test's seconds."""
    calls, seconds = {}, {}
    for what, test in (line.split("\t") for line in (tree / "calls.txt").read_text().splitlines()):
        if what.startswith("adala/"):
            calls.setdefault(what, set()).add(test)
        else:
            seconds[test] = float(what)
    return calls, seconds


class Selection:
    """Runs the named tests only, the fastest first."""

    def __init__(self, tests: set[str], seconds: dict[str, float]):
        self.tests, self.seconds = tests, seconds

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.tests), key=lambda item: self.seconds[item.nodeid])
