"""GUARD against its definition written out, one text at a time in plain Python."""

import math

import pytest
import torch
from conftest import ARCHITECTURES, make_tiny
from decoding_for_tests import PROMPTS, watched_sampling
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_draw_of_a_padded_batch_is_the_definition(name: str) -> None:
    """Through `generate`: several lengths, some texts end early, more steps than the window."""
    model = make_tiny(name)

    def sample(pad: int, **options: bool) -> list[list[int]]:
        return continuations(
            model, None, PROMPTS, max_new_tokens=11, do_sample=True,
            logits_processors=[Guard(pad_token_id=pad)], progress=False, **options,
        )  # fmt: skip

    end = sample(0, stop_at_eos=False)[1][4]
    model.config.eos_token_id = end  # which then pads the prompts, too
    with watched_sampling() as steps:
        made = sample(end)
    assert min(map(len, made)) < 11
    order = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
    for row, i in enumerate(order):
        entropies: list[float] = []
        for at in range(min(len(made[i]) + 1, 11)):
            text = [*PROMPTS[i], *made[i][:at]]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            expected = distribution(text, logits.tolist(), entropies)
            assert steps[at][row].tolist() == pytest.approx(expected, abs=1e-4)


def write(processor: Guard, some: list[list[int]], count: int = 20) -> list[list[int]]:
    return continuations(
        make_tiny("llama"), None, some, max_new_tokens=count, do_sample=True, stop_at_eos=False,
        logits_processors=[processor], progress=False,
    )  # fmt: skip


def test_one_processor_serves_many_calls() -> None:
    prompts = [[1, 5, 9], [1, 7], [1, 30, 31, 32]]
    used = Guard()
    first = write(used, prompts)
    assert write(used, prompts) == first == write(Guard(), prompts)
    assert write(used, prompts[:1]) == write(Guard(), prompts[:1])
    assert write(used, prompts) == first
    # A text that is given back to go on with starts anew as well.
    for count in (1, 9):
        (begun,) = write(used, prompts[:1], count)
        continued = [[*prompts[0], *begun]]
        assert write(used, continued) == write(Guard(), continued)


def logs(processor: Guard, text: list[int], logits: torch.Tensor) -> torch.Tensor:
    return processor(torch.tensor([text]), logits)


def test_what_begins_another_text_is_known_by_the_tokens() -> None:
    """Without `reset`, as in plain transformers."""
    generator = torch.Generator().manual_seed(0)
    flat, steep = torch.randn(2, 1, 30, generator=generator) * torch.tensor([[[0.1]], [[6.0]]])
    new = {text: logs(Guard(), list(text), flat) for text in ((5,), (5, 6), (5, 7, 8), (6, 6))}
    for text, expected in new.items():
        used = Guard()
        logs(used, [5, 7], steep)
        logs(used, [5, 7, 7], steep)
        assert torch.equal(logs(used, list(text), flat), expected)
    used = Guard()
    logs(used, [5, 7], steep)
    went_on = logs(used, [5, 7, 8], flat)
    assert not torch.equal(went_on, new[5, 7, 8])
    used.reset()
    assert torch.equal(logs(used, [5, 7, 8], flat), new[5, 7, 8])


def test_ties_keep_the_first_tokens_and_never_more_than_k() -> None:
    flat = torch.zeros(1, 40)
    kept = logs(Guard(), [0, 1], flat).isfinite()[0].nonzero().flatten().tolist()
    assert kept == list(range(10))
    few = logs(Guard(), [0, 1], torch.zeros(1, 4))
    assert few.exp().sum() == pytest.approx(1.0)
    assert few.isfinite().all()


def test_a_token_met_a_thousand_times_does_not_make_nan() -> None:
    guard, logits = Guard(), torch.tensor([[9.0, 8.0, 7.0, 0.0, 0.0]])
    found = logs(guard, [0, 1, 2, 3, 4] * 3000, logits)
    assert found.exp().sum() == pytest.approx(1.0)
    expected = torch.where(found.isfinite(), logits, -torch.inf).log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-5)  # all penalised alike: as if none were
    masked = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf, -torch.inf]])
    assert logs(Guard(), [0], masked).isfinite().tolist() == [[True, False, True, False, False]]


def test_plain_generate_called_twice_gives_the_same_twice() -> None:
    model = make_tiny("gpt2")
    guard = Guard()
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 15, "pad_token_id": PAD}

    def generate(tokens: torch.Tensor, processor: Guard) -> list[list[int]]:
        torch.manual_seed(0)
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), logits_processor=[processor], **settings
        ).tolist()

    tokens = torch.tensor([[1, 5, 9], [1, 7, 8]])
    first = generate(tokens, guard)
    assert generate(tokens, guard) == first
    for other in (tokens[:1], tokens.flip(0), torch.tensor([[1, 5, 9, 4]])):
        assert generate(other, guard) == generate(other, Guard())


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_without_a_median_is_refused(window: int) -> None:
    with pytest.raises(DecodingError, match="at least 2"):
        Guard(window=window)
