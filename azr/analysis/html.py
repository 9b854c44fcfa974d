"""Pieces of a self-contained HTML page: headings, tables, plots as inline PNG. Nothing is fetched, no script runs."""

from __future__ import annotations

import base64
from html import escape

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d1d1f; background: #fff; max-width: 1120px; margin: 0 auto;
  padding: 24px 20px 80px; }
h1 { font-size: 1.7em; margin: 0 0 .2em; } h2 { font-size: 1.25em; margin: 2.2em 0 .4em;
  border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05em; margin: 1.4em 0 .3em; } p { margin: .5em 0; max-width: 62em; }
img { max-width: 100%; display: block; margin: .6em 0; } .quiet { color: #666; font-size: .9em; }
table { border-collapse: collapse; font-size: .88em; margin: .6em 0; } th { text-align: left; color: #555; }
th, td { padding: 3px 12px 3px 0; border-bottom: 1px solid #eee; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
.warning { background: #fff6e0; border-left: 4px solid #d99a00; padding: 6px 12px; margin: 6px 0; max-width: 62em; }
pre { background: #f6f6f4; padding: 8px 10px; font-size: .82em; line-height: 1.35; overflow-x: auto; margin: 4px 0;
  white-space: pre-wrap; } code { background: #f6f6f4; padding: 1px 4px; font-size: .9em; }
.tasks { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
.tasks h4 { margin: .4em 0 .1em; }
details { margin: .6em 0; } summary { cursor: pointer; color: #1b6ca8; }
@media (max-width: 760px) { .tasks { grid-template-columns: 1fr; } }
"""


def image(png: bytes, alt: str) -> str:
    """A PNG, inline."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'


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
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def code(text: str, lines: int = 14) -> str:
    """A text as it is, cut after some lines."""
    rows = text.strip("\n").splitlines()
    cut = rows[:lines] + (["..."] if len(rows) > lines else [])
    return f"<pre>{escape(chr(10).join(row[:200] for row in cut))}</pre>"


def details(summary: str, inside: str) -> str:
    """What a click opens; inside: HTML."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def page(title: str, parts: list[str]) -> str:
    """The whole document; parts: HTML."""
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}<title>{escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
