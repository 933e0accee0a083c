"""What an evaluation leaves behind: ``evaluation.json``, ``evaluation.md`` and ``evaluation.html``, one page.

A number that there is not is None, in tables a dash, never 0. What a model keeps of the teacher's score always stands
beside how fast it is against the teacher, at the same size.
"""

import base64
import dataclasses
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from adala.files import read_json, write_json, write_whole
from adala.machine import machine_description, now

__all__ = [
    "EvaluationDocument",
    "ModelRow",
    "Picture",
    "kept",
    "machine_description",
    "parse_document",
    "read_document",
    "tables",
    "to_html",
    "to_json",
    "to_markdown",
    "write_document",
]

SPEED, MEMORY, SPEEDUP = "images_per_s", "peak_memory_mib", "speed_ratio"
# How fast a model was in its slow and its fast fifth of rounds.
SPREAD = {"images_per_s_p20": "p20", "images_per_s_p80": "p80"}
OF_SPEED = (SPEED, *SPREAD, SPEEDUP, MEMORY)
# By the last word of a measure's name. Of scores in percent a share of the teacher's is kept; others (the error of a
# depth, say) stand in the table as they are.
PERCENT = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "accuracy": "accuracy", "map": "mAP", "f1": "F1"}
# How the names of measures end that compare features with the teacher's.
CLOSENESS = ("cosine", "relative_error")
WORDS, NOTHING = ("model", "mechanism"), "-"
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --dim: #555; --line: #ddd; --strong: #f1f1ee; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181c; --dim: #a5a5a5; --line: #3a3d44; --strong: #24272e; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1180px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem; }
.lead, .note, figcaption, dt { color: var(--dim); } .note, figcaption, dl { font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--dim); vertical-align: bottom; white-space: normal; max-width: 7rem; }
.said { text-align: left; }
tr.teacher td { background: var(--strong); font-weight: 600; } tr.baseline td { color: var(--dim); }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; background: #fff; }
pre { background: var(--strong); padding: .7rem 1rem; overflow-x: auto; font-size: .86rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """What was measured of one model, or of a baseline that has none.

    Attributes:
        name: Which one; no two rows of a document have the same.
        origin: Where it is from: a folder and the digest of its weights, or how a baseline was fitted.
        mechanism: Of its attention; None for a baseline without a model (majority class, colour table).
        measures: By flat name, whose last word says what it is: ``knn20_top1``, ``probe_top1``, ``miou`` (scores, in
            percent), ``feature_cosine``, ``relative_error``, ``images_per_s`` (with ``_p20`` and ``_p80``),
            ``peak_memory_mib``, and ``speed_ratio``, how many times as fast as the teacher it was in the same round.
            None where there is no number; one that is not finite becomes None, with a note.
        notes: Sentences about this row.
    """

    name: str
    origin: str
    mechanism: str | None
    measures: dict[str, float | None]
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        measures = {name: None if value is None else float(value) for name, value in self.measures.items()}
        broken = [name for name, value in measures.items() if value is not None and not math.isfinite(value)]
        notes = [*self.notes, *(f"{name} was {measures[name]}, which is no result" for name in broken)]
        object.__setattr__(self, "measures", measures | dict.fromkeys(broken))
        object.__setattr__(self, "notes", notes)


@dataclasses.dataclass(frozen=True)
class EvaluationDocument:
    """Models compared under one protocol, on the same data, on one machine.

    Attributes:
        title: Heading.
        command: What was typed.
        machine: See :func:`adala.machine.machine_description`.
        protocol: See :func:`adala.protocol.describe`.
        data: What was evaluated on: shards, digests, numbers of samples, ``image_size``.
        models: Rows in the order of the tables.
        created: When, in UTC.
        teacher: Name of the row that the others are held against.
        details: What is in no table (errors by block, IoU by class): in the JSON alone.
    """

    title: str
    command: str
    machine: dict[str, Any]
    protocol: dict[str, Any]
    data: dict[str, Any]
    models: list[ModelRow]
    created: str = dataclasses.field(default_factory=now)
    teacher: str = "teacher"
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [row.name for row in self.models]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"two models are called {twice[0]}: give each a name of its own")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: Of its file, without ``.png``.
        caption: A sentence below it.
        png: The file's contents.
    """

    name: str
    caption: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text, as every form of the document has them.

    Attributes:
        title: Heading.
        note: A sentence below it.
        columns: By heading, a cell for each model; those of ``WORDS`` are words, the others numbers.
    """

    title: str
    note: str
    columns: dict[str, list[str]]

    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*self.columns.values(), strict=True))


