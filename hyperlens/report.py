"""A comparison in words: plain text to read first, and HTML for notebooks."""

from __future__ import annotations

import base64
import html
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .audit import Decomposition, audit, largest_change, largest_step, unchanged
from .results import Comparison, Row

WIDTH = 100
MAX_TABLE_ROWS = 7
MAX_NOTES = 4
MISSING = "n/a"

Format = Callable[[float], str]

# What the per-layer table shows: heading, probe, metric, view, whether with its interval.
COLUMNS = (
    ("cosine", "drift", "cosine", "raw", False),
    ("relative L2", "drift", "relative_l2", "raw", False),
    ("ΔPR raw [95%]", "participation_ratio", "delta", "raw", True),
    ("ΔPR after final norm", "participation_ratio", "delta", "final_norm", False),
    ("lens agreement", "logit_lens", "top1_agreement", "final_norm", False),
)

PROBES = {
    "drift": "drift",
    "participation_ratio": "effective dimension",
    "logit_lens": "logit lens",
    "rank_reordering": "output ranks",
    "artefact_audit": "artefact audit",
}

CLOSING = (
    "Intervals are 95%, over whole sequences. Those of PR (participation ratio, the effective "
    "dimension) are for the ratio of the distribution the texts come from and take out that tokens "
    "of one sequence resemble each other, so they may lie to one side of the value."
)


def summary(comparison: Comparison) -> str:
    """What was compared, what changed, where, and how much of it is an artefact."""
    changed = not unchanged(comparison)
    parts = [
        _models(comparison),
        [] if changed else _no_change(comparison),
        _output(comparison),
        _layer_table(comparison) if changed else [],
        _where(comparison) if changed else [],
        _artefacts(comparison) if changed else [],
        _left_out(comparison),
        _notes(comparison),
        _paragraph(CLOSING),
    ]
    return "\n".join(line for part in parts for line in part)


def _models(comparison: Comparison) -> list[str]:
    meta = comparison.meta
    lines = [_model_line(side, meta.get(side, {})) for side in ("base", "tuned")]
    corpus = meta.get("corpus", {})
    over = [f"{corpus[k]:,} {word}" for k, word in _COUNTED if k in corpus]
    how = [f"{key} {plain(meta[key])}" for key in ("backend", "device", "dtype") if key in meta]
    blocks = f"{comparison.n_layers} blocks"
    return [*lines, *_paragraph("over   " + ", ".join([*over, blocks, *how]))]


_COUNTED = (("n_tokens", "tokens"), ("n_sequences", "sequences"))


def _model_line(side: str, model: Mapping[str, Any]) -> str:
    name, sha = plain(model.get("name", side)), plain(model.get("sha256") or "")
    facts = [plain(model[key]) for key in ("kind", "dtype") if model.get(key)]
    if sha:
        facts.append(f"sha256 {sha[:12]}")
    tail = f"  ({', '.join(facts)})"[: WIDTH // 2] if facts else ""
    return f"{side:<6} {shortened(name, WIDTH - 7 - len(tail))}{tail}"


def _no_change(comparison: Comparison) -> list[str]:
    probes = ", ".join(PROBES.get(name, plain(name)) for name in _measured(comparison))
    return _paragraph(
        f"No change: what was measured ({probes}) reads exactly as for two identical models, "
        "at every layer measured."
    )


def headline(comparison: Comparison) -> list[tuple[str, str]]:
    """(what, number with interval) of everything measured at the output."""
    wanted: tuple[tuple[str, str, str, Format, str], ...] = (
        ("same first token", "rank_reordering", "top1_agreement", percent, ""),
        ("Spearman ρ of the logits", "rank_reordering", "spearman", bounded, ""),
        ("base rank 1", "rank_reordering", "rank_1", percent, ""),
        ("2-10", "rank_reordering", "rank_2_10", percent, ""),
        (">10", "rank_reordering", "rank_gt_10", percent, ""),
        (">=200", "rank_reordering", "rank_ge_200", percent, ""),
        ("KL(tuned ‖ base)", "logit_lens", "kl", number, " nats"),
        ("entropy, base", "logit_lens", "base_entropy", number, " nats"),
        ("entropy, tuned", "logit_lens", "tuned_entropy", number, " nats"),
    )
    last = comparison.n_layers
    found = (
        (what, _row(comparison, p, m, last, "final_norm"), f, u) for what, p, m, f, u in wanted
    )
    return [(what, with_interval(row, form) + unit) for what, row, form, unit in found if row]


def _output(comparison: Comparison) -> list[str]:
    lines = _flow([f"{what} {value}" for what, value in headline(comparison)])
    if not lines:
        return [
            "",
            "Output: neither output ranks nor the logit lens was measured at the last layer.",
        ]
    return [
        "",
        "Output, teacher-forced (base rank = rank in the base model of the tuned winner)",
        *lines,
    ]


def chosen_layers(layers: Sequence[int], count: int = MAX_TABLE_ROWS) -> list[int]:
    """The first, some in between, and the last two of the layers, `count` at most."""
    if len(layers) <= count:
        return list(layers)
    inner = layers[:-1]
    spread = (round(i * (len(inner) - 1) / (count - 2)) for i in range(count - 1))
    return [*(inner[i] for i in spread), layers[-1]]


def layer_table(comparison: Comparison) -> list[list[str]]:
    """A few layers of the main metrics, the heading first; empty if none was measured."""
    selected = [
        (heading, {row.layer: row for row in comparison.select(probe, metric, view)}, ends)
        for heading, probe, metric, view, ends in COLUMNS
    ]
    columns = [column for column in selected if column[1]]
    if not columns:
        return []
    table = [["layer", "block", *(heading for heading, _, _ in columns)]]
    for layer in chosen_layers(sorted(set().union(*(rows for _, rows, _ in columns)))):
        block = "embed" if layer == 0 else str(layer - 1)
        cells = [_cell(rows.get(layer), ends) for _, rows, ends in columns]
        table.append([str(layer), block, *cells])
    return table


def _cell(row: Row | None, interval: bool) -> str:
    if row is None:
        return MISSING
    form = {"cosine": bounded, "top1_agreement": percent, "delta": signed}.get(row.metric, number)
    return with_interval(row, form) if interval else form(row.value)


def _layer_table(comparison: Comparison) -> list[str]:
    table = layer_table(comparison)
    if not table:
        return ["", "Layers: neither drift, effective dimension nor the logit lens was measured."]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in table]
    return ["", "Layer by layer (layer l is the output of block l-1)", *("  " + x for x in lines)]


