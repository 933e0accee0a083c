"""The page of results: its tables and pictures, of nothing but the rows' files and the list of rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from student_pictures import draw_blocks, draw_curves, draw_front
from student_results import RowResult, read_result, read_tried, results_folder, without_home
from student_table import EvaluationSet, Row, StudentTable
from student_training import changed_keys, conditions

from adala.comparison import BASELINES
from adala.evaluation_pictures import as_png
from adala.files import write_whole

BEGIN, END = "<!-- students: begin -->\n", "<!-- students: end -->\n"
PAGE = "RESULTS.md"
SCORES = {"knn": "knn10_top1", "probe": "probe_top1", "segmentation": "probe_miou"}
HEADINGS = {"knn": "kNN", "probe": "probe", "segmentation": "mIoU"}


@dataclass(frozen=True)
class Measured:
    """All rows, and the results of those that are measured.

    Attributes:
        table: The rows.
        results: By name, in the rows' order.
        remarks: By name, why a row is not what it seems to be.
        tried: How many students were looked at on val.
    """

    table: StudentTable
    results: dict[str, RowResult]
    remarks: dict[str, list[str]]
    tried: int

    def sets(self, measure: str, large: bool = False) -> dict[str, EvaluationSet]:
        """Those that a measure is taken on."""
        found = self.table.sets.items()
        return {name: one for name, one in found if one.large == large and measure in one.protocol["measures"]}

    def label(self, row: Row) -> str:
        return f"{row.title} [!]" if self.remarks.get(row.name) else row.title


def read_measured(table: StudentTable, docs: Path) -> Measured:
    """What lies in ``docs``.

    Raises:
        ValueError: A file that holds no results.
    """
    found = {name: read_result(results_folder(docs) / f"{name}.json") for name in table.rows}
    results = {name: result for name, result in found.items() if result is not None}
    first = next(iter(results.values()), None)
    remarks = {name: _remarks(table, table.rows[name], result, first) for name, result in results.items()}
    tried = {(line["name"], line["weights"], json.dumps(line["options"])) for line in read_tried(docs)}
    return Measured(table, results, remarks, len(tried))


def _remarks(table: StudentTable, row: Row, result: RowResult, first: RowResult) -> list[str]:
    """Why a row's numbers are no match for its line of the table, or for the others'."""
    remarks = []
    try:
        now = without_home(conditions(table.resolve(row), row.stages_until(row.stage)))
    except ValueError as error:
        remarks.append(f"its recipe cannot be read any more ({error})")
    else:
        if changed := changed_keys(result.conditions, now):
            remarks.append(f"its recipe has changed since in {', '.join(changed)}")
    others, ours = first.data(), result.data()
    if moved := [name for name in ours if name in others and ours[name] != others[name]]:
        remarks.append(f"of another build of {', '.join(moved)} than {first.name}: not to be compared")
    common = [name for name in result.documents if name in first.documents]
    if unlike := [n for n in common if result.documents[n].protocol != first.documents[n].protocol]:
        remarks.append(f"scored otherwise on {', '.join(unlike)} than {first.name}: not to be compared")
    return remarks


def render(measured: Measured, docs: Path) -> str:
    """Everything between the page's marks."""
    titles = {
        "main": "Quality and speed in one row",
        "knn": "Nearest neighbours and linear probes",
        "segmentation": "Masks by a frozen linear head",
        "large": "At the large size",
        "origin": "Where each row comes from",
    }
    tables = {
        "main": "\n".join(filter(None, (_main_table(measured), _remark_list(measured)))),
        "knn": _scores_table(measured, ("knn", "probe")),
        "segmentation": _scores_table(measured, ("segmentation",)),
        "large": _large_table(measured),
        "origin": _origin_table(measured),
    }
    parts = [_lead(measured)]
    for key, title in titles.items():
        if tables[key]:
            parts += [f"### {title}\n", tables[key]]
    return "\n".join([*parts, *_pictures(measured, docs)])


def _lead(measured: Measured) -> str:
    rows, done = measured.table.rows, measured.results
    looks = [len(result.looks) for result in done.values()]
    looked = f" Their test samples were looked at {min(looks)} to {max(looks)} times each." if looks else ""
    missing = ", ".join(f"`{name}`" for name in rows if name not in done)
    return (
        f"{len(done)} of {len(rows)} rows are measured. Choices were made on `val`, on which {measured.tried} students "
        f"were scored (`docs/results/tried.jsonl`); what stands here is of `test`.{looked}\n"
    ) + (f"\nNot yet measured: {missing}.\n" if missing else "")


Cells = Callable[[RowResult], list[str]]


