"""Build the report as one HTML page that needs no network.

Text, tables and figures go in, a string comes out. This module escapes all text except that of
figures, which their makers escape. The page's own content policy forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 1280px; padding: 0 24px 48px; }
h1 { font-size: 26px; margin: 28px 0 4px; }
h2 { font-size: 19px; margin: 36px 0 6px; border-top: 1px solid #ddd; padding-top: 14px; }
p { margin: 4px 0; max-width: 110ch; overflow-wrap: anywhere; }
.none { color: #777; font-style: italic; } .wide { overflow: auto; max-height: 620px; }
table { border-collapse: collapse; font-size: 13px; } th { position: sticky; top: 0; background: #fff; }
th { text-align: left; color: #555; font-weight: 600; white-space: nowrap; }
td, th { padding: 3px 10px 3px 0; border-bottom: 1px solid #eee; vertical-align: top; font-variant-numeric: tabular-nums; }
table.text { table-layout: fixed; width: 100%; } table.text td { white-space: pre-wrap; overflow-wrap: anywhere; }
tr.first td { background: #fff6dc; } tr.faded td { color: #999; } pre { font-size: 12px; overflow-x: auto; }
.wide td { white-space: nowrap; } .wide td:last-child { white-space: normal; min-width: 120px; }
.figure { overflow-x: auto; }
@media (max-width: 720px) {
  body { padding: 0 10px 32px; } h1 { font-size: 22px; }
  .broad > div, table.text { min-width: 640px; } .modebar { display: none !important; }
}
"""
# plotly's own button would send a chart to its maker's server
CHART_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],
}
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 70, "r": 20, "t": 30, "b": 50},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    "title": None,
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    classes: one per row, "first", "faded" or nothing. is_text: cells are whole texts, whose line
    ends are shown.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    classes: Sequence[str]
    is_text: bool = False


@dataclass(frozen=True)
class Section:
    """A heading and its content.

    body: a str in place of a figure says why there is none. height: of a figure that names none.
    is_broad: a phone scrolls the figure instead of squeezing it.
    """

    title: str
    body: Table | go.Figure | str
    caption: str = ""
    height: int = 460
    is_broad: bool = False


def plotly_script() -> str:
    """Return plotly.js, as the installed package holds it."""
    from plotly.offline import get_plotlyjs  # late: a page can show its tables before plotly is loaded

    return get_plotlyjs()


def render(title: str, facts: Sequence[str], sections: Sequence[Section], config: str) -> str:
    """Return the page. facts: lines under the title; config: shown folded at the end."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f"<script>{plotly_script()}</script></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(_paragraph(fact) for fact in facts),
        *(_section(section) for section in sections),
        f"<h2>Config</h2><details><summary>sweep_config.json</summary><pre>{escape(config)}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _section(section: Section) -> str:
    caption = _paragraph(section.caption) if section.caption else ""
    if isinstance(section.body, str):
        body, caption = f'<p class="none">{escape(f"Not shown: {section.body}.")}</p>', ""
    elif isinstance(section.body, Table):
        body = _table(section.body)
    else:
        section.body.update_layout(**LAYOUT, height=section.body.layout.height or section.height)
        figure = section.body.to_html(full_html=False, include_plotlyjs=False, config=CHART_CONFIG)
        body = f'<div class="figure{" broad" if section.is_broad else ""}">{figure}</div>'
    return f"<h2>{escape(section.title)}</h2>\n{caption}{body}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = [
        f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>'
        for row, kind in zip(table.rows, table.classes, strict=True)
    ]
    kind = ' class="text"' if table.is_text else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="{"figure" if table.is_text else "wide"}"><table{kind}>{body}</table></div>'


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
