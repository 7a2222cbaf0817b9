"""A comparison as HTML for notebooks: the output, a few layers, the figure, the summary."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from ..results.audit import unchanged
from ..results.comparison import Comparison
from .words import headline, layer_table, names, summary


def notebook_html(comparison: Comparison) -> str:
    """The same as self-contained HTML: the output, a few layers, the figure, the whole summary.

    It takes the page's colours, light or dark, and is pure ASCII, so right in any encoding.
    """
    from .plots import plot_layers, png

    picture = base64.b64encode(png(plot_layers(comparison), dpi=110)).decode("ascii")
    text = (
        f"<h3>{html.escape(' → '.join(names(comparison, 60)))}</h3>"
        f"{'<p><b>No change.</b></p>' if unchanged(comparison) else ''}"
        f"{_html_table([('output', 'value [95%]'), *headline(comparison)])}"
        f"{_html_table(layer_table(comparison))}"
        f'<img alt="change along the layers" src="data:image/png;base64,{picture}" '
        'style="max-width:100%;background:#fff;border-radius:6px">'
        f"<details><summary>In words</summary>"
        f"<pre>{html.escape(summary(comparison))}</pre></details>"
    )
    return f"<div>{text}</div>".encode("ascii", "xmlcharrefreplace").decode("ascii")


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{'</tr><tr>'.join(cells)}</tr></table>" if rows[1:] else ""