def _table(measured: Measured, headings: Sequence[str], cells: Cells, rows: Sequence[Row] | None = None) -> str:
    """A line for each row that is measured, under the name of its group; nothing where none is."""
    lines, group = [["", *headings], ["---", *["---:"] * len(headings)]], None
    for row in measured.table.rows.values() if rows is None else rows:
        result = measured.results.get(row.name)
        if result is None:
            continue
        if row.group != group:
            group = row.group
            lines.append([f"**{group}**", *[""] * len(headings)])
        lines.append([measured.label(row), *cells(result)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if group else ""


def _main_table(measured: Measured) -> str:
    """Cost, speed, closeness and scores; of several sets the mean of the shares of the teacher's score."""
    timed, close = (next(iter(measured.sets(each)), None) for each in ("speed", "features"))
    size = measured.table.sets[timed].image_size[0] if timed else 0
    dense = measured.sets("segmentation")
    headings = ["views", "megapixels", "parameters, M", f"GMACs at {size} px", "images/s", "peak MiB"]
    headings += [f"{close}: patch cosine", f"{close}: CLS cosine"]
    headings += [f"{HEADINGS[each]}, mean share" for each in ("knn", "probe") if measured.sets(each)]
    headings += [f"{name} mIoU" for name in dense]

    def cells(result: RowResult) -> list[str]:
        found = [f"{sum(result.views.values()):,}", f"{sum(result.megapixels.values()):,.4g}"]
        found += [*_cost_cells(result, str(size)), *_speed_cells(result, timed)]
        found += [_number(result.measures(close).get(name), "{:.3f}") for name in ("patch_cosine", "cls_cosine")]
        for each in ("knn", "probe"):
            if measured.sets(each):
                found.append(_percent(mean_share(result, measured, (each,))))
        return [*found, *(_score(result, name, SCORES["segmentation"]) for name in dense)]

    return _table(measured, headings, cells)


def mean_share(result: RowResult, measured: Measured, kinds: Sequence[str] = tuple(SCORES)) -> float | None:
    """What is kept of the teacher's scores, on the average over sets and kinds; None where one is missing."""
    shares = [result.share(name, SCORES[kind]) for kind in kinds for name in measured.sets(kind)]
    return mean(shares) if shares and None not in shares else None


def _cost_cells(result: RowResult, size: str) -> list[str]:
    if size not in result.costs:
        return ["-", "-"]
    ours, theirs = result.costs[size]["student"], result.costs[size]["teacher"]
    return [
        _shared(ours.parameters, theirs.parameters, "{:.2f}", 1e-6),
        _shared(ours.macs, theirs.macs, "{:.2f}", 1e-9),
    ]


def _speed_cells(result: RowResult, of_set: str | None) -> list[str]:
    """Images a second and how many times the teacher's, memory and its share; both models taking turns."""
    ours, theirs = result.measures(of_set), result.measures(of_set, of_teacher=True)
    return [
        _with(_number(ours.get("images_per_s"), "{:.2f}"), _number(ours.get("speed_ratio"), "{:.2f} x")),
        _shared(ours.get("peak_memory_mib"), theirs.get("peak_memory_mib"), "{:.0f}"),
    ]


def _scores_table(measured: Measured, kinds: Sequence[str]) -> str:
    columns = [(name, kind) for kind in kinds for name in measured.sets(kind)]
    if not columns:
        return ""
    headings = [f"{name} {HEADINGS[kind]}{_count(measured, name)}" for name, kind in columns]
    table = _table(measured, headings, lambda r: [_score(r, name, SCORES[kind]) for name, kind in columns])
    return table + (_baseline_lines(measured, [name for name, _ in columns]) if "segmentation" in kinds else "")


def _count(measured: Measured, of_set: str) -> str:
    """On how many images rows are scored: what a share of the teacher's score can be trusted for."""
    documents = (result.documents.get(of_set) for result in measured.results.values())
    counts = {document.data["samples"]["held-out"] for document in documents if document is not None}
    return f" ({'/'.join(map(str, sorted(counts)))} images)" if counts else ""


def _baseline_lines(measured: Measured, sets: Sequence[str]) -> str:
    """What has no model, by the first row that was measured."""
    first = next(iter(measured.results.values()), None)
    lines = []
    for name in BASELINES if first else ():
        of_sets = [{row.name: row.measures for row in first.documents[each].models}.get(name, {}) for each in sets]
        lines.append([name, *(_number(of_set.get(SCORES["segmentation"]), "{:.2f}") for of_set in of_sets)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _large_table(measured: Measured) -> str:
    sets = measured.sets("speed", large=True)
    rows = [row for row in measured.table.rows.values() if row.large]
    if not sets or not rows:
        return ""
    titles = ("images/s", "peak MiB", "patch cosine", "CLS cosine", "GMACs")
    headings = [f"{title} at {one.image_size[0]} px" for one in sets.values() for title in titles]

    def cells(result: RowResult) -> list[str]:
        found = []
        for name, one in sets.items():
            ours = result.measures(name)
            found += _speed_cells(result, name)
            found += [_number(ours.get(each), "{:.3f}") for each in ("patch_cosine", "cls_cosine")]
            found.append(_cost_cells(result, str(one.image_size[0]))[1])
        return found

    return _table(measured, headings, cells, rows)


def _origin_table(measured: Measured) -> str:
    """A line for each row that is measured: its file has the rest."""
    if not measured.results:
        return ""

    def cells(result: RowResult) -> list[str]:
        machine = next(iter(result.documents.values())).machine
        minutes = sum(each["seconds"] for each in result.training) / 60
        differs = ", ".join(f"{key} {_plain(value)}" for key, value in result.options.items()) or "-"
        evaluated = sum(result.evaluation_seconds.values()) / 60
        return [
            *(f"`{result.name}`", str(result.seed), f"`{result.recipe}`", differs),
            *(f"{minutes:.1f}", f"{evaluated:.1f}"),
            *(machine["commit"] or "-", machine["device"], machine["torch"], result.looks[-1], str(len(result.looks))),
        ]

    headings = ["row", "seed", "recipe", "with", "training, min", "evaluation, min", "commit", "device", "torch"]
    return _table(measured, [*headings, "scored", "looks at test"], cells)


def _remark_list(measured: Measured) -> str:
    notes = [(row.name, row.note) for row in measured.table.rows.values() if row.note and row.name in measured.results]
    notes += [(name, remark) for name, remarks in measured.remarks.items() for remark in remarks]
    return "".join(f"- `{name}`: {text}\n" for name, text in notes)


def _score(result: RowResult, of_set: str, measure: str) -> str:
    share = result.share(of_set, measure)
    return _with(_number(result.measures(of_set).get(measure), "{:.2f}"), _percent(share))


def _shared(ours: float | None, theirs: float | None, form: str, factor: float = 1.0) -> str:
    if ours is None:
        return "-"
    return _with(form.format(ours * factor), _percent(ours / theirs if theirs else None))


def _with(value: str, share: str) -> str:
    return value if share == "-" else f"{value} ({share})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _plain(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("|", "\\|")


def _drawings(measured: Measured) -> dict[str, Callable[[], object]]:
    """What the page step draws, by the name of the file."""
    drawn = {name: r for name, r in measured.results.items() if measured.table.rows[name].drawn}
    curves = {measured.label(measured.table.rows[name]): result for name, result in drawn.items() if result.curve}
    timed, close, blocks = (next(iter(measured.sets(each)), None) for each in ("speed", "features", "blocks"))
    points = {
        measured.label(measured.table.rows[name]): (
            result.measures(timed).get("speed_ratio"),
            result.measures(close).get("patch_cosine"),
            mean_share(result, measured),
        )
        for name, result in measured.results.items()
    }
    documents = {measured.label(measured.table.rows[name]): r.documents.get(blocks) for name, r in drawn.items()}
    reports = {label: d.details["blocks"] for label, d in documents.items() if d and "blocks" in d.details}
    found: dict[str, Callable[[], object]] = {}
    if len(points) > 1:
        found["students_front.png"] = lambda: draw_front(points)
    if curves:
        found["students_curves.png"] = lambda: draw_curves(curves)
    if reports:
        found["students_blocks.png"] = lambda: draw_blocks(reports)
    return found


CAPTIONS = {
    "students_front.png": "Quality against speed, and the front of those that nobody beats in both",
    "students_curves.png": "Patch cosine on held-out images against views",
    "students_blocks.png": "Errors by block",
}


def _pictures(measured: Measured, docs: Path) -> list[str]:
    """Lines for what the page step draws, and for what lies there of rows."""
    lines = [f"![{CAPTIONS[name]}]({name})\n" for name in _drawings(measured)]
    for name in measured.results:
        for path in sorted((docs / "students").glob(f"{name}-*.png")):
            of_set, _, picture = path.stem.removeprefix(f"{name}-").rpartition("-")
            label = measured.label(measured.table.rows[name])
            lines.append(f"![{picture.capitalize()} of {of_set}: {label}](students/{path.name})\n")
    return lines


def put_into_page(page: str, text: str) -> str:
    """The page with ``text`` between its two marks.

    Raises:
        ValueError: A mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} has no place for the rows: put back the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def write_page(table: StudentTable, docs: Path) -> list[Path]:
    """Makes the tables of the page in ``docs`` and its pictures; returns what was written.

    Raises:
        ValueError: The page has no place for them, or a result cannot be read.
    """
    measured = read_measured(table, docs)
    page = put_into_page((docs / PAGE).read_text(encoding="utf-8"), render(measured, docs))
    drawn: Mapping[str, Callable[[], object]] = _drawings(measured)
    for name, draw in drawn.items():
        write_whole(docs / name, as_png(draw()))
    write_whole(docs / PAGE, page)
    return [*(docs / name for name in drawn), docs / PAGE]
