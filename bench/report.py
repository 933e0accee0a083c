"""What a bench run leaves behind: ``results.json``, ``report.md`` and ``report.html``, one page with its pictures."""

import argparse
import base64
import html
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pictures import Lines, draw_lines, draw_scatter, draw_stack
from results import Results, read_results, resolutions, row_of, write_results
from sentences import DEFINITIONS, answer, conditions, verdict
from tables import Table, sections


def line_data(results: Results, value: str) -> Lines:
    """(tokens, value) by mechanism, of rows that have it."""
    lines: Lines = {}
    for row in results.rows:
        if row.tokens and getattr(row, value):
            lines.setdefault(row.mechanism, []).append((row.tokens, getattr(row, value)))
    return lines


def sweep_lines(results: Results, scope: str) -> Lines:
    lines: Lines = {}
    for row in results.sweep:
        # No mixing at all is a thousand times faster than mixing, which would leave the others no room.
        if row.scope == scope and row.ratio_vs_softmax and (scope, row.mechanism) != ("operator", "none"):
            lines.setdefault(row.mechanism, []).append((row.tokens, row.ratio_vs_softmax))
    return lines


def pictures(results: Results) -> list[tuple[str, str]]:
    """Captions and SVGs, those that there are data for."""
    found = []
    throughput = line_data(results, "throughput_img_s")
    if throughput:
        found.append(("Throughput against tokens (higher is better).", draw_lines(throughput, "images/s (log scale)")))
    if throughput and "softmax" in throughput:
        speeds = line_data(results, "ratio_vs_softmax")
        caption = "The same against softmax: above 1 a mechanism is worth it."
        found.append((caption, draw_lines(speeds, "speed against softmax (log scale)", level=1.0)))
    for scope, words in (("network", "whole network"), ("operator", "mixing of one layer alone")):
        lines = sweep_lines(results, scope)
        if lines:
            caption = f"Sweep over token counts, {words}: where a line crosses 1, the mechanism begins to pay."
            found.append((caption, draw_lines(lines, "speed against softmax (log scale)", level=1.0)))
    memory = line_data(results, "activations_mib")
    if memory:
        caption = "Memory for activations against tokens (lower is better); weights come on top."
        found.append((caption, draw_lines(memory, "activations, MiB (log scale)")))
        largest = [row for row in results.rows if row.res == resolutions(results)[-1] and row.activations_mib]
        found.append(
            (
                f"Weights and activations at {largest[0].res} px.",
                draw_stack(
                    [row.mechanism for row in largest],
                    [row.weights_mib for row in largest],
                    [row.activations_mib for row in largest],
                    "MiB",
                ),
            )
        )
    points, res = accuracy_points(results)
    if points:
        caption = (
            f"Accuracy against speed: top-1 on recipe {results.machine.get('recipe', 'tiny')} (another, smaller "
            f"network) over images/s of {results.machine.get('backbone')} at {res} px."
        )
        found.append((caption, draw_scatter(points, f"images/s at {res} px", "top-1 (%)")))
    return found


def accuracy_points(results: Results) -> tuple[dict[tuple[str, str], tuple[float, float]], int]:
    """(images/s at the largest resolution, top-1) by mechanism and conversion, and that resolution."""
    points = {}
    res = resolutions(results)[-1] if results.rows else 0
    for row in results.accuracy:
        timed = row_of(results, row.mechanism, res)
        if row.top1 is not None and timed is not None and timed.throughput_img_s:
            points[row.mechanism, row.conversion] = (timed.throughput_img_s, row.top1)
    return points, res