def _where(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    for what, probe, metric in (
        ("relative L2", "drift", "relative_l2"),
        ("ΔPR", "participation_ratio", "delta"),
    ):
        step = largest_step(comparison, probe, metric)
        if step is None:
            continue
        form = signed if metric == "delta" else number
        lines += _paragraph(
            f"Raw {what} moves most in block {step.layer - 1} (layer {step.layer - 1} to "
            f"{step.layer}): {signed(step.change)}, from {form(step.before)} to {form(step.after)}."
        )
    most = largest_change(comparison)
    if most is not None:
        place = "the embedding" if most.layer == 0 else f"the output of block {most.layer - 1}"
        lines += _paragraph(
            f"Largest raw ΔPR: {signed(most.value)} at layer {most.layer}, {place}."
        )
    if not lines:
        return ["", "Where: not to be said, no two neighbouring layers were measured raw."]
    return ["", "Where", *lines]


def _artefacts(comparison: Comparison) -> list[str]:
    last, found = comparison.n_layers, audit(comparison)
    if not found:
        return [
            "",
            "Artefact audit: left out, it needs the last layer raw and after the final norm.",
        ]
    lines = [line for one in found for line in _artefact_lines(one, last)]
    return [
        "",
        f"Artefacts at layer {last}, read as in the paper: after the final norm, all tokens",
        *lines,
    ]


def _artefact_lines(one: Decomposition, last: int) -> list[str]:
    is_dimension = one.quantity == "participation_ratio"
    name, form = ("ΔPR", signed) if is_dimension else ("L2", number)
    total, block = form(one.total), form(one.block)
    lines = _paragraph(
        f"{name} {total} = {block} block's raw output, {signed(one.norm)} final norm, "
        f"{signed(one.sinks)} attention sinks, {signed(one.bos)} BOS."
    )
    since = f" ({signed(one.terminal_jump)} since layer {last - 1})"
    since = since if math.isfinite(one.terminal_jump) else ""
    sentence = f"Of {total} after the final norm, {block} is in the block's raw output{since}"
    if is_dimension:
        largest = max(one.parts, key=lambda part: abs(one.parts[part]))
        return lines + _paragraph(f"{sentence}; the largest part is {PARTS[largest]}.")
    return lines + _paragraph(f"{sentence}; the norm also changes the unit of L2.")


PARTS = {
    "block": "the block's own",
    "norm": "the final norm's",
    "sinks": "that of attention sinks",
    "bos": "that of BOS",
}


def _left_out(comparison: Comparison) -> list[str]:
    corpus, excluded = comparison.meta.get("corpus", {}), comparison.meta.get("excluded", {})
    words = {
        "n_bos": "BOS positions",
        "n_empty": "empty texts",
        "n_short": "texts of one token",
        "n_cut": "texts cut to length",
        "n_duplicates": "repeated sequences (kept)",
    }
    items = [f"{corpus[key]:,} {word}" for key, word in words.items() if corpus.get(key)]
    sinks: list[int] = list(excluded.get("sinks_per_layer", []))
    masked = [layer for layer, count in enumerate(sinks) if count]
    if masked:
        where = f"layer {masked[0]}" if len(masked) == 1 else f"layers {masked[0]} to {masked[-1]}"
        items.append(f"attention sinks at {where} (at most {max(sinks):,} in one)")
    elif sinks:
        items.append("no attention sinks")
    lines = _paragraph("Left out or cut: " + ", ".join(items) + ".") if items else []
    absent = [words for name, words in PROBES.items() if name not in _measured(comparison)]
    if absent:
        lines += _paragraph(f"Not measured: {', '.join(absent)}.")
    custom = [plain(name) for name in _measured(comparison) if name not in PROBES]
    if custom:
        lines += _paragraph(f"Also in the table: {', '.join(custom)}.")
    return ["", *lines]


def _notes(comparison: Comparison) -> list[str]:
    notes = [plain(note) for note in comparison.meta.get("notes", [])]
    lines = [line for note in notes[:MAX_NOTES] for line in _paragraph(f"Note: {note}")]
    if len(notes) > MAX_NOTES:
        lines += _paragraph(f"... and {len(notes) - MAX_NOTES} more notes in meta['notes'].")
    return lines


def notebook_html(comparison: Comparison) -> str:
    """The same as self-contained HTML: headline, a few layers, the figure, the whole summary.

    Readable on light and dark pages; pure ASCII, so that it is right in any encoding.
    """
    from .plots import plot_layers, png

    picture = base64.b64encode(png(plot_layers(comparison))).decode("ascii")
    names = [
        shortened(plain(comparison.meta.get(s, {}).get("name", s)), 60) for s in ("base", "tuned")
    ]
    title = " → ".join(names)
    text = (
        f'<div style="max-width:1000px"><h3>{html.escape(title)}</h3>'
        f"{'' if not unchanged(comparison) else '<p><b>No change.</b></p>'}"
        f"{_html_table([('at the output', 'value [95%]'), *headline(comparison)])}"
        f"{_html_table(layer_table(comparison))}"
        f'<img alt="change along the layers" src="data:image/png;base64,{picture}" '
        'style="width:100%;background:#fff;border-radius:6px">'
        f"<details><summary>Summary</summary><pre>{html.escape(summary(comparison))}</pre></details></div>"
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) < 2:
        return ""
    cells = [[html.escape(cell) for cell in row] for row in rows]
    # No colours of our own: the table takes the page's, light or dark.
    style = 'style="padding:2px 10px;text-align:right"'
    head = "".join(f"<th {style}>{cell}</th>" for cell in cells[0])
    body = "".join(
        "<tr>" + "".join(f"<td {style}>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def number(x: float) -> str:
    """Three significant digits."""
    if not math.isfinite(x):
        return MISSING
    x = float(f"{x:.3g}")
    size = math.floor(math.log10(abs(x))) if x else 2
    return f"{x:,.{max(0, 2 - size)}f}" if -4 <= size < 6 else f"{x:.1e}"


def signed(x: float) -> str:
    """Three significant digits and always a sign, but for zero."""
    return f"+{number(x)}" if x > 0 else number(x)


def bounded(x: float) -> str:
    """Three decimals of a number up to 1; what is not quite 1 never reads as 1."""
    text = f"{round(x, 3) + 0.0:.3f}" if math.isfinite(x) else MISSING
    return ">0.999" if text == "1.000" and x < 1 else text


def percent(x: float) -> str:
    """A share as a percentage; what is not quite all or none never reads as such."""
    text = f"{100 * x:.1f}%" if math.isfinite(x) else MISSING
    if text == "100.0%" and x < 1:
        return ">99.9%"
    return "<0.1%" if text == "0.0%" and x > 0 else text


def with_interval(row: Row, form: Format) -> str:
    """A number and, where there is one, its interval."""
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return form(row.value)
    return f"{form(row.value)} [{form(row.low)}, {form(row.high)}]"


def plain(text: object) -> str:
    """Any text on one line, unprintable characters replaced."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def shortened(text: str, width: int) -> str:
    """Text with its middle left out where it is too long; both ends of a path tell something."""
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _flow(items: Iterable[str]) -> list[str]:
    """Items side by side, as many to a line as fit; none is broken."""
    glued = "    ".join(item.replace(" ", "\u00a0") for item in items)
    lines = textwrap.wrap(glued, WIDTH - 2, break_on_hyphens=False)
    return ["  " + line.replace("\u00a0", " ") for line in lines]


def _measured(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.probe for row in comparison.rows))


def _row(comparison: Comparison, probe: str, metric: str, layer: int, view: str) -> Row | None:
    rows = comparison.select(probe, metric, view)
    return next((row for row in rows if row.layer == layer), None)
