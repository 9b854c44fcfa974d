"""Pieces of a self-contained HTML page: sections, tables, plots as inline PNG. Nothing is fetched, no script runs.

The page is light or dark as the reader's system is. What is wider than the screen (a table, a plot, a line of code)
scrolls in its own place; nothing is cut off, and no line of code is broken.
"""

from __future__ import annotations

import base64
import struct
from html import escape

WIDE = 900  # pixels: a wider plot has several panels, which a narrow screen scrolls through instead of shrinking them
# Plots stay on white, dimmed, where the page is dark: inverted, vermilion would look like orange, and sky like blue.
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --quiet: #5f5f66; --line: #ddd; --faint: #f5f5f3;
  --link: #0072B2; --warn: #fff6e0; --edge: #d99a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #121212; --quiet: #a5a5ad; --line: #3a3a3a;
  --faint: #1f1f1f; --link: #56B4E9; --warn: #33290f; } img { filter: brightness(.85);
  border-radius: 6px; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1120px;
  margin: 0 auto; padding: 24px 20px 80px; overflow-wrap: break-word; }
h1 { font-size: 1.7em; margin: 0 0 .2em; } h3 { font-size: 1.05em; margin: 1.4em 0 .3em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .4em; border-bottom: 1px solid var(--line); }
h4 { margin: .4em 0 .1em; } p, li { max-width: 62em; } p { margin: .5em 0; } ul { padding-left: 1.3em; }
a, summary { color: var(--link); } nav ul { columns: 18em; margin: .4em 0; } details { margin: .6em 0; }
summary { cursor: pointer; } .quiet { color: var(--quiet); font-size: .9em; }
.scroll { overflow-x: auto; margin: .6em 0; } img { max-width: 100%; display: block; }
table { border-collapse: collapse; font-size: .88em; } th { text-align: left; color: var(--quiet); }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.warning { background: var(--warn); border-left: 4px solid var(--edge); padding: 6px 12px; margin: 6px 0;
  max-width: 62em; }
pre { background: var(--faint); padding: 8px 10px; font-size: .82em; line-height: 1.35; overflow-x: auto;
  margin: 4px 0; white-space: pre; tab-size: 4; }
.tasks { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
@media (max-width: 760px) { .tasks { grid-template-columns: minmax(0, 1fr); } .wide { max-width: none; width: 780px; } }
"""


def image(png: bytes, alt: str) -> str:
    """A PNG, inline."""
    (width,) = struct.unpack(">I", png[16:20])  # of the header, which every PNG begins with
    data, kind = base64.b64encode(png).decode(), " class=wide" if width > WIDE else ""
    return f'<div class=scroll><img{kind} alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}"></div>'


def paragraph(text: str, kind: str = "") -> str:
    """kind: a class of STYLE, such as "quiet"."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>"


def warning(text: str) -> str:
    """A line that is to be read first."""
    return f'<div class="warning">{escape(text)}</div>'


def bullets(lines: list[str]) -> str:
    """A list; nothing without lines."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def table(heads: list[str], rows: list[list]) -> str:
    """Cells are escaped."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def code(text: str, lines: int | None = None) -> str:
    """A text with its lines as they are; of more than `lines` the middle is left out, and the page says how many."""
    rows = text.strip("\n").splitlines()
    if lines and len(rows) > lines:
        end = lines // 3
        left_out = f"... ({len(rows) - lines} lines left out)"
        rows = [*rows[: lines - end], left_out, *rows[len(rows) - end :]]
    return f"<pre>{escape(chr(10).join(rows))}</pre>"


def details(summary: str, inside: str) -> str:
    """What a click opens; inside: HTML."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def page(title: str, top: str, sections: list[tuple[str, str]]) -> str:
    """The whole document: what stands at the top, a list of contents, the sections, (title, what is in it); all but the
    titles is HTML."""
    links = "".join(f'<li><a href="#part-{i}">{escape(name)}</a></li>' for i, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="part-{i}"><h2>{escape(name)}</h2>{inside}</section>' for i, (name, inside) in enumerate(sections)
    )
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
    return f"{head}<body><h1>{escape(title)}</h1>{top}<nav><ul>{links}</ul></nav>{body}</body></html>\n"