def markdown(results: Results) -> str:
    """The report without pictures."""
    parts = [
        "# Is linear attention worth it?",
        "",
        f"**{verdict(results)}**",
        "",
        *[f"- {sentence}" for sentence in answer(results)],
    ]
    for heading, tables in sections(results):
        parts += ["", f"## {heading}"]
        for table in tables:
            parts += ["", f"### {table.title}", "", *_markdown_table(table)]
            parts += ["", table.note] if table.note else []
    parts += ["", "## Conditions", "", *[f"- {key}: {value}" for key, value in conditions(results)]]
    parts += [f"- {note}" for note in results.notes]
    parts += ["", "## How to read it", "", *[f"- {text}" for text in DEFINITIONS]]
    return "\n".join(parts) + "\n"


def _markdown_table(table: Table) -> list[str]:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-bottom: 1px solid #ccc; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.05rem; }
.lead { color: #555; margin-top: 0; }
.verdict { font-size: 1.25rem; font-weight: 600; margin: 1.2rem 0 .8rem; }
.answer { background: #f5f3ee; border-left: 5px solid #c8102e; padding: .6rem 1.2rem .6rem 2.2rem; }
.answer li { margin: .45rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { border-bottom: 2px solid #999; font-weight: 600; white-space: normal; vertical-align: bottom; max-width: 6.5rem; }
th:first-child, td:first-child { text-align: left; }
td.said { text-align: left; white-space: normal; max-width: 26rem; }
tr.strong td { background: #f3f3f3; font-weight: 600; }
tr.red td { background: #fde3e3; color: #8c0000; }
.note { color: #555; font-size: .86rem; max-width: 60rem; margin: .4rem 0 0; }
figure { display: inline-block; margin: 1rem 1rem 0 0; width: 560px; max-width: 100%; vertical-align: top; }
figure img { width: 100%; } figcaption { font-size: .9rem; color: #333; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; }
"""


def page(results: Results) -> str:
    """The report as one page that needs nothing from elsewhere."""
    machine = results.machine
    lead = (
        f"{machine.get('backbone')} on {machine.get('device')}, {machine.get('dtype')}, batch {machine.get('batch')}, "
    )
    lead += f"protocol {machine.get('protocol')}, {machine.get('date')}"
    parts = ["<h1>Is linear attention worth it?</h1>", f'<p class="lead">{html.escape(lead)}</p>']
    parts.append(f'<p class="verdict">{html.escape(verdict(results))}</p>')
    parts += ['<ul class="answer">', *[f"<li>{_inline(sentence)}</li>" for sentence in answer(results)], "</ul>"]
    drawn = [
        f'<figure><img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(svg.encode()).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for caption, svg in pictures(results)
    ]
    for index, (heading, tables) in enumerate(sections(results)):
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for table in tables:
            parts += [f"<h3>{html.escape(table.title)}</h3>", _html_table(table)]
            parts += [f'<p class="note">{html.escape(table.note)}</p>'] if table.note else []
        if index == 0 and drawn:
            parts += ["<h2>Pictures</h2>", *drawn]
    pairs = [f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in conditions(results)]
    parts += ["<h2>Conditions</h2>", "<dl>", *pairs, "</dl>"]
    parts += ["<ul>", *[f"<li>{html.escape(note)}</li>" for note in results.notes], "</ul>"] if results.notes else []
    parts += ["<h2>How to read it</h2>", "<ul>", *[f"<li>{_inline(text)}</li>" for text in DEFINITIONS], "</ul>"]
    head = f'<meta charset="utf-8"><title>Is linear attention worth it?</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text: str) -> str:
    """The little markup of the sentences above: **strong** and `code`."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _html_table(table: Table) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell.strip())}</th>" for cell in table.header) + "</tr>"]
    for index, row in enumerate(table.rows):
        mark = f' class="{table.marked[index]}"' if index in table.marked else ""
        cells = [
            f'<td class="said">{html.escape(cell)}</td>' if name == "" else f"<td>{html.escape(cell)}</td>"
            for name, cell in zip(table.header, row, strict=True)
        ]
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def write_report(folder: Path, results: Results) -> None:
    """Writes ``results.json``, ``report.md`` and ``report.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", results)
    (folder / "report.md").write_text(markdown(results))
    (folder / "report.html").write_text(page(results))


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
