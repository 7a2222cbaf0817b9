"""The result of compare_models: one long table, and what it says about output, layers and norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from ..errors import ResultsError
from ..render import charts
from ..render.blocks import Axis, Block, Chart, Details, Grid, Heading, Role, Table, Text, Verdict
from ..render.format import (
    COSINE,
    DIMENSIONS,
    DISTANCE,
    MISSING,
    NATS,
    NUMBER,
    PERCENT,
    Form,
    count,
    interval,
    one_line,
)
from ..results.result import Result, unknown
from ..results.rows import COLUMNS, Row, chosen_layers
from .audit import (
    Decomposition,
    LayerReading,
    audit,
    largest_step,
    last_block,
    readings_agree,
    unchanged,
)

# Below this width a model says little about those that people use.
SMALL_WIDTH = 1024
# Layers in the table of the summary; the other tables and the frame have all of them.
MAX_LAYERS = 14

DIMENSION = "Δ effective dimension"
VIEWS = {
    "raw": "raw residual stream",
    "unit_rms": "scaled to unit RMS",
    "final_norm": "after the final norm",
}
FORMS: Mapping[str, Form] = {
    "cosine": COSINE,
    "spearman": COSINE,
    "l2": DISTANCE,
    "relative_l2": DISTANCE,
    "delta": DIMENSIONS,
    "kl": NATS,
    "base_entropy": NATS,
    "tuned_entropy": NATS,
    **dict.fromkeys(
        ("top1_agreement", "rank_1", "rank_2_10", "rank_gt_10", "rank_ge_200"), PERCENT
    ),
}
OUTPUT = {
    ("rank_reordering", "rank_1"): "top-1 prediction is the base's too (base rank 1)",
    ("rank_reordering", "rank_2_10"): "top-1 prediction from base ranks 2-10",
    ("rank_reordering", "rank_gt_10"): "top-1 prediction from below base rank 10",
    ("rank_reordering", "rank_ge_200"): "of which from base rank 200 or lower",
    ("rank_reordering", "spearman"): "Spearman's ρ of the logits over the vocabulary",
    ("logit_lens", "kl"): "KL(tuned ‖ base)",
    ("logit_lens", "base_entropy"): "entropy of the base",
    ("logit_lens", "tuned_entropy"): "entropy of the tuned model",
}
# Of groups of decisions: roles, or places in an answer.
BY_GROUP = {
    "top1_agreement": "top-1 agrees",
    "kl": "KL(tuned ‖ base)",
    "base_entropy": "entropy, base",
    "tuned_entropy": "entropy, tuned",
}
LAYERS = {
    "cosine": ("drift", "cosine", "raw"),
    "relative L2": ("drift", "relative_l2", "raw"),
    "ΔPR raw [95%]": ("participation_ratio", "delta", "raw"),
    "ΔPR final norm": ("participation_ratio", "delta", "final_norm"),
    "lens agrees": ("logit_lens", "top1_agreement", "final_norm"),
}
LENS = {
    "top1_agreement": (
        "agreement of the two lenses",
        "share of tokens with the same top-1",
        "share",
    ),
    "kl": ("KL(tuned ‖ base)", "nats", "zero"),
    "median_base_rank": ("median base rank of the tuned model's final top-1", "rank", "log"),
}
PROBES = {
    "drift": "drift",
    "participation_ratio": "effective dimension",
    "logit_lens": "logit lens",
    "rank_reordering": "output ranks",
}
# Shown with the output.
GROUPED = ("output_by_role", "output_by_position")
EXCLUSIONS = {
    "n_bos": "BOS position",
    "n_empty": "empty text",
    "n_short": "one-token text",
}
LAYER = Axis("layer", "layer (0 = embedding, l = output of block l - 1)")
NO_CHANGE = "No change: everything measured reads exactly as for two identical models."
PR_NOTE = (
    "PR is the participation ratio tr(Σ)²/‖Σ‖² of the stream's covariance, its effective "
    "dimension: how many directions share its variance. It is taken from pairs of tokens of "
    "different texts, since tokens of one text resemble each other."
)
AS_READ = "as scripts read it"
AUDIT_NOTE = (
    "Scripts read Hugging Face's hidden states: every layer raw but the last, which has passed the "
    "final norm; over all tokens, also BOS and attention sinks (a few tokens with huge norms); and "
    "with the sample covariance. What they read is a sum, from left to right: only the raw output "
    "over ordinary tokens is the blocks' work, the rest comes from the reading. Two jumps are said "
    "to agree if they differ by at most one dimension, or a quarter of the larger one."
)
# Smaller parts of a jump than this, in dimensions, are not worth a word: they read as 0.0.
NOTHING = 0.05


def small_models_note(meta: Mapping[str, Any]) -> list[Block]:
    """What to say of models below the width of those that people use; nothing of others."""
    if int(meta.get("d_model", SMALL_WIDTH)) >= SMALL_WIDTH:
        return []
    small = (
        "These are small models: a demonstration of the measurements, not evidence about large "
        "models."
    )
    return [Text(small, role="note")]


class Comparison(Result):
    """What fine-tuning changed, block by block.

    Attributes:
        table: one mapping per number; `to_frame()` gives it as pandas, `long` as rows.
        extras: per probe, what does not fit a table (histograms), as JSON values.
        meta: everything needed to repeat the run: models and their hashes, options, versions,
            seed, corpus hash, counts of what was excluded, and `notes` for the reader.
    """

    name: ClassVar[str] = "comparison"
    title: ClassVar[str] = "What did fine-tuning change, and where?"
    columns: ClassVar[tuple[str, ...]] = COLUMNS

    @classmethod
    def of(
        cls, rows: Iterable[Row], extras: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> Comparison:
        """From the rows that probes compute."""
        return cls(tuple(row._asdict() for row in rows), extras, meta)

    @cached_property
    def long(self) -> tuple[Row, ...]:
        """The table as named tuples, one `Row` per number."""
        return tuple(Row(**row) for row in self.table)

    @property
    def n_layers(self) -> int:
        """Number of blocks L of the compared models."""
        return int(self.meta["n_layers"])

    def measured(self, probe: str, metric: str, view: str | None = None) -> list[Row]:
        """Rows of one metric in order of layer, in one view if given; none if not measured."""
        chosen = (row for row in self.long if (row.probe, row.metric) == (probe, metric))
        return sorted((r for r in chosen if view in (None, r.view)), key=lambda r: r.layer)

    def select(  # type: ignore[override]
        self, probe: str, metric: str | None = None, view: str | None = None
    ) -> list[Row]:
        """Rows of one probe, of one metric and view if given, in order of layer.

        Raises:
            ResultsError: if there is no such probe, or it has no such metric or view.
        """
        for column, given in (("probe", probe), ("metric", metric), ("view", view)):
            near = [r for r in self.long if column == "probe" or r.probe == probe]
            known = list(dict.fromkeys(getattr(row, column) for row in near))
            if given is not None and given not in known:
                raise ResultsError(unknown(column, given, known))
        chosen = (r for r in self.long if r.probe == probe and metric in (None, r.metric))
        return sorted((r for r in chosen if view in (None, r.view)), key=lambda r: r.layer)

    def at(  # type: ignore[override]
        self, probe: str, metric: str, layer: int, view: str
    ) -> Row:
        """One row of the table.

        Args:
            probe, metric, view: as in the table.
            layer: 0 to L; negative layers count from the last.

        Raises:
            ResultsError: if there is no such probe, metric or view, or the layer was not measured.
        """
        wanted = layer + self.n_layers + 1 if layer < 0 else layer
        found = {row.layer: row for row in self.select(probe, metric, view)}
        if wanted not in found:
            raise ResultsError(f"layer {layer} was not measured: expected one of {[*found]}")
        return found[wanted]

    def value(  # type: ignore[override]
        self, probe: str, metric: str, layer: int, view: str
    ) -> float:
        """The number in one row of the table; see `at`.

        Raises:
            ResultsError: if there is no such row.
        """
        return self.at(probe, metric, layer, view).value

    @classmethod
    def csv_name(cls) -> str:
        """The tidy table."""
        return "layers.csv"

    @classmethod
    def from_format_1(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Version 0.1 wrote rows as lists, null for NaN and words for infinity."""
        rows = [_row_of_format_1(row)._asdict() for row in data["rows"]]
        return {"name": cls.name, "meta": data["meta"], "extras": data["extras"], "table": rows}

    def plot_ranks(self) -> Any:
        """Base ranks of the tuned model's top-1 predictions (Figure 4 of arXiv 2605.22579).

        An Altair chart, or None where ranks were not measured.
        """
        found = self._histogram()
        return charts.draw(found, titled=True) if found else None

    def verdicts(self) -> list[Verdict]:
        """Output, layers, dimension, and whether the jump that scripts see is the last block's."""
        if unchanged(self):
            return [Verdict("changed?", NO_CHANGE)]
        found = [self._output_verdict(), self._where_verdict(), self._dimension_verdict()]
        found += [_audit_verdict(one) for one in audit(self) if one.quantity != "drift"]
        return [verdict for verdict in found if verdict is not None]

    def _output_verdict(self) -> Verdict | None:
        shares = {row.metric: row for row in self._at_output("rank_reordering")}
        if not {"rank_1", "rank_gt_10"} <= shares.keys():
            return None
        same, far = (interval(shares[m]._asdict(), PERCENT) for m in ("rank_1", "rank_gt_10"))
        return Verdict(
            "output",
            f"The tuned model's top-1 prediction is the base's in {same} of contexts; in {far} it "
            "comes from below the base's rank 10, which no temperature can do.",
        )

    def _where_verdict(self) -> Verdict | None:
        step = largest_step(self, "drift", "relative_l2")
        if step is None or step.change == 0:
            return None
        return Verdict(
            "where",
            f"The raw residual streams diverge most in block {step.layer - 1}: their relative L2 "
            f"distance goes from {DISTANCE(step.before)} to {DISTANCE(step.after)} there.",
        )

    def _dimension_verdict(self) -> Verdict | None:
        rows = {row.layer: row for row in self.measured("participation_ratio", "delta", "raw")}
        last = rows.get(self.n_layers)
        if last is None:
            return None
        if math.isnan(last.value):
            return Verdict(
                "dimension",
                "How much the effective dimension of the last layer has changed cannot be "
                "estimated from so few texts: give more of them.",
                caution=True,
            )
        total = interval(last._asdict(), DIMENSIONS)
        added = last_block(self)
        by_last = f"; the last block adds {DIMENSIONS(added)} of it" if added is not None else ""
        return Verdict(
            "dimension",
            f"At the last layer the effective dimension of the raw stream has changed by {total}, "
            f"all blocks together{by_last}.",
        )

    def evidence(self) -> list[Block]:
        """Output, layers, audit and ranks."""
        return [
            *small_models_note(self.meta),
            *self._output(),
            *self._layers(),
            *self._audit(),
            *self._ranks(),
            *self._inputs(),
        ]

    def _at_output(self, probe: str) -> list[Row]:
        return [
            row
            for row in self.long
            if row.probe == probe and row.layer == self.n_layers and row.view == "final_norm"
        ]

    def _output(self) -> list[Block]:
        found = {
            (r.probe, r.metric): r
            for p in ("rank_reordering", "logit_lens")
            for r in self._at_output(p)
        }
        rows = [
            [words, interval(found[key]._asdict(), FORMS[key[1]])]
            for key, words in OUTPUT.items()
            if key in found
        ]
        groups = [*self._by_role(), *self._by_position()]
        if not rows and not groups:
            return [Text("Neither output ranks nor the logit lens was measured.")]
        caption = f"teacher-forced, over {self._counted()}"
        if any(math.isfinite(row.low) for row in found.values()):
            caption += ", 95% intervals over texts"
        table = Table(["at the output", self.tuned_name], rows, caption, joins=True)
        return [Heading("The output"), *([table] if rows else []), *groups]

    def _counted(self) -> str:
        """Which tokens are counted, in words."""
        corpus = self.meta.get("corpus", {})
        if "n_counted" not in corpus:
            return "all tokens of the texts"
        whose = f"{' and '.join(corpus.get('roles', []))} tokens".strip()
        by = f" chosen by {one_line(corpus['tokens'])}" if "tokens" in corpus else ""
        return f"{whose}{by} only"

    def _by_group(self, probe: str) -> dict[str, dict[str, Row]]:
        """Group to metric to row, of a probe of groups of decisions."""
        found: dict[str, dict[str, Row]] = {}
        for row in self._at_output(probe):
            metric = next((m for m in BY_GROUP if row.metric.startswith(f"{m}_")), None)
            if metric is not None:
                found.setdefault(row.metric.removeprefix(f"{metric}_"), {})[metric] = row
        return found

    def _by_role(self) -> list[Block]:
        found = self._by_group("output_by_role")
        rows = [_group_row(role, of_role) for role, of_role in found.items()]
        if not rows:
            return []
        caption = "by who speaks the token that a decision follows; over decisions"
        return [Table(["role", "decisions", *BY_GROUP.values()], rows, caption)]

    def _by_position(self) -> list[Block]:
        """Curves along the answer."""
        found = self._by_group("output_by_position")
        charts_of = [
            self._along(found, metric, words)
            for metric, words in BY_GROUP.items()
            if metric in ("kl", "top1_agreement")
        ]
        drawn = Grid([chart for chart in charts_of if chart is not None])
        return [self._position_table(found), drawn] if found else []

    def _position_table(self, found: Mapping[str, Mapping[str, Row]]) -> Table:
        """The curves at the first positions and at those that double from there on."""
        last = max(map(int, found))
        shown = {0, *(2**i for i in range(last.bit_length())), last}
        rows = [_group_row(at, of_one) for at, of_one in found.items() if int(at) in shown]
        caption = "by the tokens of the answer before the decision; all are in to_frame()"
        return Table(["position", "decisions", *BY_GROUP.values()], rows, caption)

    def _along(
        self, found: Mapping[str, Mapping[str, Row]], metric: str, words: str
    ) -> Chart | None:
        rows = [
            {
                "series": self.tuned_name,
                "position": int(group),
                "value": of_group[metric].value,
                "low": of_group[metric].low,
                "high": of_group[metric].high,
                "tokens": of_group[metric].n,
            }
            for group, of_group in found.items()
            if metric in of_group
        ]
        if not rows:
            return None
        title = f"{words}, along the answer"
        ends = "; ".join(
            f"{row['value']:.3g} after {row['position']} tokens" for row in (rows[0], rows[-1])
        )
        x = Axis("position", "tokens of the answer before the decision")
        roles: dict[str, Role] = {self.tuned_name: "tuned"}
        scale: Any = "zero" if metric == "kl" else "share"
        return Chart(
            "lines", title, f"{title}: {ends}", rows, x, Axis("value", words, scale), roles
        )

    def _layers(self) -> list[Block]:
        table = self._layer_table(MAX_LAYERS)
        drawn = self._layer_charts()
        if not drawn and not table:
            return [Text("None of drift, effective dimension and logit lens was measured.")]
        blocks: list[Block] = [Heading("Along the layers"), *table]
        if drawn:
            blocks.append(Grid(drawn))
        dimensions = self._dimensions()
        return [*blocks, *([Text(PR_NOTE)] if dimensions else []), *dimensions]

    def _layer_table(self, most: int) -> list[Block]:
        columns = {
            heading: self._column(*which, "[" in heading) for heading, which in LAYERS.items()
        }
        columns = {heading: cells for heading, cells in columns.items() if cells}
        layers = sorted({layer for cells in columns.values() for layer in cells})
        if not layers:
            return []
        shown = chosen_layers(layers, most)
        table = [
            [
                str(layer),
                str(layer - 1) if layer else "embedding",
                *(cells.get(layer, MISSING) for cells in columns.values()),
            ]
            for layer in shown
        ]
        caption = "the layers in between are in to_frame()" if len(shown) < len(layers) else ""
        return [Table(["layer", "block", *columns], table, caption)]

    def _column(self, probe: str, metric: str, view: str, with_interval: bool) -> dict[int, str]:
        """Layer to the number there as text."""
        form, rows = FORMS[metric], self.measured(probe, metric, view)
        if with_interval:
            return {row.layer: interval(row._asdict(), form) for row in rows}
        return {row.layer: form(row.value) for row in rows}

    def _layer_charts(self) -> list[Chart]:
        """Drift once (its cosine is the same in two views), dimension in every view."""
        drawn = [
            self._line(
                "drift", "relative_l2", "raw", "relative L2 distance of the raw streams", "zero"
            ),
            self._line("drift", "cosine", "raw", "cosine of the raw streams", "data"),
            *(
                self._line(
                    "participation_ratio", "delta", view, f"Δ effective dimension, {words}", "zero"
                )
                for view, words in VIEWS.items()
            ),
        ]
        return [chart for chart in drawn if chart is not None]

    def _line(self, probe: str, metric: str, view: str, title: str, scale: Any) -> Chart | None:
        rows = [
            {
                "series": self.tuned_name,
                "layer": row.layer,
                "value": row.value,
                "low": row.low,
                "high": row.high,
                "tokens": row.n,
            }
            for row in self.measured(probe, metric, view)
            if math.isfinite(row.value)
        ]
        if not rows:
            return None
        ends = "; ".join(
            f"{row['value']:.3g} at layer {row['layer']}" for row in (rows[0], rows[-1])
        )
        roles: dict[str, Role] = {self.tuned_name: "tuned"}
        y = Axis("value", title.split(",")[0], scale)
        return Chart("lines", title, f"{title}, by layer: {ends}", rows, LAYER, y, roles)

    def _dimensions(self) -> list[Block]:
        rows = []
        for view in VIEWS:
            sides = {
                metric: {
                    row.layer: row for row in self.measured("participation_ratio", metric, view)
                }
                for metric in ("base", "tuned", "delta")
            }
            for layer, delta in sides["delta"].items():
                cells = [
                    interval(sides[side][layer]._asdict(), NUMBER)
                    if layer in sides[side]
                    else MISSING
                    for side in ("base", "tuned")
                ]
                rows.append([str(layer), view, *cells, interval(delta._asdict(), DIMENSIONS)])
        head = ["layer", "view", "base", "tuned", "tuned - base [95%]"]
        return [Details("effective dimension at every layer", [Table(head, rows)])] if rows else []

    def _audit(self) -> list[Block]:
        found = audit(self)
        measured = {row.probe for row in self.long}
        if not found and measured.isdisjoint({"drift", "participation_ratio"}):
            return []  # not asked for
        if not found:
            needs = (
                "The audit needs the effective dimension or the drift as they are measured by "
                "default, at the last layer, by this version: compare the models again."
            )
            return [Text(needs, role="note")]
        question = Heading("Is it the blocks, or how the layers are read?")
        drawn = Grid([self._readings_chart(one) for one in found])
        first, *others = (_audit_table(one) for one in found)
        rest = [Details("the same for the L2 distance", [table]) for table in others]
        return [question, Text(AUDIT_NOTE), drawn, first, *rest]

    def _readings_chart(self, one: Decomposition) -> Chart:
        """Both readings along the layers."""
        # A page draws several comparisons into one chart: each has its own two names.
        ours, script = self.tuned_name, f"{self.tuned_name}, {AS_READ}"
        rows = [
            {"series": name, "layer": at.layer, "value": getattr(at, attribute)}
            for name, attribute in ((ours, "blocks"), (script, "as_read"))
            for at in one.layers
        ]
        ends = "; ".join(f"{at.as_read:.3g} and {at.blocks:.3g} raw" for at in one.layers[-2:])
        title = f"{_quantity(one)}: raw, ordinary tokens, and {AS_READ}"
        words = f"{title}, by layer; at the last layers {ends}"
        y = Axis("value", _quantity(one), "zero")
        roles: dict[str, Role] = {ours: "tuned", script: "other"}
        return Chart("lines", title, words, rows, LAYER, y, roles)

    def _ranks(self) -> list[Block]:
        histogram = self._histogram()
        lens = [
            self._line("logit_lens", metric, "final_norm", f"{what}, {unit}", scale)
            for metric, (what, unit, scale) in LENS.items()
        ]
        drawn = [chart for chart in lens if chart is not None]
        blocks: list[Block] = []
        if histogram:
            is_all = "n_counted" not in self.meta.get("corpus", {})
            where = "at every token" if is_all else f"over {self._counted()}"
            blocks += [
                Heading("Where did the base model rank the tuned model's predictions?"),
                Text(
                    f"Teacher-forced, {where}. Temperature never changes a rank, so any "
                    "share beyond rank 1 is reordering. Tied logits share the best rank."
                ),
                histogram,
            ]
        if drawn:
            about = "Logit lens: each model's own final norm and unembedding, applied early."
            blocks.append(Details("the same along the layers", [Text(about), Grid(drawn)]))
        return blocks

    def _histogram(self) -> Chart | None:
        bins = self.extras.get("rank_reordering", {}).get("rank_histogram", [])
        total = sum(one["count"] for one in bins)
        rows = [
            {
                "series": self.tuned_name,
                "rank": _bin(one["low"], one["high"]),
                "value": 100 * one["count"] / total if total else 0.0,
                "decisions": one["count"],
            }
            for one in bins
        ]
        title = "Base rank of the tuned model's top-1 prediction: share of contexts, %"
        axes = Axis("rank", "base rank", is_category=True), Axis("value", "share, %", "zero")
        return Chart("bars", title, f"{title}; bins widen with rank", rows, *axes) if rows else None

    def _inputs(self) -> list[Block]:
        """Models and texts, with what is needed to find them again, and what was left out."""
        rows = [
            [
                side,
                one_line(model.get("name", side)),
                one_line(model.get("kind", "")),
                one_line(model.get("sha256", ""))[:16],
            ]
            for side in ("base", "tuned")
            if (model := self.meta.get(side))
        ]
        head = ["", "model", "opened as", "SHA-256 of its weights"]
        return [
            Text(self._over()),
            *(Text(line) for line in self._left_out()),
            Details("what was compared", [Table(head, rows)]),
        ]

    def _over(self) -> str:
        corpus = self.meta.get("corpus", {})
        parts = [
            count(corpus[f"n_{what}s"], what)
            for what in ("token", "sequence")
            if f"n_{what}s" in corpus
        ]
        parts.append(count(self.n_layers, "block"))
        parts += [
            f"{k} {one_line(self.meta[k])}"
            for k in ("backend", "device", "dtype")
            if k in self.meta
        ]
        return f"Read: {', '.join(parts)}."

    def _left_out(self) -> list[str]:
        corpus = self.meta.get("corpus", {})
        items = [count(corpus[key], words) for key, words in EXCLUSIONS.items() if corpus.get(key)]
        if corpus.get("n_cut"):
            items.append(f"the ends of {count(corpus['n_cut'], 'long text')}")
        if "n_counted" in corpus:
            n_others = corpus["n_tokens"] - corpus.get("n_bos", 0) - corpus["n_counted"]
            items.append(f"{count(n_others, 'token')} that were not chosen")
        sinks: list[int] = self.meta.get("excluded", {}).get("sinks_per_layer", [])
        if any(sinks):
            items.append(f"attention sinks (at most {max(sinks):,} in a layer)")
        measured = dict.fromkeys(row.probe for row in self.long)
        absent = [words for name, words in PROBES.items() if name not in measured]
        custom = [one_line(name) for name in measured if name not in {*PROBES, *GROUPED}]
        facts = {"Left out": items, "Not measured": absent, "Also in the table": custom}
        return [f"{what}: {', '.join(some)}." for what, some in facts.items() if some]


