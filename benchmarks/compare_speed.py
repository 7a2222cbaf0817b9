"""compare_models against the script people write by hand: seconds and peak memory, one run.

    python benchmarks/compare_speed.py [--layers 12 --d-model 256 --vocab 8192 --texts 64 --length 128]

Each side runs in its own process on the same two random Llamas and the same token ids; memory
is the peak resident size above what the process held once both models were loaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def models(args):
    """A random Llama and a slightly different copy of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.d_model,
        intermediate_size=args.d_model * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 32,
        vocab_size=args.vocab,
        max_position_embeddings=max(args.length, 128),
    )
    base = LlamaForCausalLM(config).eval()
    tuned = LlamaForCausalLM(config).eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return base, tuned, torch.randint(args.vocab, (args.texts, args.length))


def one_side(args):
    """Run one side in this process and print its seconds and megabytes as JSON."""
    torch.set_num_threads(args.threads)
    base, tuned, tokens = models(args)
    if args.side == "hyperlens":
        from hyperlens import compare_models

        # Imports are not part of the work on either side.
        compare_models(base, tuned, tokens[:2, :8], progress=False)
        run = lambda: compare_models(base, tuned, tokens, progress=False)  # noqa: E731
    else:
        from by_hand import compare

        compare(base, tuned, tokens[:2, :8])
        run = lambda: compare(base, tuned, tokens)  # noqa: E731
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "megabytes": (peak - before) / 2**20}))


def main():
    """Run both sides, a few times each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 12), ("d-model", 256), ("vocab", 8192), ("texts", 64), ("length", 128),
        ("repeats", 3), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=["hyperlens", "by_hand"])
    args = parser.parse_args()
    if args.side:
        one_side(args)
        return
    measured = {}
    for side in ("by_hand", "hyperlens"):
        runs = []
        for _ in range(args.repeats if side == "hyperlens" else 1):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        runs.sort(key=lambda r: r["seconds"])
        measured[side] = runs[len(runs) // 2]
    hand, ours = measured["by_hand"], measured["hyperlens"]
    print(
        f"two Llamas, {args.layers} blocks, d_model {args.d_model}, vocabulary {args.vocab}, "
        f"{args.texts} x {args.length} tokens, float32, {args.threads} threads, "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    print(f"{'':28}{'seconds':>10}{'peak MB':>10}")
    print(f"{'by hand (1 view)':28}{hand['seconds']:10.1f}{hand['megabytes']:10.0f}")
    print(f"{'compare_models (3 views)':28}{ours['seconds']:10.1f}{ours['megabytes']:10.0f}")
    print(
        f"{'ratio':28}{hand['seconds'] / ours['seconds']:9.1f}x"
        f"{hand['megabytes'] / ours['megabytes']:9.1f}x"
    )


if __name__ == "__main__":
    main()