def kept(document: EvaluationDocument) -> dict[str, dict[str, float | None]]:
    """By model, each score as a ratio to the teacher's, and the ratios of speed and memory beside them.

    Ratios are fractions of 1; None where the model or the teacher has no number, or the teacher's is 0. That of speed
    is ``speed_ratio`` where it was measured, since a machine that slows down in between has no part in it.
    """
    teacher = next((row.measures for row in document.models if row.name == document.teacher), {})
    names = [name for name in _names(document) if _last_word(name) in PERCENT]
    found = {}
    for row in document.models:
        found[row.name] = {name: _ratio(row.measures.get(name), teacher.get(name)) for name in (*names, SPEED, MEMORY)}
        if teacher and row.measures.get(SPEEDUP) is not None:
            found[row.name][SPEED] = row.measures[SPEEDUP]
    return found


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def _names(document: EvaluationDocument) -> list[str]:
    """Names of everything that was measured, in the order in which rows bring them up."""
    return list(dict.fromkeys(name for row in document.models for name in row.measures))


def _last_word(name: str) -> str:
    return name.rpartition("_")[2]


def _heading(name: str) -> str:
    """``knn20_top1`` is kNN 20 top-1."""
    words = re.sub(r"^knn(\d+)", r"kNN_\1", name).split("_")
    return " ".join([*words[:-1], PERCENT.get(words[-1], words[-1])])


def tables(document: EvaluationDocument) -> list[Table]:
    """Scores, what is kept of the teacher's, closeness of features, speed; without what has no number in them."""
    size = document.data.get("image_size")
    at_size = f" at {size[0]} x {size[1]} px" if isinstance(size, list | tuple) and len(size) == 2 else ""
    names = [name for name in _names(document) if name not in OF_SPEED]
    scores = [name for name in names if not name.endswith(CLOSENESS)]
    close = [name for name in names if name.endswith(CLOSENESS)]
    faster, leaner = (_ratios(document, name, "{:.2f} x") for name in (SPEED, MEMORY))
    speed = {label: _measured(document, name, "{:,.1f}") for name, label in {SPEED: "images/s", **SPREAD}.items()}
    speed |= {"to the teacher's": faster}
    memory = {"peak MiB": _measured(document, MEMORY, "{:,.0f}"), "MiB to the teacher's": leaner}
    shares = {
        _heading(name): _ratios(document, name, "{:.1f} %", 100) for name in scores if _last_word(name) in PERCENT
    }
    found = [
        (
            "Scores",
            "Accuracies and IoU are in percent.",
            {_heading(n): _measured(document, n, _form(n)) for n in scores},
        ),
        (
            "Kept of the teacher's scores",
            f"Each score over the teacher's, beside images per second{at_size} over the teacher's.",
            # A share stands nowhere without what it was exchanged for, if only to say that this is not known.
            shares | {"images/s": faster} if _told(shares) else {},
        ),
        (
            "Features against the teacher's",
            "Cosines are means over tokens; errors are relative.",
            {_heading(name): _measured(document, name, "{:.4f}") for name in close},
        ),
        (f"Speed{at_size}", "", speed | memory),
    ]
    found = [(title, note, columns) for title, note, columns in found if _told(columns)]
    return [_table(document, *parts, is_first=parts is found[0]) for parts in found]


