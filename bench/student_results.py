"""What is kept of a row: one JSON file, whole or absent, of which the page is made; and what was tried on val."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adala.evaluation_report import EvaluationDocument, kept, parse_document, to_json
from adala.files import read_json, write_json

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class Cost:
    """Of one image of some size: tokens, parameters of the network, multiply-accumulates."""

    tokens: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class RowResult:
    """A row as it was trained and scored.

    Attributes:
        name: Of the row.
        split: Of which samples the scores are.
        recipe: Its name.
        options: What the row gives beside the recipe's values.
        conditions: Everything that decides the student, by recipe key.
        seed: Of the run.
        weights: What identifies the student; see :class:`adala.contenders.Contender`.
        views: Training images by stage.
        megapixels: Of these images together, as the model saw them, in units of 1,000,000 pixels, by stage.
        training: Every start of the training command; see :func:`student_training.attempts`.
        commands: Of the training, as they can be typed.
        curve: By stage, what the run measured on its held-out samples while it trained: ``views`` since the run began,
            ``step``, ``split``, and the measures.
        costs: By side of the image in pixels, of the ``student`` and the ``teacher``.
        documents: By set, everything that was measured there, with its command, machine, protocol and data.
        evaluation_seconds: By set, of the process.
        identity: Digest of student, samples and protocol.
        looks: When the samples of ``split`` were looked at for this row, in UTC.
        schema: Of this file.
    """

    name: str
    split: str
    recipe: str
    options: dict[str, Any]
    conditions: dict[str, Any]
    seed: int
    weights: str
    views: dict[str, int]
    megapixels: dict[str, float]
    training: list[dict[str, Any]]
    commands: list[str]
    curve: dict[str, list[dict[str, Any]]]
    costs: dict[str, dict[str, Cost]]
    documents: dict[str, EvaluationDocument]
    evaluation_seconds: dict[str, float]
    identity: str
    looks: list[str]
    schema: int = field(default=1)

    def measures(self, of_set: str, of_teacher: bool = False) -> dict[str, float | None]:
        """What was measured of the row on a set, or of the teacher beside it; nothing where it was not."""
        document = self.documents.get(of_set)
        if document is None:
            return {}
        return (document.models[0] if of_teacher else _own(document)).measures

    def share(self, of_set: str, measure: str) -> float | None:
        """What a measure is of the teacher's of the same evaluation, as a fraction of 1."""
        document = self.documents.get(of_set)
        return None if document is None else kept(document)[_own(document).name].get(measure)

    def data(self) -> dict[str, list[str | None]]:
        """Digests of the samples, by set: to fit on, and to score on."""
        return {name: [one.data["train_digest"], one.data["held_out_digest"]] for name, one in self.documents.items()}


def _own(document: EvaluationDocument) -> Any:
    """A row's own line: the model beside the teacher, or the teacher where that is the row."""
    models = [row for row in document.models if row.mechanism is not None]
    return models[-1]


def results_folder(docs: Path) -> Path:
    return docs / "results" / "students"


def write_result(path: Path, result: RowResult) -> None:
    """Writes a row's file, without anybody's home in it."""
    stored = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    stored["costs"] = {s: {w: dataclasses.asdict(c) for w, c in of.items()} for s, of in result.costs.items()}
    stored["documents"] = {name: to_json(document) for name, document in result.documents.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, without_home(stored))


def read_result(path: Path) -> RowResult | None:
    """The row that was written at ``path``; None where there is none.

    Raises:
        ValueError: The file holds something else.
    """
    stored = read_json(path)
    if stored is None:
        return None
    try:
        costs = {size: {who: Cost(**cost) for who, cost in of.items()} for size, of in stored["costs"].items()}
        documents = {name: parse_document(document, path) for name, document in stored["documents"].items()}
        return RowResult(**{**stored, "costs": costs, "documents": documents})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of a row: restore it, or remove it and evaluate anew") from error


def without_home(stored: Any) -> Any:
    """A JSON value in which paths below the home folder are everybody's."""
    return json.loads(json.dumps(stored).replace(f"{Path.home()}/", "~/"))


def tried_path(docs: Path) -> Path:
    return docs / "results" / "tried.jsonl"


def append_tried(docs: Path, row: dict[str, Any]) -> None:
    """Adds a line to the list of what was tried on val; nothing there is ever changed."""
    path = tried_path(docs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(without_home(row), allow_nan=False) + "\n")


def read_tried(docs: Path) -> list[dict[str, Any]]:
    path = tried_path(docs)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
