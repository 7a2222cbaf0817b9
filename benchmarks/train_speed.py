"""Late-stage LoRA with the frozen-prefix cache against what people run today, one run.

    python benchmarks/train_speed.py [--layers 24 --d-model 512 --last-k 5 ...]
    python benchmarks/train_speed.py --vocab 4096,32000,128256  # or: make bench

All sides train the same random Llama on the same sequences with AdamW, batches of 8, float32:

- "full LoRA": transformers' Trainer and peft, adapters on every block;
- "late-stage LoRA": the same, adapters on the last k blocks (peft's layers_to_transform);
- hyperfit(method="late_lora"): with the cache and, for comparison, without;
- the suffix alone: k blocks, norm and unembedding, forward + backward + step in a bare loop on
  residuals that are already there. Nothing that trains these blocks can be faster.

Seconds of the processor per epoch, which other work on the machine lengthens less than those of a
clock: the median over epochs after the first; the cache is filled before it. Each side runs in a
process of its own; memory is the peak of what it holds above what it held before the model was
made. The sides take turns, so that a change of the machine's mood meets all of them.

Beside what was measured stands what multiplications alone would make of it: those that the side
needs, in GFLOP, and as a ratio. Whoever trains these blocks exactly, with adapters beside them and
every token's softmax over the vocabulary, needs at least those of hyperfit with its cache. What
they take at the fastest product of matrices that this machine shows bounds how much faster than a
side anything exact can be.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import psutil
import torch
from compare_speed import llama_config, peak_bytes, processor
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hyperlens.training import hyperfit

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8
RANK = 16
OURS = "hyperfit late_lora"


def llama(args):
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(args))


class Rows(Dataset):
    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


class Clock(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self):
        self.seconds = []

    def on_epoch_begin(self, *args, **kwargs):
        self.start = time.process_time()

    def on_epoch_end(self, *args, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def plain_peft(args, tokens, blocks):
    """What the documentation of peft and transformers shows."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules=TARGETS,
        layers_to_transform=blocks,
        task_type="CAUSAL_LM",
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=get_peft_model(llama(args), config),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=args.epochs,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Rows(tokens),
            callbacks=[clock],
        ).train()
    return clock.seconds


def ours(args, tokens, prefix_cache):
    """hyperfit, its epochs timed from outside."""
    clock = Clock()
    begin = Trainer.__init__

    def with_clock(self, *positional, callbacks=(), **named):
        begin(self, *positional, callbacks=[*callbacks, clock], **named)

    Trainer.__init__ = with_clock
    try:
        hyperfit(
            llama(args),
            tokens.tolist(),
            "late_lora",
            last_k=args.last_k,
            n_sequences=len(tokens),
            sequence_length=args.length,
            batch_size=BATCH,
            epochs=args.epochs,
            record_every=0,
            prefix_cache=prefix_cache,
            progress=False,
        )
    finally:
        Trainer.__init__ = begin
    return clock.seconds


