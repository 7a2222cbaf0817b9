"""How the ranks moved: where the tuned model's choices stood in the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...results.comparison import Comparison
from ..charts import bars, chart, lines
from ..parts import grid, join, pair_name, paragraph, table
from ..words import with_interval

ORDER = 60
TITLE = "How did the ranks move?"
READS = "comparison"

BUCKETS = {
    "top1_agreement": "same first token in both",
    "rank_1": "tuned model's first token: base rank 1",
    "rank_2_10": "base rank 2-10",
    "rank_gt_10": "base rank over 10",
    "rank_ge_200": "of which 200 and more",
    "spearman": "Spearman's ρ of the logits over the vocabulary",
}
LENS = {
    "top1_agreement": ("agreement of the two lenses", "share of tokens with the same winner"),
    "kl": ("KL(tuned ‖ base)", "nats"),
    "median_base_rank": ("median base rank of the final winner", "rank, 1 is first"),
}


def body(results: Sequence[Comparison]) -> Markup | None:
    """The table of shares, the chart of ranks (the paper's Figure 4), and the lens by layer."""
    parts: list[Markup] = []
    shares = _shares(results)
    if shares:
        parts.append(
            paragraph(
                "For every next-token decision, teacher-forced: which rank had the token that the "
                "tuned model puts first in the base model? Temperature never changes a rank, so "
                "any share beyond rank 1 is reordering. Tied logits share the best rank."
            )
        )
        parts.append(table(["share of decisions [95%]", *map(pair_name, results)], shares))
    histogram = _histogram(results)
    if histogram:
        title = "Base rank of the token the tuned model puts first: share of decisions, %"
        alt = f"{title}; bins widen with rank"
        spec = bars(histogram, "rank", "base rank", "share of decisions, %")
        parts.append(chart(spec, title, alt, histogram))
    charts = [_lens(results, metric, *words) for metric, words in LENS.items()]
    if any(charts):
        parts.append(
            paragraph(
                "The same along the layers, through the logit lens: each model's own final norm "
                "and unembedding applied early."
            )
        )
        parts.append(grid(*filter(None, charts)))
    return join(parts) if parts else None


def _shares(results: Sequence[Comparison]) -> list[list[str]]:
    rows = []
    for metric, words in BUCKETS.items():
        cells = [
            next((with_interval(row) for row in result.select("rank_reordering", metric)), "n/a")
            for result in results
        ]
        if set(cells) != {"n/a"}:
            rows.append([words, *cells])
    return rows


def _histogram(results: Sequence[Comparison]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        bins = result.extras.get("rank_reordering", {}).get("rank_histogram", [])
        total = sum(one["count"] for one in bins)
        for one in bins:
            low, high = one["low"], one["high"]
            rows.append(
                {
                    "pair": pair_name(result),
                    "rank": f"{low:,}" if low == high else f"{low:,}-{high:,}",
                    "value": 100 * one["count"] / total if total else 0.0,
                    "decisions": one["count"],
                }
            )
    return rows


def _lens(results: Sequence[Comparison], metric: str, what: str, of: str) -> Markup | None:
    rows: list[dict[str, Any]] = [
        {
            "pair": pair_name(result),
            "layer": row.layer,
            "value": row.value,
            "low": row.low,
            "high": row.high,
            "tokens": row.n,
        }
        for result in results
        for row in result.select("logit_lens", metric)
    ]
    if not rows:
        return None
    last = max(row["layer"] for row in rows)
    alt = f"{what} by layer: " + "; ".join(
        f"{row['pair']}: {row['value']:.3g} at layer {last}" for row in rows if row["layer"] == last
    )
    scale = "log" if metric == "median_base_rank" else "from zero"
    return chart(lines(rows, "value", what, scale=scale), f"{what}, {of}", alt, rows)
