"""What is sampled from, token by token: temperature, top-p and min-p against their definitions."""

import math

import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, make_tiny
from decoding_for_tests import PROMPTS, Given, next_probabilities, watched_sampling
from hypothesis import assume, given
from hypothesis import strategies as st

from hyperlens.decoding.generate import continuations
from hyperlens.errors import DecodingError

# Small whole numbers, so that many logits are tied; and any numbers.
LOGITS = st.one_of(
    st.lists(st.integers(-3, 3), min_size=D_VOCAB, max_size=D_VOCAB),
    st.lists(st.floats(-9, 9, width=32), min_size=D_VOCAB, max_size=D_VOCAB),
)
SHARES = st.floats(0.01, 0.99)
TINY = make_tiny("llama")


def drawn_from(logits: list[float], **sampling: object) -> list[float]:
    """The probabilities one token is drawn from."""
    given_logits = Given(torch.tensor(logits, dtype=torch.float32))
    with watched_sampling() as steps:
        continuations(
            TINY, None, [[1, 5]], max_new_tokens=1, do_sample=True,
            logits_processors=[given_logits], progress=False, **sampling,
        )  # fmt: skip
    return steps[0][0].tolist()


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def renormalised(p: list[float], kept: list[bool]) -> list[float]:
    total = sum(x for x, keep in zip(p, kept, strict=True) if keep)
    return [x / total if keep else 0.0 for x, keep in zip(p, kept, strict=True)]


@given(LOGITS, st.floats(0.05, 5))
def test_temperature_divides_logits(logits: list[float], temperature: float) -> None:
    expected = softmax([x / temperature for x in logits])
    assert drawn_from(logits, temperature=temperature) == pytest.approx(expected, abs=1e-5)


@given(LOGITS, SHARES)
def test_top_p_is_the_smallest_set_of_likely_tokens_with_that_mass(
    logits: list[float], top_p: float
) -> None:
    p = softmax(logits)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    masses = [sum(p[i] for i in order[:count]) for count in range(1, len(p) + 1)]
    # A sum that rounding may put on either side of the threshold decides nothing here.
    assume(min(abs(mass - top_p) for mass in masses) > 1e-5)
    count = 1 + sum(mass < top_p for mass in masses)
    found = drawn_from(logits, top_p=top_p)
    kept = [x > 0 for x in found]
    assert sum(kept) == count
    # Which of tied tokens are in is free; nothing outside may be likelier than what is inside.
    inside = [x for x, keep in zip(p, kept, strict=True) if keep]
    outside = [x for x, keep in zip(p, kept, strict=True) if not keep]
    assert min(inside) >= max(outside, default=0.0) - 1e-12
    assert found == pytest.approx(renormalised(p, kept), abs=1e-5)


@given(LOGITS, SHARES)
def test_min_p_keeps_what_is_likely_beside_the_likeliest(logits: list[float], min_p: float) -> None:
    p = softmax(logits)
    threshold = min_p * max(p)
    assume(min(abs(x / threshold - 1) for x in p) > 1e-5)
    kept = [x >= threshold for x in p]
    found = drawn_from(logits, min_p=min_p)
    assert [x > 0 for x in found] == kept
    assert found == pytest.approx(renormalised(p, kept), abs=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_draw_of_a_padded_batch_is_one_text_at_a_time(name: str) -> None:
    """Prompts of several lengths, some of which end early."""
    model = make_tiny(name)
    options = {"max_new_tokens": 10, "do_sample": True, "progress": False}
    through = continuations(model, None, PROMPTS, stop_at_eos=False, **options)
    model.config.eos_token_id = through[1][4]
    with watched_sampling() as steps:
        made = continuations(model, None, PROMPTS, **options)
    order = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
    assert min(map(len, made)) < 10
    for at, p in enumerate(steps):
        for row, i in enumerate(order):
            if at <= len(made[i]):  # the draw of EOS itself included
                expected = next_probabilities(model, [*PROMPTS[i], *made[i][:at]])
                assert p[row].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature", [1e-4, 1e-5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_colder_the_greedier(name: str, temperature: float) -> None:
    model = make_tiny(name)
    greedy = continuations(model, None, PROMPTS, max_new_tokens=8, progress=False)
    cold = continuations(
        model, None, PROMPTS, max_new_tokens=8, do_sample=True, temperature=temperature,
        progress=False,
    )  # fmt: skip
    assert cold == greedy


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 2.0}, "min_p"),
    ],
)
def test_settings_out_of_range_are_refused(sampling: dict, said: str) -> None:
    with pytest.raises(DecodingError, match=said):
        continuations(
            TINY, None, PROMPTS, max_new_tokens=1, do_sample=True, progress=False, **sampling
        )
