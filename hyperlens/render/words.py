"""A comparison in words: plain text to read first, and how its numbers are written."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from ..results.audit import Decomposition, audit, largest_change, largest_step, unchanged
from ..results.comparison import Comparison, Row

WIDTH, MAX_TABLE_ROWS, MAX_NOTES = 100, 7, 4
MISSING = "n/a"

PROBES = {
    "drift": "drift",
    "participation_ratio": "effective dimension",
    "logit_lens": "logit lens",
    "rank_reordering": "output ranks",
    "artefact_audit": "last layer with sinks and BOS",
}
HEADLINE = {
    "same first token": ("rank_reordering", "top1_agreement"),
    "Spearman ρ of the logits": ("rank_reordering", "spearman"),
    "token of base rank 1": ("rank_reordering", "rank_1"),
    "2-10": ("rank_reordering", "rank_2_10"),
    ">10": ("rank_reordering", "rank_gt_10"),
    ">=200": ("rank_reordering", "rank_ge_200"),
    "KL(tuned ‖ base)": ("logit_lens", "kl"),
    "entropy, base": ("logit_lens", "base_entropy"),
    "entropy, tuned": ("logit_lens", "tuned_entropy"),
}
NATS = ("kl", "base_entropy", "tuned_entropy")
TABLE = {
    "cosine": ("drift", "cosine", "raw"),
    "relative L2": ("drift", "relative_l2", "raw"),
    "ΔPR raw [95%]": ("participation_ratio", "delta", "raw"),
    "ΔPR final norm": ("participation_ratio", "delta", "final_norm"),
    "lens agrees": ("logit_lens", "top1_agreement", "final_norm"),
}
EXCLUSIONS = {
    "n_bos": "BOS positions",
    "n_empty": "empty texts",
    "n_short": "one-token texts",
    "n_cut": "the ends of long texts",
}
NO_AUDIT = "left out: it needs the last layer raw, after the final norm, and with sinks and BOS"
NO_CHANGE = "No change: everything measured reads exactly as for two identical models."
READING = "layer {} as the paper reads it, after the final norm, all tokens:"
CLOSING = (
    "Intervals are 95%, over whole sequences. Those of PR (participation ratio, the effective "
    "dimension) are for the ratio of the distribution the texts come from and take out that tokens "
    "of one sequence resemble each other, so they may lie to one side of the value."
)


def summary(comparison: Comparison) -> str:
    """What was compared, what changed, where, and how much of it is an artefact."""
    if unchanged(comparison):
        body = [*_lines("result", NO_CHANGE), *_output(comparison)]
    else:
        body = [*_output(comparison), "", *_layer_lines(comparison), ""]
        body += [*_where(comparison), *_artefacts(comparison)]
    lines = [*_models(comparison), "", *body, "", *_left_out(comparison), *_notes(comparison)]
    return "\n".join([*lines, *_lines("", CLOSING)])


def names(comparison: Comparison, width: int) -> list[str]:
    """Both models' names; of long ones both ends, because both ends of a path tell something."""
    whole = [plain(comparison.meta.get(s, {}).get("name", s)) for s in ("base", "tuned")]
    half = width // 2
    return [n if len(n) <= width else f"{n[: half - 1]}…{n[-half:]}" for n in whole]


def _models(comparison: Comparison) -> list[str]:
    meta, lines = comparison.meta, []
    for side, name in zip(("base", "tuned"), names(comparison, 48), strict=True):
        model = meta.get(side, {})
        facts = [plain(model[key])[:16] for key in ("kind", "dtype") if model.get(key)]
        facts += [f"sha256 {plain(model['sha256'])[:12]}"] if model.get("sha256") else []
        lines.append(f"{side:<7}{name}" + (f" ({', '.join(facts)})" if facts else ""))
    corpus = meta.get("corpus", {})
    over = [f"{corpus[f'n_{x}']:,} {x}" for x in ("tokens", "sequences") if f"n_{x}" in corpus]
    how = (f"{key} {plain(meta[key])}" for key in ("backend", "device", "dtype") if key in meta)
    return lines + _lines("over", ", ".join([*over, f"{comparison.n_layers} blocks", *how]))


