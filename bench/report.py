"""What a bench run leaves behind: ``results.json``, ``report.md`` and ``report.html``, one page with its pictures."""

import argparse
import base64
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from pictures import pictures
from results import Results, read_results, to_json
from sentences import Sentences
from tables import sections

from adala.files import write_json


def _inline(text: str) -> Markup:
    """The little markup of the sentences in HTML: **strong** and `code`."""
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", strong))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.jinja"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"inline": _inline, "base64": lambda text: base64.b64encode(text.encode()).decode()}


def _words(results: Results) -> dict[str, Any]:
    """What both templates say: sentences, tables by heading, and pairs of a condition and its value."""
    say = Sentences(results)
    (verdict,) = say("verdict")
    words = {"verdict": verdict, "answer": say("answer"), "sections": sections(results, say), "notes": results.notes}
    return words | {"conditions": say.conditions(), "definitions": say("definitions")}


def markdown(results: Results) -> str:
    """The report without pictures."""
    return TEMPLATES.get_template("report.md.jinja").render(_words(results))


def page(results: Results) -> str:
    """The report as one page that needs nothing from elsewhere."""
    shown = {"machine": results.machine, "pictures": pictures(results)}
    return TEMPLATES.get_template("report.html.jinja").render(_words(results) | shown)


def write_report(folder: Path, results: Results) -> None:
    """Writes ``results.json``, ``report.md`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", to_json(results))
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    (folder / "report.html").write_text(page(results), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes report.md and report.html anew from a stored results.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a results.json")
    folder = parser.parse_args(arguments).folder
    try:
        write_report(folder, read_results(folder / "results.json"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
