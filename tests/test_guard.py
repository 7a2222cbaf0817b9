"""GUARD against its definition written out, one text at a time in plain Python."""

import math

import pytest
import torch
from conftest import make_tiny
from hypothesis import given
from hypothesis import strategies as st

from hyperlens.decoding.generate import continuations
from hyperlens.decoding.guard import Guard, strengths
from hyperlens.errors import DecodingError


def median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def by_hand(entropies: list[float], window: int, vocabulary: int) -> tuple[float, float]:
    """k and α, formula by formula."""
    t, now = len(entropies), entropies[-1]
    c_loc = 0.0
    if t > 1:
        c_loc = clip(abs(now - entropies[-2]) / (entropies[-2] + 1e-4), 0, 1)
    if t < window:
        d_loc, d_glob, c_glob = now - median(entropies), 0.0, 0.0
    else:
        weights = [0.95 ** (t - 1 - i) for i in range(t)]
        g = sum(w * h for w, h in zip(weights, entropies, strict=True)) / sum(weights)
        m = median(entropies[-(window - 1) :])
        d_loc, d_glob = now - median(entropies[-window:]), m - g
        c_glob = clip(abs(m - g) / (m + 1e-4), 0, 1)
    q = 0.9 + 0.1 * (1 + c_loc + c_glob)

    def x(scale: float) -> float:
        edge = 1 - 1e-4
        a, b = (q * math.atanh(clip(d / scale, -edge, edge)) for d in (d_loc, d_glob))
        lam = abs(a) / (abs(a) + abs(b) + 1e-4)
        return lam * a + (1 - lam) * b

    def sigmoid(y: float) -> float:
        return 1 / (1 + math.exp(-y))

    k = 5 + 10 * sigmoid(x(math.log(vocabulary)))
    return k, sigmoid(x(math.log(k + 1e-4)))


@given(st.lists(st.floats(0.0, 6.0), min_size=1, max_size=20), st.integers(2, 8))
def test_strengths_are_the_formulas(entropies: list[float], window: int) -> None:
    history = torch.tensor([entropies], dtype=torch.float64)
    k, alpha = strengths(history, window, 400)
    expected = by_hand(entropies, window, 400)
    assert (float(k), float(alpha)) == pytest.approx(expected, rel=1e-9)
    assert 5 <= float(k) <= 15


def distribution(text: list[int], logits: list[float], entropies: list[float]) -> list[float]:
    """The next token's probabilities, and this step's entropy added to the list."""
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    p = [w / sum(weights) for w in weights]
    entropies.append(-sum(x * math.log(x + 1e-5) for x in p))
    k, alpha = by_hand(entropies, 7, len(p))
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = [p[i] * alpha ** text.count(i) if i in order[: int(k)] else 0.0 for i in range(len(p))]
    return [x / sum(kept) for x in kept]


PAD = 0


def test_batches_pads_and_ends_are_one_text_at_a_time() -> None:
    """Rows of several lengths, padded on the left, over more steps than the window."""
    generator = torch.Generator().manual_seed(0)
    texts = [[5, 6, 5, 5], [7], [8, 9, 8]]
    guard = Guard(pad_token_id=PAD)
    histories: list[list[float]] = [[] for _ in texts]
    for _ in range(12):
        width = max(map(len, texts))
        ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
        logits = 3 * torch.randn(len(texts), 40, generator=generator, dtype=torch.float64)
        found = guard(ids, logits).exp()
        for row, (text, history) in enumerate(zip(texts, histories, strict=True)):
            expected = distribution(text, logits[row].tolist(), history)
            assert found[row].tolist() == pytest.approx(expected, abs=1e-9)
        chosen = torch.multinomial(found, 1, generator=generator).flatten().tolist()
        texts = [[*text, token] for text, token in zip(texts, chosen, strict=True)]


def test_one_processor_serves_many_calls() -> None:
    model = make_tiny("llama")
    prompts = [[1, 5, 9], [1, 7], [1, 30, 31, 32]]

    def write(processor: Guard, some: list[list[int]]) -> list[list[int]]:
        return continuations(
            model, None, some, max_new_tokens=20, do_sample=True, stop_at_eos=False,
            logits_processors=[processor], progress=False,
        )  # fmt: skip

    used = Guard()
    first = write(used, prompts)
    assert write(used, prompts) == first == write(Guard(), prompts)
    assert write(used, prompts[:1]) == write(Guard(), prompts[:1])


def test_it_works_in_plain_generate_and_ends_early() -> None:
    model = make_tiny("gpt2")
    tokens = torch.tensor([[1, 5, 9], [1, 7, 8]])
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 15, "pad_token_id": PAD}
    torch.manual_seed(0)
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), logits_processor=[Guard()], **settings
    )
    assert made.shape[0] == 2
    with pytest.raises(DecodingError, match="at least 2"):
        Guard(window=1)