def _group_row(name: str, found: Mapping[str, Row]) -> list[str]:
    """What `output_by_role` and `output_by_position` have of one group of decisions."""
    cells = (
        interval(found[metric]._asdict(), FORMS[metric]) if metric in found else MISSING
        for metric in BY_GROUP
    )
    return [name, f"{next(iter(found.values())).n:,}", *cells]


def _audit_verdict(one: Decomposition) -> Verdict | None:
    jump, before = one.jump, one.before
    if jump is None or before is None or math.isnan(jump.as_read + jump.blocks):
        return None
    read, raw = DIMENSIONS(jump.as_read), DIMENSIONS(jump.blocks)
    seen = (
        "Read as scripts do (all tokens with BOS, raw below the last layer and after the final "
        f"norm at it), the change of dimension goes from {DIMENSIONS(before.as_read)} to "
        f"{DIMENSIONS(one.last.as_read)} in the last block, a jump of {read}; in the raw streams "
        f"of ordinary tokens from {DIMENSIONS(before.blocks)} to {DIMENSIONS(one.last.blocks)}, by "
        f"{raw}."
    )
    largest = max(jump.reading, key=lambda part: abs(jump.reading[part]))
    at_layers = " and ".join(
        f"{DIMENSIONS(at.reading[largest])} at layer {at.layer}" for at in (before, one.last)
    )
    parts = ", ".join(
        f"{DIMENSIONS(value)} from {part}"
        for part, value in sorted(jump.reading.items(), key=lambda item: -abs(item[1]))
        if abs(value) >= NOTHING
    )
    if readings_agree(jump):
        if readings_agree(replace(jump, as_read=jump.blocks + jump.reading[largest])):
            return Verdict("real?", f"{seen} Both readings agree about the last block.")
        why = f"because what the reading adds cancels: {parts}"
        return Verdict("real?", f"{seen} Both readings agree about the last block, {why}.")
    what = "The difference is"
    if abs(jump.as_read) > abs(jump.blocks):
        is_most = jump.as_read * jump.blocks <= 0 or abs(jump.as_read) > 2 * abs(jump.blocks)
        what = f"{'Most' if is_most else 'Part'} of the jump that scripts show is"
    return Verdict(
        "real?",
        f"{seen} {what} made by the reading, not by the last block: {parts}. The largest part, "
        f"{largest}, is {at_layers}.",
    )


