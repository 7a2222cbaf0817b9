"""Full hyperfitting, full LoRA and late-stage LoRA on a small real model: the paper's Table 3.

    python benchmarks/three_methods.py BASE TRAIN.txt HELD_OUT.txt --out FOLDER [--last-k 3]

Trains the base three times on the same passages by the "demo" recipe and measures on held-out
prompts what arXiv 2605.22579 measures in Tables 3 and 4 and Figures 2 and 6. A fourth run stops
by itself (`stop_at_plateau`), to see what that saves. The tables go to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from hyperlens.training import hyperfit, plot_history

LABELS = {
    "full": "hyperfitting, all weights",
    "lora": "LoRA, all blocks",
    "late_lora": "late-stage LoRA",
}


def spread(values):
    """Mean ± standard error over prompts."""
    values = np.asarray(values)
    return f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def row(label, record, run=None):
    cells = [
        label,
        f"{record.train_loss:.4f}" if run else "–",
        spread(record.ttr_per_prompt),
        f"{record.bigram_repetition:.3f}",
        f"{record.rank_1:.3f}",
        f"{record.perplexity:.1f}",
        f"{run.manifest['trained_parameters']:,}" if run else "–",
        f"{run.manifest['seconds']:.0f}" if run else "–",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("base", "train", "held_out"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--last-k", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = {}
    for method in LABELS:
        late = {"last_k": args.last_k} if method == "late_lora" else {}
        runs[method] = hyperfit(
            args.base,
            args.train,
            method,
            recipe="demo",
            validation=args.held_out,
            out=args.out / method,
            epochs=args.epochs,
            **late,
            n_validation=64,
            n_prompts=64,
            record_every=5,
            progress=False,
            device="cpu",
        )
    print("| | train loss | TTR | bigram rep. | top-1 agreement | perplexity | trained | s |")
    print("|---|---|---|---|---|---|---|---|")
    print(row("base", runs["full"].records[0]))
    for method, label in LABELS.items():
        print(row(label, runs[method].records[-1], runs[method]))
    print("\n| stop_at_plateau | ended | epochs run | of | TTR kept | TTR at the last epoch |")
    print("|---|---|---|---|---|---|")
    for method, label in LABELS.items():
        late = {"last_k": args.last_k} if method == "late_lora" else {}
        stopped = hyperfit(
            args.base,
            args.train,
            method,
            recipe="demo",
            validation=args.held_out,
            epochs=args.epochs,
            **late,
            n_validation=64,
            n_prompts=64,
            record_every=5,
            progress=False,
            stop_at_plateau=True,
            device="cpu",
        )
        kept = [r for r in stopped.records if f"epoch {r.epoch}" in stopped.manifest["ending"]]
        print(
            f"| {label} | {stopped.manifest['ending']} | {len(stopped.history)} | {args.epochs} | "
            f"{kept[-1].ttr if kept else stopped.records[-1].ttr:.3f} | "
            f"{runs[method].records[-1].ttr:.3f} |"
        )
    plot_history(runs["full"]).save(args.out / "figure-2.png", scale_factor=2)
    plot_history({LABELS[method]: run for method, run in runs.items()}).save(
        args.out / "figure-6.png", scale_factor=2
    )


if __name__ == "__main__":
    main()