def headline(comparison: Comparison) -> list[tuple[str, str]]:
    """(what, number with interval) of everything measured at the output."""
    return [
        (what, with_interval(row) + (" nats" if row.metric in NATS else ""))
        for what, (probe, metric) in HEADLINE.items()
        for row in comparison.select(probe, metric, "final_norm")
        if row.layer == comparison.n_layers
    ]


def _output(comparison: Comparison) -> list[str]:
    items = [f"{what}: {value}" for what, value in headline(comparison)]
    if not items:
        return _lines("output", "neither output ranks nor the logit lens was measured here")
    # Spaces that do not break keep every number with its name.
    glued = ";  ".join(item.replace(" ", "\u00a0") for item in items)
    return [line.replace("\u00a0", " ") for line in _lines("output", glued)]


def chosen_layers(layers: Sequence[int], count: int = MAX_TABLE_ROWS) -> list[int]:
    """The first, some in between, and the last two of the layers, `count` at most."""
    if len(layers) <= count:
        return list(layers)
    *inner, last = layers
    spread = (round(i * (len(inner) - 1) / (count - 2)) for i in range(count - 1))
    return [*(inner[i] for i in spread), last]


def layer_table(comparison: Comparison) -> list[list[str]]:
    """A few layers of the main metrics, the heading first; empty if none was measured."""
    columns: dict[str, dict[int, str]] = {}
    for heading, which in TABLE.items():
        if rows := comparison.select(*which):
            show = with_interval if "[95%]" in heading else in_words
            columns[heading] = {row.layer: show(row) for row in rows}
    layers = chosen_layers(sorted({layer for cells in columns.values() for layer in cells}))
    body = [
        [str(n), str(n - 1) if n else "embed", *(c.get(n, MISSING) for c in columns.values())]
        for n in layers
    ]
    return [["layer", "block", *columns], *body] if body else []


def _layer_lines(comparison: Comparison) -> list[str]:
    table = layer_table(comparison)
    if not table:
        return _lines("layers", "none of drift, effective dimension and logit lens was measured")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in table]


def _where(comparison: Comparison) -> list[str]:
    said = []
    quantities = {"relative L2": ("drift", "relative_l2"), "ΔPR": ("participation_ratio", "delta")}
    for what, (probe, metric) in quantities.items():
        step, form = largest_step(comparison, probe, metric), FORMS.get(metric, number)
        if step and step.change == 0:
            said.append(f"raw {what} is the same at every layer")
        elif step:
            scale, block = max(abs(step.before), abs(step.after)), step.layer - 1
            said.append(
                f"raw {what} moves most in block {block} (layer {block} to {step.layer}): "
                f"{signed(step.change, scale)}, from {form(step.before, scale)} to "
                f"{form(step.after, scale)}"
            )
    most = largest_change(comparison)
    if most and most.value:
        said.append(f"raw ΔPR is farthest from zero at layer {most.layer}: {signed(most.value)}")
    said = said or ["not to be said: no two neighbouring layers were measured raw"]
    return _lines("where", *said)


def _artefacts(comparison: Comparison) -> list[str]:
    found = [_artefact(one, comparison.n_layers) for one in audit(comparison)]
    texts = [READING.format(comparison.n_layers), *found] if found else [NO_AUDIT]
    return _lines("audit", *texts)


def _artefact(one: Decomposition, last: int) -> str:
    name, form = ("ΔPR", signed) if one.quantity == "participation_ratio" else ("L2", number)
    if not any(one.parts.values()):
        return f"{name} 0 in every part."
    # One decimal at least, lest a small part reads as none.
    scale = min(99.0, max(map(abs, (one.total, *one.parts.values()))))
    parts = ", ".join(f"{signed(x, scale)} {part}" for part, x in one.parts.items())
    total, block = form(one.total, scale), form(one.block, scale)
    jump = f" ({signed(one.terminal_jump, scale)} since layer {last - 1})"
    largest = max(one.parts, key=lambda part: abs(one.parts[part]))
    remark = f"the largest part is the {largest}" if form is signed else "the norm rescales L2"
    return (
        f"{name} {total} = {parts}. Of {total} after the final norm, {block} is in the block's "
        f"raw output{jump if math.isfinite(one.terminal_jump) else ''}; {remark}."
    )