def _measured(document: EvaluationDocument, name: str, form: str) -> list[str]:
    return [_shown(row.measures.get(name), form) for row in document.models]


def _ratios(document: EvaluationDocument, name: str, form: str, factor: float = 1.0) -> list[str]:
    return [_shown(ratios[name], form, factor) for ratios in kept(document).values()]


def _shown(value: float | None, form: str, factor: float = 1.0) -> str:
    return NOTHING if value is None else form.format(factor * value)


def _form(name: str) -> str:
    return "{:.2f}" if _last_word(name) in PERCENT else "{:.4g}"


def _told(columns: Mapping[str, list[str]]) -> list[str]:
    """Headings of the columns that say something."""
    return [heading for heading, cells in columns.items() if set(cells) - {NOTHING}]


def _table(document: EvaluationDocument, title: str, note: str, columns: dict[str, list[str]], is_first: bool) -> Table:
    """Without rows and columns that say nothing; the first table also says which mechanism a model has."""
    told = {heading: cells for heading, cells in columns.items() if heading in _told(columns) or heading == "images/s"}
    says = [set(cells) != {NOTHING} for cells in zip(*told.values(), strict=True)]
    mechanisms = {"mechanism": [row.mechanism or NOTHING for row in document.models]} if is_first else {}
    whole = {"model": [row.name for row in document.models]} | mechanisms | told
    return Table(title, note, {heading: list(compress(cells, says)) for heading, cells in whole.items()})


def to_json(document: EvaluationDocument) -> dict[str, Any]:
    """The document as JSON; ``kept`` is :func:`kept`, for readers who do not want to divide."""
    return _finite({**dataclasses.asdict(document), "kept": kept(document)})


