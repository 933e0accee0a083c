"""Puts evaluations of real models into docs/: ``docs/results/evaluation.json``, and its tables in docs/RESULTS.md.

    bash bench/realdata/evaluate.sh
    python bench/evaluations.py

The page's tables are made of the JSON alone; a test holds one against the other.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adala.evaluation_report import EvaluationDocument, kept, parse_document, to_json
from adala.files import read_json, write_json, write_whole

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "evaluation.json", DOCS / "RESULTS.md"
BEGIN, END = "<!-- tables of evaluation.json: begin -->\n", "<!-- tables of evaluation.json: end -->\n"
SETS = ("photos", "stamps", "fashion", "earth", "scenes")
TUNED = "-tuned"
FROZEN = {
    "teacher": "teacher (softmax)",
    "linearized": "linearized, unaligned",
    "stage1": "after Stage 1",
    "stage2": "after Stage 2",
}
BASELINES = ("majority class", "colour table")

Documents = Mapping[str, EvaluationDocument]


def collect(runs: Path) -> dict[str, EvaluationDocument]:
    """The evaluations that ``bench/realdata/evaluate.sh`` has left in ``runs``, by data set."""
    passes = {"frozen": "", "tuned": TUNED}
    files = {
        f"{name}{end}": runs / f"{kind}-{name}" / "evaluation.json" for kind, end in passes.items() for name in SETS
    }
    there = {name: path for name, path in files.items() if path.is_file()}
    return {name: parse_document(_without_home(read_json(path)), path) for name, path in there.items()}


def _without_home(stored: Any) -> Any:
    """A JSON value in which paths below the home folder are everybody's."""
    return json.loads(json.dumps(stored).replace(f"{Path.home()}/", "~/"))


def tables(documents: Documents) -> str:
    """Both tables of the page, in Markdown."""
    return f"{_features_table(documents)}\n{_segmentation_table(documents)}"


def _features_table(documents: Documents) -> str:
    """Closeness of features, kNN and linear probe, a line for each model; scores with what is kept of the teacher's."""
    columns: dict[str, list[str]] = {"": list(FROZEN.values())}
    for name, size in _sizes(documents, ("photos", "stamps", "fashion")).items():
        document = documents[name]
        if name == "photos":
            for measure, heading in {"patch_cosine": "patch cosine", "cls_cosine": "class token cosine"}.items():
                columns[f"{name} {size}: {heading}"] = [_number(document, row, measure, "{:.3f}") for row in FROZEN]
        else:
            for measure, heading in {"knn10_top1": "kNN", "probe_top1": "probe"}.items():
                columns[f"{name} {size}: {heading}"] = [_score(document, row, measure) for row in FROZEN]
        if name != "stamps":
            columns[f"images/s at {size}"] = [_speed(document, row) for row in FROZEN]
    return _markdown(columns)


def _segmentation_table(documents: Documents) -> str:
    """mIoU of each head, a line for each model, and of the two baselines."""
    lines = {("frozen", row): f"frozen linear head: {label}" for row, label in FROZEN.items()}
    for head in ("linear", "pmt"):
        lines |= {("tuned", f"{who}-{head}"): f"Stage 3, `{head}`: {who}" for who in ("teacher", "student")}
    columns: dict[str, list[str]] = {"": [*lines.values(), *BASELINES]}
    for name, size in _sizes(documents, ("earth", "scenes")).items():
        document = documents[name]
        cells = [
            _score(document, row, "probe_miou") if kind == "frozen" else _tuned_score(documents, name, row)
            for kind, row in lines
        ]
        columns[f"{name} {size}"] = [*cells, *(_number(document, row, "probe_miou", "{:.2f}") for row in BASELINES)]
    return _markdown(columns)


def _sizes(documents: Documents, names: tuple[str, ...]) -> dict[str, str]:
    return {name: f"{documents[name].data['image_size'][0]} px" for name in names if name in documents}


def _measures(document: EvaluationDocument, row: str) -> Mapping[str, float | None]:
    return next((model.measures for model in document.models if model.name == row), {})


def _number(document: EvaluationDocument, row: str, measure: str, form: str) -> str:
    value = _measures(document, row).get(measure)
    return "-" if value is None else form.format(value)


def _score(document: EvaluationDocument, row: str, measure: str) -> str:
    share = kept(document).get(row, {}).get(measure)
    return _with_share(_number(document, row, measure, "{:.2f}"), None if row == document.teacher else share)


def _speed(document: EvaluationDocument, row: str) -> str:
    ratio = None if row == document.teacher else _measures(document, row).get("speed_ratio")
    value = _number(document, row, "images_per_s", "{:.2f}")
    return value if ratio is None else f"{value} ({ratio:.2f} x)"


def _tuned_score(documents: Documents, name: str, run: str) -> str:
    """A fine-tuned head's, and what a student keeps of the fine-tuned teacher's with the same head."""
    document = documents.get(f"{name}{TUNED}")
    if document is None:
        return "-"
    row, of_teacher = (f"{name}-{model}/stage3" for model in (run, run.replace("student", "teacher")))
    ours, theirs = (_measures(document, each).get("head_miou") for each in (row, of_teacher))
    share = ours / theirs if ours is not None and theirs and row != of_teacher else None
    return _with_share(_number(document, row, "head_miou", "{:.2f}"), share)


def _with_share(value: str, share: float | None) -> str:
    return value if share is None else f"{value} ({100 * share:.1f} %)"


def _markdown(columns: Mapping[str, list[str]]) -> str:
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values(), strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def put_into_page(page: str, text: str) -> str:
    """The page with ``text`` between its two marks.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for the tables: put back the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def read_results() -> dict[str, EvaluationDocument]:
    """What is in docs/ already."""
    return {name: parse_document(stored, RESULTS) for name, stored in (read_json(RESULTS) or {}).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where evaluate.sh has left them")
    runs = parser.parse_args().runs
    documents = read_results() | collect(runs)
    try:
        page = put_into_page(PAGE.read_text(encoding="utf-8"), tables(documents))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {name: to_json(document) for name, document in documents.items()})
    write_whole(PAGE, page)
    print(f"wrote {', '.join(documents) or 'nothing'} into {RESULTS} and {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
