"""compare_models against the script people write by hand: seconds and peak memory, one run.

    python benchmarks/compare_speed.py [--layers 12 --d-model 256 --vocab 8192 --texts 64 …]
    python benchmarks/compare_speed.py --changed-blocks 5    # as by a late-stage adapter
    python benchmarks/compare_speed.py --lens-tokens 16 --without by_torch by_numpy whole

Each side runs in its own process on the same two random Llamas and the same token ids; memory
is the peak resident size above what the process held once both models were loaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIDES = {
    "by_torch": "by hand, torch argsort",
    "by_numpy": "by hand, numpy argsort",
    "whole": "compare_models, both models run whole",
    "hyperlens": "compare_models (with intervals)",
    "sampled": "compare_models, lens_tokens",
}


def llama_config(args):
    """The Llama of both benchmarks."""
    return LlamaConfig(
        hidden_size=args.d_model,
        intermediate_size=args.d_model * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 32,
        vocab_size=args.vocab,
        max_position_embeddings=max(args.length, 128),
    )


def models(args):
    """A random Llama and a slightly different copy of it."""
    torch.manual_seed(0)
    config = llama_config(args)
    base = LlamaForCausalLM(config).eval()
    tuned = LlamaForCausalLM(config).eval()
    tuned.load_state_dict(base.state_dict())
    changed = tuned.model.layers[-args.changed_blocks :] if args.changed_blocks else tuned
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return base, tuned, torch.randint(args.vocab, (args.texts, args.length))


def peak_bytes(forget=False):
    """Most memory this process has held since it was last told to forget that; Linux only.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def one_side(args):
    """Run one side in this process and print its seconds and megabytes as JSON."""
    torch.set_num_threads(args.threads)
    base, tuned, tokens = models(args)
    if args.side in ("hyperlens", "whole", "sampled"):
        from hyperlens import compare_models
        from hyperlens.passes import streaming
        from hyperlens.passes.streams import NOTHING_SHARED

        if args.side == "whole":
            streaming.shared_on = lambda *args: NOTHING_SHARED

        # Imports are not part of the work on either side.
        compare_models(base, tuned, tokens[:2, :8], progress=False)
        lens_tokens = args.lens_tokens if args.side == "sampled" else None
        run = lambda: compare_models(  # noqa: E731
            base, tuned, tokens, lens_tokens=lens_tokens, progress=False
        )
    else:
        import by_hand

        ranks_of = getattr(by_hand, f"ranks_{args.side}")
        by_hand.compare(base, tuned, tokens[:2, :8], ranks_of)
        run = lambda: by_hand.compare(base, tuned, tokens, ranks_of)  # noqa: E731
    before = peak_bytes(forget=True)
    start, busy = time.perf_counter(), time.process_time()
    run()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    used = (peak_bytes() - before) / 2**20
    print(json.dumps({"seconds": seconds, "busy": busy, "megabytes": used}))


def main():
    """Run both sides, a few times each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 12), ("d-model", 256), ("vocab", 8192), ("texts", 64), ("length", 128),
        ("repeats", 3), ("threads", 2), ("changed-blocks", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lens-tokens", type=int, help="of each text, for a further side")
    parser.add_argument("--side", choices=list(SIDES))
    parser.add_argument("--without", nargs="*", default=[], help="sides to leave out")
    args = parser.parse_args()
    if args.side:
        one_side(args)
        return
    left_out = [*args.without, *([] if args.lens_tokens else ["sampled"])]
    runs = {side: [] for side in SIDES if side not in left_out}
    for _ in range(args.repeats):
        # They take turns, so that a change of the machine's mood meets all of them.
        for side in runs:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            )
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    measured = {
        side: {name: statistics.median(run[name] for run in taken) for name in taken[0]}
        for side, taken in runs.items()
    }
    ours = measured["hyperlens"]
    print(
        f"two Llamas, {args.layers} blocks, d_model {args.d_model}, vocabulary {args.vocab}, "
        f"{args.texts} x {args.length} tokens, float32, {args.threads} threads, "
        f"{f'the last {args.changed_blocks}' if args.changed_blocks else 'all'} blocks changed, "
        f"median of {args.repeats}, {processor()}, torch {torch.__version__}"
    )
    print(f"{'':36}{'seconds':>10}{'CPU':>8}{'peak MB':>10}{'times':>8}{'CPU':>8}{'memory':>8}")
    for side, one in measured.items():
        label = SIDES[side]
        slower, busier, larger = (one[name] / ours[name] for name in one)
        print(
            f"{label:36}{one['seconds']:10.1f}{one['busy']:8.1f}{one['megabytes']:10.0f}"
            f"{slower:7.1f}x{busier:7.1f}x{larger:7.1f}x"
        )


def processor():
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