def suffix_alone(args, tokens):
    """The last k blocks in a bare loop."""
    model = llama(args)
    core = model.model
    first = args.layers - args.last_k
    with torch.no_grad():
        hidden = []
        handle = core.layers[first].register_forward_pre_hook(
            lambda module, inputs: hidden.append(inputs[0].clone())
        )
        for start in range(0, len(tokens), BATCH):
            model(tokens[start : start + BATCH], use_cache=False)
        handle.remove()
    hidden = torch.cat(hidden)
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    core.layers = core.layers[first:]
    get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    places = core.rotary_emb(hidden[:BATCH], torch.arange(args.length)[None])
    seconds = []
    for _ in range(args.epochs):
        begun = time.process_time()
        order = torch.randperm(len(tokens))
        for start in range(0, len(tokens), BATCH):
            rows = order[start : start + BATCH]
            x = hidden[rows]
            for block in core.layers:
                x = block(x, position_embeddings=places)
            logits = model.lm_head(core.norm(x))
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), tokens[rows][:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(time.process_time() - begun)
    return seconds


def multiplications(args, vocab, run, trained):
    """FLOP of an epoch whose forward passes run the last `run` blocks and train the last `trained`.

    Of each token: a block's seven projections hold 12 d_model² weights, attention reads half of the
    text on average, and adapters of rank r on all projections read and write 19 d_model r numbers.
    Backward, weights that are frozen pass their input's gradient on, which the first trained block
    owes to nobody but its output projections and MLP. The unembedding is as in the forward pass.
    """
    d = args.d_model
    attention = 2 * args.length * d
    adapters = 2 * 19 * d * RANK
    forward = run * (24 * d**2 + attention) + trained * adapters
    backward = trained * (24 * d**2 + 2 * attention + 2 * adapters) - 3 * 2 * d**2
    head = 2 * 2 * d * vocab * (args.length - 1) / args.length
    return args.sequences * args.length * (forward + backward + head)


def flop_of(args, vocab, side):
    """What `multiplications` are needed by a side."""
    whole, some = args.layers, args.last_k
    run, trained = {
        "full LoRA": (whole, whole),
        "late-stage LoRA": (whole, some),
        "hyperfit, no cache": (whole, some),
    }.get(side, (some, some))
    return multiplications(args, vocab, run, trained)


def fastest_product(threads):
    """FLOP in a second of the processor, of the fastest of twenty products of large matrices."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, 1024, 1024).unbind()
    seconds = []
    for _ in range(20):
        begun = time.process_time()
        a @ b
        seconds.append(time.process_time() - begun)
    return 2 * 1024**3 / min(seconds)


def late(args):
    return list(range(args.layers - args.last_k, args.layers))


def sides_of(args, tokens):
    return {
        "full LoRA": lambda: plain_peft(args, tokens, list(range(args.layers))),
        "late-stage LoRA": lambda: plain_peft(args, tokens, late(args)),
        "hyperfit, no cache": lambda: ours(args, tokens, False),
        OURS: lambda: ours(args, tokens, True),
        "the suffix alone": lambda: suffix_alone(args, tokens),
    }


def one_side(args):
    """Run one side in this process; print its seconds per epoch and its MiB as JSON."""
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    tokens = torch.randint(args.vocab[0], (args.sequences, args.length))
    args.vocab = args.vocab[0]
    held = psutil.Process().memory_info().rss
    peak_bytes(forget=True)
    seconds = sides_of(args, tokens)[args.side]()
    print(json.dumps({"seconds": seconds[1:], "mib": (peak_bytes() - held) / 2**20}))


def measured(side, vocab):
    """The same in another process."""
    command = [sys.executable, *sys.argv, "--side", side, "--vocab", str(vocab)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def compare(args, vocab):
    """Print the table of one vocabulary."""
    runs = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            runs[side].append(measured(side, vocab))
    seconds = {
        side: statistics.median(value for run in done for value in run["seconds"])
        for side, done in runs.items()
    }
    least = multiplications(args, vocab, args.last_k, args.last_k)
    speed = fastest_product(args.threads)
    print(
        f"vocabulary {vocab:<23,}{'s / epoch':>10}{'times':>8}{'MiB':>9}{'GFLOP':>9}{'times':>8}"
        f"{'at most':>9}"
    )
    for side, done in runs.items():
        times = seconds[side] / seconds[OURS]
        mib = statistics.median(run["mib"] for run in done)
        flop = flop_of(args, vocab, side)
        bound = seconds[side] * speed / least
        print(
            f"{side:34}{seconds[side]:10.2f}{times:7.2f}x{mib:9,.0f}{flop / 1e9:9.1f}"
            f"{flop / least:7.2f}x{bound:8.2f}x",
            flush=True,
        )
    print(f"(at most: against {least / speed:.2f} s, multiplications at {speed / 1e9:.0f} GFLOP/s)")


def vocabularies(text):
    return [int(number) for number in text.split(",")]


def names(text):
    return text.split(",")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 24), ("d-model", 512), ("sequences", 32), ("length", 128),
        ("last-k", 5), ("epochs", 4), ("rounds", 3), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=vocabularies, default=[4096], help="one or several: N,N")
    parser.add_argument("--sides", type=names, default=list(sides_of(None, None)), help="a,b")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        one_side(args)
        return
    print(
        f"Llama of {args.layers} blocks, d_model {args.d_model}, last {args.last_k} trained, "
        f"{args.sequences} x {args.length} tokens, batch {BATCH}, float32, {args.threads} "
        f"threads, {processor()}, torch {torch.__version__}; median of {args.rounds} x "
        f"{args.epochs - 1} epochs; {load()} before",
        flush=True,
    )
    for vocab in args.vocab:
        compare(args, vocab)
    print(f"{load()} after")


def load():
    return f"load {', '.join(f'{number:.1f}' for number in os.getloadavg())}"


if __name__ == "__main__":
    main()