def _quantity(one: Decomposition) -> str:
    return DIMENSION if one.quantity == "participation_ratio" else "L2 distance"


def _audit_table(one: Decomposition) -> Table:
    """Every layer's sum, and that of the jump in the last block."""
    is_dimension = one.quantity == "participation_ratio"
    form = DIMENSIONS if is_dimension else DISTANCE
    chosen = chosen_layers([at.layer for at in one.layers], MAX_LAYERS)
    rows = [
        [str(at.layer), *_sum_of_parts(at, form, is_dimension)]
        for at in one.layers
        if at.layer in chosen
    ]
    if one.jump is not None:
        rows.append(["jump", *_sum_of_parts(one.jump, DIMENSIONS, is_dimension)])
    estimator = ["+ sample covariance"] if is_dimension else []
    head = ["layer", AS_READ, "= raw output", "+ final norm", *estimator, "+ sinks", "+ BOS"]
    caption = f"{_quantity(one)}; jump: the last layer less the one before it"
    if math.isfinite(one.jump_normed):
        caption += (
            f", {DIMENSIONS(one.jump_normed)} if both are read after the final norm, over ordinary "
            "tokens"
        )
    return Table(head, rows, caption)


def _sum_of_parts(at: LayerReading, form: Form, has_estimator: bool) -> list[str]:
    parts = [at.norm, *([at.estimator] if has_estimator else []), at.sinks, at.bos]
    return [form(at.as_read), form(at.blocks), *map(DIMENSIONS, parts)]


def _bin(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _row_of_format_1(row: Any) -> Row:
    if not isinstance(row, list) or len(row) != len(COLUMNS):
        raise TypeError(f"a row must have {len(COLUMNS)} fields")
    probe, metric, layer, view, *numbers, n = row
    value, low, high = (math.nan if number is None else float(number) for number in numbers)
    return Row(str(probe), str(metric), int(layer), str(view), value, low, high, int(n))