def _finite(value: Any) -> Any:
    """A JSON value whose numbers that are not finite are null: a student that diverged must not cost the document."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_document(path: Path) -> EvaluationDocument:
    """The document that :func:`write_document` left at ``path``.

    Raises:
        ValueError: There is none, or the file holds something else.
    """
    return parse_document(read_json(path), path)


def parse_document(stored: Any, path: Path) -> EvaluationDocument:
    """The document that :func:`to_json` has made, which was read from ``path``.

    Raises:
        ValueError: It is something else.
    """
    try:
        values = {name: value for name, value in stored.items() if name != "kept"}
        return EvaluationDocument(**{**values, "models": [ModelRow(**row) for row in values["models"]]})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of an evaluation: name an evaluation.json") from error


def to_markdown(document: EvaluationDocument, pictures: Sequence[Picture] = ()) -> str:
    """The document as Markdown, whose tables are aligned for a terminal, too; pictures are files beside it."""
    lines = [f"# {_plain(document.title)}", "", document.created]
    for table in tables(document):
        lines += ["", f"## {table.title}", "", *_markdown_rows(table)]
        lines += ["", table.note] if table.note else []
    lines += ["", *(f"- {_plain(name)}: {_plain(note)}" for name, note in _notes(document))] if _notes(document) else []
    for picture in pictures:
        lines += ["", f"![{_plain(picture.caption)}]({picture.name}.png)"]
    lines += ["", "## Command", "", *(f"    {line}" for line in document.command.splitlines())]
    for title, values in _conditions(document):
        lines += ["", f"## {title}", "", *(f"- {_plain(name)}: {_plain(value)}" for name, value in values)]
    return _printable("\n".join(lines) + "\n")


def _markdown_rows(table: Table) -> list[str]:
    columns = []
    for heading, cells in table.columns.items():
        cells = [_plain(cell) for cell in (heading, *cells)]
        width = max(3, *map(len, cells))
        adjust, rule = (str.ljust, "-" * width) if heading in WORDS else (str.rjust, "-" * (width - 1) + ":")
        padded = [adjust(cell, width) for cell in cells]
        columns.append([padded[0], rule, *padded[1:]])
    return [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]


def _plain(text: str) -> str:
    """Text of one line that Markdown shows as it is."""
    return re.sub(r"([\\|`*\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _printable(text: str) -> str:
    # What the locale cannot read comes as a lone surrogate (a folder's name, say), and UTF-8 has none.
    return text.encode(errors="replace").decode()


def _notes(document: EvaluationDocument) -> list[tuple[str, str]]:
    return [(row.name, note) for row in document.models for note in row.notes]


def _conditions(document: EvaluationDocument) -> list[tuple[str, list[tuple[str, str]]]]:
    """Headings, and names and values below them."""
    origins = [(row.name, row.origin) for row in document.models]
    found = [("Protocol", document.protocol), ("Data", document.data), ("Machine", document.machine)]
    return [("Models", origins), *((title, list(_flat(values))) for title, values in found if values)]


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Values as text by dotted name, those that there are."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{above}{name}", ", ".join(map(_said, value)) or NOTHING
        elif value is not None:
            yield f"{above}{name}", _said(value)


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def to_html(document: EvaluationDocument, pictures: Sequence[Picture] = ()) -> str:
    """The document as one page that needs nothing from elsewhere."""
    say = html.escape
    body = [f"<h1>{say(document.title)}</h1>", f'<p class="lead">{say(_lead(document))}</p>']
    for table in tables(document):
        body += [f"<h2>{say(table.title)}</h2>", *_html_table(document, table)]
        body += [f'<p class="note">{say(table.note)}</p>'] if table.note else []
    if notes := _notes(document):
        body += ["<ul>", *(f"<li>{say(name)}: {say(note)}</li>" for name, note in notes), "</ul>"]
    for picture in pictures:
        source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
        caption = say(picture.caption)
        body.append(f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>')
    body += ["<h2>Command</h2>", f"<pre>{say(document.command)}</pre>"]
    for title, values in _conditions(document):
        entries = [f"<dt>{say(name)}</dt><dd>{say(value)}</dd>" for name, value in values]
        body += [f"<h2>{say(title)}</h2>", "<dl>", *entries, "</dl>"]
    head = f'<meta charset="utf-8"><title>{say(document.title)}</title><style>{_STYLE}</style>'
    page = ["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>"]
    return _printable("\n".join(page) + "\n")


def _lead(document: EvaluationDocument) -> str:
    named = [f"protocol {document.protocol['name']}"] if "name" in document.protocol else []
    on = [str(document.machine["device"])] if "device" in document.machine else []
    return ", ".join([*named, *on, document.created])


def _html_table(document: EvaluationDocument, table: Table) -> list[str]:
    sides = [' class="said"' if heading in WORDS else "" for heading in table.columns]

    def line(tag: str, cells: Iterable[str]) -> str:
        return "".join(f"<{tag}{side}>{html.escape(cell)}</{tag}>" for cell, side in zip(cells, sides, strict=True))

    kinds = {row.name: _kind(document, row) for row in document.models}
    rows = [f'<tr class="{kinds[cells[0]]}">{line("td", cells)}</tr>' for cells in table.rows()]
    return ['<div class="scroll"><table>', f"<tr>{line('th', table.columns)}</tr>", *rows, "</table></div>"]


def _kind(document: EvaluationDocument, row: ModelRow) -> str:
    if row.name == document.teacher:
        return "teacher"
    return "baseline" if row.mechanism is None else "student"


def write_document(folder: Path, document: EvaluationDocument, pictures: Sequence[Picture] = ()) -> None:
    """Writes ``evaluation.html``, ``evaluation.md`` and the pictures; when all are there, ``evaluation.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_whole(folder / f"{picture.name}.png", picture.png)
    write_whole(folder / "evaluation.html", to_html(document, pictures))
    write_whole(folder / "evaluation.md", to_markdown(document, pictures))
    write_json(folder / "evaluation.json", to_json(document))
