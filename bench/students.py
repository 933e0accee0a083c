"""The students of docs/RESULTS.md: trains rows of ``students.yaml``, scores them, and makes the page of their scores.

    python bench/students.py list
    python bench/students.py train short-adala-s0 'long-*'
    python bench/students.py evaluate --split val short-adala-s0    # to choose by: a line of docs/results/tried.jsonl
    python bench/students.py evaluate --split test short-adala-s0   # docs/results/students/short-adala-s0.json
    python bench/students.py page

What is finished is not repeated. A row is one file, to be committed as soon as it stands; the page is made of these
files alone.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from command import PROJECT, TrainingFailed
from student_evaluation import evaluate
from student_page import write_page
from student_results import DOCS, read_result, results_folder
from student_table import SPLITS, TABLE, StudentTable, read_table
from student_training import default_ranks, train

from adala.distributed import say
from adala.failures import report_error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="the rows (bench/students.yaml)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and its results (docs)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the rows by name")
    training = commands.add_parser("train", help="trains rows, stage by stage")
    training.add_argument("--ranks", type=int, default=default_ranks(), help="processes (one a GPU, else one a core)")
    scoring = commands.add_parser("evaluate", help="scores rows against the teacher")
    scoring.add_argument("--split", choices=SPLITS, required=True, help="val to choose by, test for the page")
    scoring.add_argument("--again", action="store_true", help="score once more what was scored and has not changed")
    scoring.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch (all cores)")
    for command in (training, scoring):
        command.add_argument("rows", nargs="+", metavar="ROW", help="names of rows, or patterns of them (short-*)")
    commands.add_parser("page", help="makes docs/RESULTS.md's tables and pictures of what is in docs/results")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    options.table, options.docs = options.table.resolve(), options.docs.resolve()
    # Where the training command runs: a relative path in the table means the same to both.
    os.chdir(PROJECT)
    try:
        run(options, read_table(options.table))
    except (ValueError, OSError, TrainingFailed) as error:
        report_error(error)
        return 1
    return 0


def run(options: argparse.Namespace, table: StudentTable) -> None:
    """One command.

    Raises:
        ValueError: See the functions that it calls.
        TrainingFailed: A stage did not end well.
    """
    if options.command == "list":
        for name, row in table.rows.items():
            result = read_result(results_folder(options.docs) / f"{name}.json")
            print(f"{name:32}{'measured' if result else 'not yet measured':20}{row.group}: {row.label}")
    elif options.command == "page":
        for path in write_page(table, options.docs):
            say(f"wrote {path}")
    elif options.command == "train":
        for row in table.chosen(options.rows):
            train(table, row, options.ranks)
    else:
        torch.set_num_threads(options.threads)
        for row in table.chosen(options.rows):
            evaluate(table, row, options.split, options.docs, options.again)


if __name__ == "__main__":
    sys.exit(main())
