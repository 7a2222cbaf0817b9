"""Late-stage LoRA with the frozen-prefix cache against what people run today, one run.

    python benchmarks/train_speed.py [--layers 24 --d-model 512 --last-k 5 ...]
    python benchmarks/train_speed.py --vocab 4096,32000,128256  # or: make bench

All sides train the same random Llama on the same sequences with AdamW, batches of 8, float32:

- full LoRA: transformers' Trainer and peft, adapters on every block;
- late-stage LoRA: the same, adapters on the last k blocks (peft's layers_to_transform);
- hyperfit(method="late_lora"): with the cache and, for comparison, without;
- the suffix alone: k blocks, norm and unembedding, forward + backward + step in a bare loop on
  residuals that are already there. Nothing that trains these blocks can be faster.

Seconds per epoch, the median over epochs after the first; the cache is filled before it. Memory is
the peak of what the process holds above what it held before the side began, model included. The
sides take turns, so that a change of the machine's mood meets all of them.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
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
        self.start = time.perf_counter()

    def on_epoch_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def plain_peft(args, tokens, blocks):
    """What the documentation of peft and transformers shows."""
    config = LoraConfig(
        r=16,
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
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    core.layers = core.layers[first:]
    get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    places = core.rotary_emb(hidden[:BATCH], torch.arange(args.length)[None])
    seconds = []
    for _ in range(args.epochs):
        begun = time.perf_counter()
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
        seconds.append(time.perf_counter() - begun)
    return seconds


def sides_of(args, tokens):
    late = list(range(args.layers - args.last_k, args.layers))
    return {
        "full LoRA, Trainer + peft": lambda: plain_peft(args, tokens, list(range(args.layers))),
        "late-stage LoRA, Trainer + peft": lambda: plain_peft(args, tokens, late),
        "hyperfit late_lora, no cache": lambda: ours(args, tokens, False),
        OURS: lambda: ours(args, tokens, True),
        "the suffix alone, bare loop": lambda: suffix_alone(args, tokens),
    }


def measured(run):
    """Seconds of each epoch after the first, and the bytes that the side took at most."""
    gc.collect()
    held = psutil.Process().memory_info().rss
    peak_bytes(forget=True)
    seconds = run()[1:]
    return seconds, peak_bytes() - held


def compare(args):
    """Print the table of one vocabulary."""
    torch.manual_seed(1)
    tokens = torch.randint(args.vocab, (args.sequences, args.length))
    sides = sides_of(args, tokens)
    seconds = {side: [] for side in sides}
    memory = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, run in sides.items():
            epochs, n_bytes = measured(run)
            seconds[side] += epochs
            memory[side].append(n_bytes / 2**20)
    own = statistics.median(seconds[OURS])
    print(f"vocabulary {args.vocab:<23,}{'s / epoch':>10}{'times':>8}{'MiB':>9}")
    for side, values in seconds.items():
        value = statistics.median(values)
        print(
            f"{side:34}{value:10.2f}{value / own:7.2f}x{statistics.median(memory[side]):9,.0f}",
            flush=True,
        )


def vocabularies(text):
    return [int(number) for number in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("layers", 24), ("d-model", 512), ("sequences", 32), ("length", 128),
        ("last-k", 5), ("epochs", 4), ("rounds", 3), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=vocabularies, default=[4096], help="one or several: N,N")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(
        f"Llama of {args.layers} blocks, d_model {args.d_model}, last {args.last_k} trained, "
        f"{args.sequences} x {args.length} tokens, batch {BATCH}, float32, {args.threads} "
        f"threads, {processor()}, torch {torch.__version__}; median of {args.rounds} x "
        f"{args.epochs - 1} epochs; load {', '.join(f'{n:.1f}' for n in os.getloadavg())} before",
        flush=True,
    )
    for vocab in args.vocab:
        compare(argparse.Namespace(**{**vars(args), "vocab": vocab}))
    print(f"load {', '.join(f'{n:.1f}' for n in os.getloadavg())} after")


if __name__ == "__main__":
    main()
