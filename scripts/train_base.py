"""Train the base model that ships with hyperlens: `python scripts/train_base.py TEXTS OUT`.

TEXTS is a folder of plain text books. The last twentieth of every book is held out. Nothing in
hyperlens needs this script; it is kept so that the embedded model can be made again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 10,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LENGTH, BATCH, LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 256, 8, 2e-3, 100, 0.1
HELD_OUT = 20
START, END = "<s>", "</s>"
STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "_": ""})


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a book: hard-wrapped lines joined, quotes straight, spaces single."""
    text = text.lstrip("\ufeff").translate(STRAIGHT)
    blocks = re.split(r"\n\s*\n", text)
    joined = (" ".join(block.split()) for block in blocks)
    return [block for block in joined if block and not block.startswith("[")]


def split(folder: Path) -> tuple[list[str], list[str]]:
    """Training and held-out text, one string per book each."""
    train, held = [], []
    for path in sorted(folder.glob("*.txt")):
        blocks = paragraphs(path.read_text(encoding="utf-8"))
        cut = len(blocks) - len(blocks) // HELD_OUT
        train.append("\n".join(blocks[:cut]))
        held.append("\n".join(blocks[cut:]))
    if not train:
        raise SystemExit(f"expected .txt files in {folder}, found none")
    return train, held


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer that puts the start token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"],
            special_tokens=[START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=SHAPE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def windows(stream: Tensor, offset: int) -> Tensor:
    """The stream from `offset` on, cut into rows that all begin with the start token."""
    width = LENGTH - 1
    rows = (len(stream) - offset) // width
    cut = stream[offset : offset + rows * width].reshape(rows, width)
    return torch.cat([torch.zeros(rows, 1, dtype=torch.long), cut], dim=1)


def batches(stream: Tensor, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches; every epoch cuts its windows elsewhere."""
    for _ in range(epochs):
        rows = windows(stream, int(torch.randint(LENGTH - 1, (1,), generator=generator)))
        order = torch.randperm(len(rows), generator=generator)
        for some in order[: len(order) // BATCH * BATCH].split(BATCH):  # type: ignore[no-untyped-call]
            yield rows[some]


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, stream: Tensor) -> float:
    """Mean over the held-out windows."""
    rows = windows(stream, 0)
    parts = [(loss_of(model, some).item(), len(some)) for some in rows.split(2 * BATCH)]  # type: ignore[no-untyped-call]
    return sum(loss * count for loss, count in parts) / len(rows)


def unigram_loss(train: Tensor, held: Tensor) -> float:
    """What a model that knows only how frequent every token is (plus one) gets."""
    counts = Counter(train.tolist())
    total = len(train) + SHAPE["vocab_size"]
    return float(np.mean([math.log(total / (counts[token] + 1)) for token in held.tolist()]))


def train(texts: Path, out: Path, epochs: int, seed: int) -> dict[str, float]:
    """Train, save to `out` in bfloat16, and return the numbers of the model card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    books, held_books = split(texts)
    tokenizer = make_tokenizer(books)

    def stream_of(parts: Sequence[str]) -> Tensor:
        return torch.tensor(
            [
                token
                for part in parts
                for token in tokenizer(part, add_special_tokens=False)["input_ids"]
            ]
        )

    tokenizer.model_max_length = 10**9
    stream, held = stream_of(books), stream_of(held_books)
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    config = LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = LlamaForCausalLM(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{n_parameters:,} parameters, {len(stream):,} tokens, {len(held):,} held out", flush=True
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    # The number of rows can differ by one between epochs.
    steps = epochs * ((len(stream) - LENGTH) // (LENGTH - 1) // BATCH)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / WARM_UP)
        return warm * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    every = max(1, steps // epochs // 2)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(batches(stream, epochs, generator), total=steps, disable=not sys.stderr.isatty())
    running = 0.0
    for step, tokens in enumerate(bar, 1):
        loss = loss_of(model, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if step % every == 0:
            print(
                f"step {step}/{steps}  train {running / every:.3f}  "
                f"held out {held_out_loss(model, held):.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
            running = 0.0
    model.eval().to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _in_float32(out / "config.json")
    numbers = {
        "parameters": n_parameters,
        "train_tokens": len(stream),
        "held_out_tokens": len(held),
        "held_out_loss": held_out_loss(model.float(), held),
        "unigram_loss": unigram_loss(stream, held),
        "seconds": time.monotonic() - started,
    }
    (out / "training.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return numbers


def _in_float32(path: Path) -> None:
    """Stored in bfloat16 to be small; opened in float32, because that is what one computes in."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, help="a folder of .txt books")
    parser.add_argument("out", type=Path, help="where the model goes")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, value in train(given.texts, given.out, given.epochs, given.seed).items():
        print(f"{name}: {value:,.3f}")
