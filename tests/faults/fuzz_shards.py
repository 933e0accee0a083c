"""Reads damaged and hostile shards and indexes, a thousand of them, and says which were not handled.

    python tests/faults/fuzz_shards.py --seed 0 --mutants 1000
    python tests/faults/fuzz_shards.py --seed 0 --only 417     # one of them again

Each mutant (see ``shard_mutants``) is indexed anew and read, and is read with the index that lay beside it before. What
comes of it must be every good sample exactly once, with the bad ones counted by shard, or one sentence that names the
shard or the index; in a time that is bounded, and in less than 1 GiB above what the process held before.

The mutants are read by a process of their own, which another one takes over for when it crashes or hangs.
"""

import argparse
import hashlib
import json
import logging
import queue
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import shard_mutants as mutants
import torch

from adala.data import EvaluationLoader, TrainLoader, View, build_index, load_index
from adala.resident import resident_mib
from adala.tasks import Classification

TIMEOUT_S = 60
MAX_GROWTH_MIB = 1024
# One mutant in so many is read by two data workers as well.
WITH_WORKERS = 12
LONGEST_SENTENCE = 1000
VIEW = View((8, 8), (0.5,) * 3, (0.5,) * 3, (4, 4))
PREPARATION = Classification(num_classes=1000).prepare(VIEW, None)


@dataclass
class Outcome:
    """What became of a mutant in one way of reading it.

    Attributes:
        error: What refused it.
        seen: By sample id, how often it came and digests of what came.
        bad: Numbers of bad samples by shard.
    """

    error: BaseException | None = None
    seen: dict[str, list[str]] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)


def read(folder: Path, anew: bool, training: bool, workers: int) -> Outcome:
    """Indexes, where it is to be done anew, and reads all samples as training or an evaluation does."""
    outcome = Outcome()
    try:
        if anew:
            build_index(folder)
        index = load_index([str(folder)])
        options = {"num_workers": workers, "max_bad_fraction": 0.5}
        if training:
            loader: Any = TrainLoader(
                index, PREPARATION, global_batch_size=1, micro_batch_size=1, seed=0, shuffle_buffer=4, **options
            )
            batches = islice(loader, index.num_samples)
        else:
            loader = EvaluationLoader(index, PREPARATION, batch_size=3, **options)
            batches = iter(loader)
        for batch in batches:
            for sample, image, label in zip(batch["id"], batch["image"], batch["label"], strict=True):
                digest = hashlib.sha256(image.numpy().tobytes() + bytes(str(label.item()), "ascii")).hexdigest()
                outcome.seen.setdefault(sample, []).append(digest)
        outcome.bad = loader.bad_samples
    except Exception as error:
        outcome.error = error
    return outcome


def complaints(
    mutant: mutants.Mutant, outcome: Outcome, anew: bool, training: bool, good: dict[str, str], folder: Path
):
    """What is wrong with an outcome, a sentence each."""
    fate = mutant.anew if anew else mutant.before
    if outcome.error is not None:
        yield from complaints_of_error(outcome.error, mutant, folder)
        if not fate.refused:
            yield f"it was refused: {outcome.error}"
        return
    accepted = [keys for keys in (fate.read, _as_tar(mutant, folder) if fate.as_tar else None) if keys is not None]
    if not accepted:
        yield "it was not refused"
        return
    names = {f"{mutants.WHOLE}/a{number}" for number in range(mutants.SHARD_SIZES[mutants.WHOLE])}
    counted = outcome.bad.get(mutant.name, 0)
    if set(outcome.bad) - {mutant.name}:
        yield f"bad samples of other shards: {outcome.bad}"
    if not training and any(len(each) > 1 for each in outcome.seen.values()):
        yield f"seen more than once: {[name for name, each in outcome.seen.items() if len(each) > 1]}"
    faults = []
    for keys in accepted:
        wanted = names | {f"{mutant.name}/{key}" for key in keys}
        missing = wanted - outcome.seen.keys()
        bad = {f"{mutant.name}/{key}" for key in mutant.bad}
        may_be_bad = bad | {f"{mutant.name}/{key}" for key in mutant.touched}
        if more := outcome.seen.keys() - wanted:
            faults.append(f"samples that nobody put there: {sorted(more)}")
        elif bad - missing:
            faults.append(f"bad samples that were read: {sorted(bad - missing)}")
        elif missing - may_be_bad:
            faults.append(f"good samples that were lost: {sorted(missing - may_be_bad)}")
        elif len(missing) != counted:
            faults.append(f"{len(missing)} samples are missing, but {counted} counted as bad")
        else:
            faults = []
            break
    yield from faults
    known = {name.replace(mutants.MUTATED, mutant.name, 1): digest for name, digest in good.items()}
    for name, digests in outcome.seen.items():
        key = name.removeprefix(f"{mutant.name}/")
        if key not in mutant.touched and name in known and any(digest != known[name] for digest in digests):
            yield f"{name} is another sample than before"


def _as_tar(mutant: mutants.Mutant, folder: Path) -> frozenset[str] | None:
    return mutants.listed_by_tar(folder / mutant.name)