def _left_out(comparison: Comparison) -> list[str]:
    corpus = comparison.meta.get("corpus", {})
    items = [f"{word} ({corpus[key]:,})" for key, word in EXCLUSIONS.items() if corpus.get(key)]
    sinks: list[int] = comparison.meta.get("excluded", {}).get("sinks_per_layer", [])
    masked = [str(layer) for layer, count in enumerate(sinks) if count]
    if masked:
        layers = " to ".join(dict.fromkeys((masked[0], masked[-1])))
        items.append(f"attention sinks (at most {max(sinks):,} per layer, in layers {layers})")
    elif sinks:
        items.append("attention sinks (0)")
    measured = dict.fromkeys(row.probe for row in comparison.rows)
    absent = [words for name, words in PROBES.items() if name not in measured]
    partly = {name: which for name, which in TABLE.items() if which[0] in measured}
    absent += [name for name, which in partly.items() if not comparison.select(*which)]
    custom = [plain(name) for name in measured if name not in PROBES]
    facts = {"Left out": items, "Not measured": absent, "Also in the table": custom}
    return _lines("", *(f"{what}: {', '.join(some)}" for what, some in facts.items() if some))


def _notes(comparison: Comparison) -> list[str]:
    notes = [plain(note) for note in comparison.meta.get("notes", [])]
    more = [f"and {len(notes) - MAX_NOTES} more in meta['notes']"] if notes[MAX_NOTES:] else []
    return _lines("notes", *notes[:MAX_NOTES], *more)


def number(x: float, scale: float = 0.0) -> str:
    """Three significant digits, or as many decimals as a number of size `scale` would have."""
    if not math.isfinite(x):
        return MISSING
    scale = float(f"{abs(scale or x):.3g}")
    size = math.floor(math.log10(scale)) if scale else 2
    if not -5 < size < 6:
        return f"{x:.1e}"
    decimals = max(0, 2 - size)
    return f"{round(x, decimals) + 0.0:,.{decimals}f}"


def signed(x: float, scale: float = 0.0) -> str:
    """The same, always with a sign but for zero."""
    return f"+{number(x, scale)}" if x > 0 else number(x, scale)


def bounded(x: float, scale: float = 0.0) -> str:
    """Three decimals of a number up to 1; what is not quite 1 never reads as 1."""
    text = f"{round(x, 3) + 0.0:.3f}" if math.isfinite(x) else MISSING
    return ">0.999" if text == "1.000" and x < 1 else text


def percent(x: float, scale: float = 0.0) -> str:
    """A share as a percentage; what is not quite all or none never reads as such."""
    text = f"{100 * x:.1f}%" if math.isfinite(x) else MISSING
    return {"100.0%": ">99.9%", "0.0%": "<0.1%"}.get(text, text) if 0 < x < 1 else text


FORMS: dict[str, Callable[[float, float], str]] = {
    "delta": signed,
    **dict.fromkeys(("cosine", "spearman"), bounded),
    **dict.fromkeys(
        ("top1_agreement", "rank_1", "rank_2_10", "rank_gt_10", "rank_ge_200"), percent
    ),
}


def in_words(row: Row, scale: float = 0.0) -> str:
    """A number of the table in the form that suits its metric."""
    return FORMS.get(row.metric, number)(row.value, scale)


def with_interval(row: Row) -> str:
    """A number and, where there is one, its interval, with the same decimals."""
    if not all(map(math.isfinite, (row.value, row.low, row.high))):
        return in_words(row)
    scale = max(map(abs, (row.value, row.low, row.high)))
    value, low, high = (in_words(row._replace(value=x), scale) for x in row[4:7])
    return f"{value} [{low}, {high}]"


def plain(text: object) -> str:
    """Any text on one line, unprintable characters replaced."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


def _lines(label: str, *texts: str) -> list[str]:
    """Paragraphs wrapped to the width, a label in front of the first."""
    lines = []
    for text in texts:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{label:<7}", subsequent_indent=" " * 7)
        label = ""
    return lines
