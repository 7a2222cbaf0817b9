"""Batched continuations say what one prompt at a time says, whatever the checkpoint wishes."""

import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, lora, make_tiny
from transformers import LogitsProcessor

from hyperlens.decoding.generate import continuations
from hyperlens.errors import CorpusError, LoadingError

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 30, 31, 32, 33, 34, 8], [1], [1, 7, 7]]


def by_hand(model, prompt: list[int], count: int, eos: int | None) -> list[int]:
    """The plain loop: no cache, no padding."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits
        best = int(logits[0, -1].argmax())
        if best == eos:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_greedy_is_the_plain_loop(name: str, batch_size: int) -> None:
    model = make_tiny(name)
    found = continuations(
        model, None, PROMPTS, max_new_tokens=12, batch_size=batch_size, progress=False
    )
    assert found == [by_hand(model, prompt, 12, 2) for prompt in PROMPTS]


def test_it_ends_at_eos_or_writes_through_it() -> None:
    model = make_tiny("llama")
    first = by_hand(model, PROMPTS[0], 6, None)
    model.config.eos_token_id = first[3]
    ended = continuations(model, None, PROMPTS, max_new_tokens=6, progress=False)
    through = continuations(
        model, None, PROMPTS, max_new_tokens=6, stop_at_eos=False, progress=False
    )
    assert ended[0] == first[: first.index(first[3])]
    assert through == [by_hand(model, prompt, 6, None) for prompt in PROMPTS]


def test_the_checkpoints_own_settings_do_not_count() -> None:
    model = make_tiny("llama")
    plain = continuations(model, None, PROMPTS, max_new_tokens=8, progress=False)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 3.0
    settings.max_length = 3
    again = continuations(model, None, PROMPTS, max_new_tokens=8, progress=False)
    assert again == plain
    assert model.generation_config is settings
    assert settings.repetition_penalty == 3.0


def test_sampling_has_a_seed_of_its_own() -> None:
    model = make_tiny("llama").train()
    torch.manual_seed(7)
    expected = torch.rand(3)

    def sample(seed: int) -> list[list[int]]:
        return continuations(
            model, None, PROMPTS, max_new_tokens=8, do_sample=True, seed=seed, progress=False
        )

    torch.manual_seed(7)
    first, again, other = sample(0), sample(0), sample(1)
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other
    assert model.training


def test_a_low_temperature_and_a_narrow_nucleus_are_greedy() -> None:
    model = make_tiny("qwen2")
    greedy = continuations(model, None, PROMPTS, max_new_tokens=8, progress=False)
    for sampling in ({"temperature": 1e-4}, {"top_p": 1e-6}, {"min_p": 1.0}):
        found = continuations(
            model, None, PROMPTS, max_new_tokens=8, do_sample=True, progress=False, **sampling
        )
        assert found == greedy, sampling


def test_sampling_reaches_past_the_first_fifty_tokens() -> None:
    model = make_tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is equally likely
    found = continuations(
        model, None, [[1]] * 60, max_new_tokens=40, do_sample=True, stop_at_eos=False,
        batch_size=60, progress=False,
    )  # fmt: skip
    assert {token for row in found for token in row} == set(range(D_VOCAB))


class Only(LogitsProcessor):
    """Lets one token through."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = torch.full_like(scores, -torch.inf)
        wanted[:, self.token] = 0.0
        return wanted


def test_logits_processors_are_applied() -> None:
    found = continuations(
        make_tiny("gpt2"), None, PROMPTS, max_new_tokens=3, logits_processors=[Only(9)],
        progress=False,
    )  # fmt: skip
    assert found == [[9, 9, 9]] * len(PROMPTS)


def test_an_adapter_writes_too() -> None:
    model = lora(make_tiny("gpt2"), "gpt2")
    found = continuations(model, None, PROMPTS, max_new_tokens=5, progress=False)
    assert found == [by_hand(model, prompt, 5, 2) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("prompts", "count", "said"),
    [
        ([], 4, "empty"),
        ([[1], []], 4, "empty"),
        ([[1]], 0, "max_new_tokens"),
        ([[1] * 60], 8, "64 positions"),
    ],
)
def test_refusals_say_what_to_do(prompts: list, count: int, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        continuations(make_tiny("llama"), None, prompts, max_new_tokens=count, progress=False)


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(LoadingError, match="PreTrainedModel"):
        continuations(torch.nn.Linear(2, 2), None, PROMPTS, max_new_tokens=1, progress=False)