def complaints_of_error(error: BaseException, mutant: mutants.Mutant, folder: Path) -> Iterator[str]:
    if not isinstance(error, ValueError | OSError):
        yield f"it crashed with {error!r}: {traceback.format_exception(error)[-3:]}"
    # What a data worker raised comes with its traceback around it; commands say the last line.
    lines = str(error).strip().splitlines()
    sentence = lines[-1] if lines and lines[0].startswith("Caught ") else str(error)
    if not 10 <= len(sentence) <= LONGEST_SENTENCE or len(sentence.splitlines()) != 1:
        yield f"not one sentence: {sentence[:2000]!r}"
    if not any(name in sentence for name in (mutant.name, "index.json", str(folder))):
        yield f"the sentence does not say of what it is: {sentence!r}"


def run(seed: int, number: int, good: dict[str, str]) -> dict[str, Any]:
    """What became of one mutant, for the report."""
    begin = time.monotonic()
    mutant = mutants.make(seed, number)
    draw = random.Random(f"ways/{seed}/{number}")
    faults, ways = [], []
    for anew in (True, False):
        training = draw.random() < 0.5
        ways.append((anew, training, 0))
        if not draw.randrange(WITH_WORKERS):
            ways.append((anew, not training, 2))
    refusals = []
    for anew, training, workers in ways:
        with tempfile.TemporaryDirectory() as folder:
            mutants.write(mutant, Path(folder), with_index=not anew)
            outcome = read(Path(folder), anew, training, workers)
            way = f"{'anew' if anew else 'before'}, {'training' if training else 'evaluation'}, {workers} workers"
            faults += [f"({way}) {each}" for each in complaints(mutant, outcome, anew, training, good, Path(folder))]
            refusals.append(outcome.error is not None)
    return {
        "number": number,
        "what": mutant.what,
        "faults": faults,
        "refused": all(refusals),
        "seconds": time.monotonic() - begin,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """The most that this process, or one of its workers, ever held."""
    return max(resident_mib("VmHWM"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def child(seed: int, numbers: list[int]) -> None:
    """Runs mutants, and writes a line of JSON for each."""
    torch.set_num_threads(1)
    logging.disable()
    warnings.simplefilter("ignore")
    good = {}
    whole = mutants.Mutant("nothing", mutants.good_shard(), mutants.UNCHANGED, mutants.UNCHANGED)
    for training in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            mutants.write(whole, Path(folder), with_index=False)
            outcome = read(Path(folder), True, training, 0)
        if outcome.error is not None:
            raise outcome.error
        good = {name: digests[0] for name, digests in outcome.seen.items()}
    print(json.dumps({"baseline_mib": peak_mib()}), flush=True)
    for number in numbers:
        print(json.dumps(run(seed, number, good)), flush=True)


class Child:
    """A process that runs mutants, one after the other."""

    def __init__(self, seed: int, numbers: list[int]):
        command = [sys.executable, __file__, "--seed", str(seed), "--child", json.dumps(numbers)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def result(self, timeout_s: float) -> dict[str, Any] | str:
        """The next line, or what became of the process instead."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return f"no answer in {timeout_s} s"
        return json.loads(line) if line is not None else f"the process ended with code {self._process.wait()}"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def fuzz(seed: int, numbers: list[int]) -> list[dict[str, Any]]:
    """Runs all mutants, through crashes and hangs. Returns what became of each."""
    results: list[dict[str, Any]] = []
    while len(results) < len(numbers):
        rest = numbers[len(results) :]
        worker = Child(seed, rest)
        try:
            first = worker.result(300)
            if isinstance(first, str):
                raise RuntimeError(f"the mutants could not be made: {first}")
            for number in rest:
                result = worker.result(TIMEOUT_S)
                if isinstance(result, str):
                    results.append({"number": number, "what": mutants.make(seed, number).what, "faults": [result]})
                    break
                growth = result["peak_mib"] - first["baseline_mib"]
                result["growth_mib"] = growth
                results.append(result)
                if growth > MAX_GROWTH_MIB:
                    result["faults"].append(f"{growth:.0f} MiB above the baseline")
                    break
        finally:
            worker.stop()
    return results


def report(seed: int, results: list[dict[str, Any]]) -> int:
    """Says what became of the mutants. Returns how many were not handled."""
    kinds: dict[str, Counter[str]] = {}
    failed = [result for result in results if result["faults"]]
    for result in results:
        outcome = "failed" if result["faults"] else "refused" if result["refused"] else "read"
        kinds.setdefault(result["what"].partition(":")[0], Counter())[outcome] += 1
    for kind, counts in sorted(kinds.items()):
        print(f"{kind:20s}", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    for result in failed:
        print(f"\nmutant {result['number']}, {result['what']}\n  --seed {seed} --only {result['number']}")
        for fault in result["faults"]:
            print(f"  {fault}")
    slowest = max(results, key=lambda result: result.get("seconds", 0))
    print(
        f"\n{len(results)} mutants, {len(failed)} not handled; at most "
        f"{max(result.get('growth_mib', 0) for result in results):.0f} MiB above the baseline; the slowest took "
        f"{slowest.get('seconds', 0):.1f} s ({slowest['what']})"
    )
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, default=1000)
    parser.add_argument("--only", type=int, help="the number of one of them")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.seed, options.child)
        return 0
    numbers = list(range(options.mutants)) if options.only is None else [options.only]
    return int(report(options.seed, fuzz(options.seed, numbers)) > 0)


if __name__ == "__main__":
    sys.exit(main())
