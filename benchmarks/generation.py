"""Batched continuations against transformers' generate, a prompt at a time: seconds, same tokens.

    python benchmarks/generation.py [--prompts 32 --new-tokens 96 --batch 16 --threads 2]

The model is the embedded one; prompts are the beginnings of the embedded tales, of 9 to 24 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlens.decoding.generate import continuations
from hyperlens.embedded import embedded_base, embedded_tales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("prompts", 32), ("new-tokens", 96), ("batch", 16), ("threads", 2), ("repeats", 3)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(embedded_base()).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    texts = embedded_tales()[: args.prompts]
    prompts = [tokenizer(text)["input_ids"][: 9 + i % 16] for i, text in enumerate(texts)]

    def one_by_one() -> list[list[int]]:
        made = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=1,
            )
            made.append(out[0, len(prompt) :].tolist())
        return made

    def batched() -> list[list[int]]:
        return continuations(
            model, tokenizer, prompts, max_new_tokens=args.new_tokens, batch_size=args.batch,
            stop_at_eos=False, progress=False,
        )  # fmt: skip

    taken = {"one prompt at a time": [], "continuations": []}
    for _ in range(args.repeats):
        results = []
        for name, side in zip(taken, (one_by_one, batched), strict=True):
            started = time.perf_counter()
            results.append(side())
            taken[name].append(time.perf_counter() - started)
    same = sum(a == b for a, b in zip(*results, strict=True))
    median = {name: statistics.median(seconds) for name, seconds in taken.items()}
    print(
        f"{len(prompts)} prompts, {args.new_tokens} new tokens, batch {args.batch}, "
        f"{args.threads} threads, median of {args.repeats}"
    )
    for name, seconds in median.items():
        print(f"{name:<24}{seconds:8.2f} s")
    first, second = median.values()
    print(f"{first / second:.1f} times; the same tokens for {same} of {len(prompts)} prompts")


if __name__ == "__main__":
    main()
