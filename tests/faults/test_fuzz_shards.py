"""A thousand damaged shards and indexes, of one seed: none crashes, hangs, or loses a sample without a word."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzz_shards.py")


@pytest.mark.faults
def test_a_thousand_mutants_are_each_read_or_refused_in_one_sentence() -> None:
    command = [sys.executable, str(PROGRAM), "--seed", "0", "--mutants", "1000"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    handled, failed, grown_mib = re.search(
        r"(\d+) mutants, (\d+) not handled; at most (\d+) MiB above", done.stdout
    ).groups()
    assert (handled, failed) == ("1000", "0") and int(grown_mib) < 1024
