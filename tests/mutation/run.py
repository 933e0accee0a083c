"""Changes adala/ in one place at a time, and counts the changes that the tests in one process do not notice.

    python tests/mutation/run.py --sample 240 --seed 0 --output before.json
    python tests/mutation/run.py --again before.json --output after.json

The second form runs only what survived the first. See docs/TESTING.md.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# Every child begins with these read, and reads only adala itself.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import timm  # noqa: F401
import torch
import torchmetrics.classification  # noqa: F401
import torchvision.transforms.v2  # noqa: F401
import webdataset  # noqa: F401
from mutants import PROJECT, draw
from plugins import Selection, Tracer, read_trace
from torch.utils import tensorboard  # noqa: F401

TESTS = ("tests/adala", "tests/baselines/test_contract.py", "tests/baselines/test_mechanisms.py")
# A test that takes longer starts processes or reads whole data sets; it would be run hundreds of times.
LONGEST_TEST_S = 10.0
FAST_TEST_S = 0.1


def run_tests(tree: Path, files: list[str], plugin: object, limit_s: float) -> int:
    """pytest's exit status in a forked child, which starts with everything imported but adala; 124 is out of time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--rootdir", ".", *files], [plugin])
        os._exit(int(status))
    deadline = time.monotonic() + limit_s
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return 124
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(found[1])


def tests_of(mutant: dict, calls: dict[str, set[str]], seconds: dict[str, float]) -> set[str]:
    """The tests that call the function that was changed, or else any of its file."""
    places = [place for place in calls if place.startswith(f"{mutant['file']}:")]
    here = calls.get(f"{mutant['file']}:{mutant['function']}")
    tests = {test for place in places for test in calls[place]} if here is None else set(here)
    tests |= {test for test in seconds if f"/test_{Path(mutant['file']).stem}.py::" in test}
    if not mutant["function"]:
        # What runs as a module is read is not traced: every test may see it, the fast ones are asked.
        tests |= {test for test in seconds if seconds[test] < FAST_TEST_S}
    return {test for test in tests if seconds[test] <= LONGEST_TEST_S}


def judge(tree: Path, mutant: dict, calls: dict[str, set[str]], seconds: dict[str, float]) -> str:
    """What the tests say of a change."""
    tests = tests_of(mutant, calls, seconds)
    if not tests:
        return "no test"
    path = tree / mutant["file"]
    source = path.read_bytes()
    path.write_bytes(source[: mutant["begin"]] + mutant["after"].encode() + source[mutant["end"] :])
    limit = 60 + 4 * sum(seconds[test] for test in tests)
    try:
        files = sorted({test.partition("::")[0] for test in tests})
        status = run_tests(tree, files, Selection(tests, seconds), limit)
    finally:
        path.write_bytes(source)
    said = (tree / "output.txt").read_text(errors="replace")
    mutant["by"] = next(iter(re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)), "")
    return {0: "survived", 124: "killed (out of time)"}.get(status, "killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="results of an earlier run: only its survivors are run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.again.read_text()) if options.again else draw(options.sample, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        left_out = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(PROJECT, tree, ignore=left_out)
        if run_tests(tree, list(TESTS), Tracer(tree), 1800) != 0:
            sys.exit((tree / "output.txt").read_text())
        calls, seconds = read_trace(tree)
        for number, mutant in enumerate(results):
            if not mutant.get("result", "").startswith("killed"):
                begun = time.monotonic()
                mutant["result"] = judge(tree, mutant, calls, seconds)
                what = f"{mutant['file']}:{mutant['line']} {mutant['before'][:60]} -> {mutant['after'][:60]}"
                took, by = time.monotonic() - begun, mutant.get("by", "")
                print(f"{number + 1}/{len(results)} {mutant['result']:9} {took:5.1f} s {what}  {by}", flush=True)
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    for name, of in {m["file"]: [n for n in results if n["file"] == m["file"]] for m in results}.items():
        killed = sum(m["result"].startswith("killed") for m in of)
        print(f"{killed:4} of {len(of):3} killed  {name}")
    print(dict(Counter(mutant["result"] for mutant in results)))


if __name__ == "__main__":
    main()
