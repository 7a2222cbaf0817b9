"""compare_models at the sizes of real models: seconds, peak memory, and what was foreseen.

    python benchmarks/large_models.py [--shapes 1B 3B 8B --texts 64 --length 128 --apart]

Random weights of the shapes of Llama 3: what a comparison costs does not depend on their values.
Memory is what is taken on the GPU above both models' weights; "foreseen" is what the comparison
reckons with before it begins, from which it decides how often it reads the texts.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hyperlens import compare_models, load_hooked
from hyperlens.data.corpus import build_corpus
from hyperlens.passes.streaming import PassOptions, pass_memory
from hyperlens.probes import (
    LogitLens,
    ParticipationRatio,
    RankReordering,
    ResidualDrift,
    default_probes,
)

# d_model, width of the MLP, blocks, heads, heads of keys and values
SHAPES = {
    "1B": (2048, 8192, 16, 32, 8),
    "3B": (3072, 8192, 28, 24, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
D_VOCAB = 128_256
EVERYTHING = {"everything": None}
SETS = EVERYTHING | {
    "drift alone": [ResidualDrift()],
    "participation ratio alone": [ParticipationRatio()],
    "logit lens alone": [LogitLens()],
    "rank reordering alone": [RankReordering()],
}


def random_pair(shape, device, dtype):
    """A random Llama and a slightly different one, made where they will live."""
    d_model, width, blocks, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=d_model, intermediate_size=width, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=D_VOCAB,
        max_position_embeddings=4096, rope_theta=500_000.0, tie_word_embeddings=shape != "8B",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            models = [LlamaForCausalLM(config).eval() for _ in range(2)]
            with torch.no_grad():
                for base, tuned in zip(*(model.parameters() for model in models), strict=True):
                    tuned.copy_(base)
                    tuned += torch.randn_like(tuned).mul_(0.002)
    finally:
        torch.set_default_dtype(before)
    return models


def foreseen(base, tokens, probes, batch_size):
    """What a pass over these texts is reckoned to take."""
    corpus = build_corpus(
        tokens, None, max_length=tokens.shape[1], context_length=None, d_vocab=D_VOCAB,
        include_bos=False, bos_id=None,
    )  # fmt: skip
    options = PassOptions(batch_size=batch_size, sink_threshold=10.0, seed=0, progress=False)
    return pass_memory(load_hooked(base, backend="residual"), corpus, probes, options).total


def main():
    """Compare a pair of each shape, whole and probe by probe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1B"])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--apart", action="store_true", help="also every probe by itself")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(
        f"{args.texts} x {args.length} tokens, {args.dtype}, vocabulary {D_VOCAB:,}, "
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    )
    print(f"{'':34}{'seconds':>9}{'times read':>12}{'GiB':>8}{'foreseen':>10}")
    for shape in args.shapes:
        base, tuned = random_pair(shape, device, dtype)
        tokens = torch.randint(D_VOCAB, (args.texts, args.length))
        compare_models(base, tuned, tokens[:2], progress=False)  # imports, and libraries' setup
        weights = torch.cuda.memory_allocated(device)
        print(f"{shape}: weights of both {weights / 2**30:.1f} GiB")
        for name, probes in (SETS if args.apart else EVERYTHING).items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            found = compare_models(
                base, tuned, tokens, probes=probes, batch_size=args.batch_size, progress=False
            )
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            peak = torch.cuda.max_memory_allocated(device) - weights
            reckoned = foreseen(base, tokens, probes or default_probes(), args.batch_size)
            passes = [note.split()[1] for note in found.meta["notes"] if note.startswith("read ")]
            print(
                f"{shape + ', ' + name:34}{seconds:9.1f}{passes[0] if passes else '1':>12}"
                f"{peak / 2**30:8.2f}{reckoned / 2**30:10.2f}",
                flush=True,
            )
        del base, tuned, found
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
