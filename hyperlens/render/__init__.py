"""Results for readers: text, notebook HTML, and one self-contained page.

A page is made of sections, one file each in `sections/`. A section module has

- `ORDER`: where it stands on the page;
- `TITLE`: the question it answers;
- `READS`: the name of the results it shows ("comparison", or the `name` of a `Result`);
- `LOADS`: "module:Class" of that finding, for reading it back from a folder (not for comparisons);
- `body(results)`: the section from all results of that name, as `Markup`.

On a page no two results of one name have the same `pair_name`: series of charts and columns of
tables go by it, and `labels` sees to it. Bodies are built from `parts` (`paragraph`, `table`,
`details`, ...) and `charts`, which escape whatever text they are given. A finding without a section
of its own is shown by `plain`: its summary, figure and table.
"""

from __future__ import annotations

from .notebook import notebook_html
from .page import write_report
from .words import summary

__all__ = ["notebook_html", "summary", "write_report"]
