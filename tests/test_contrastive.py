"""Contrastive search against its definition: one text at a time, no cache, a whole pass per try."""

import math
from statistics import median

import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, lora, make_tiny, short
from decoding_for_tests import PROMPTS
from hypothesis import given
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

from hyperlens.decoding.contrastive import Adaptive, adaptive_contrastive_search, contrastive_search
from hyperlens.decoding.generate import continuations
from hyperlens.errors import CorpusError, DecodingError, LoadingError


def exact(name: str):
    """Sure of itself at some steps and not at others; in float64, so that rounding decides nothing.

    Gemma-2 stays in float32: transformers computes its attention so, and in float64 its logits
    are NaN behind pads.
    """
    changes = {"final_logit_softcapping": 30.0} if name == "gemma2" else {}
    model = make_tiny(name, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 4
    return model if name == "gemma2" else model.double()


class ByHand:
    """k and α of adaptive contrastive search for one text, formula by formula."""

    def __init__(self, q: float = 1.0, used: list[int] | None = None) -> None:
        self.q, self.whole, self.top = q, [], []
        self.used = [] if used is None else used

    def __call__(self, p: list[float]) -> tuple[int, float]:
        k = round(5 + 10 * self.sigmoid(entropy(p), self.whole, math.log(len(p))))
        k = min(k, len(p))
        self.used.append(k)
        first = sorted(p, reverse=True)[:k]
        alpha = self.sigmoid(entropy([x / sum(first) for x in first]), self.top, math.log(k))
        return k, alpha

    def sigmoid(self, now: float, earlier: list[float], largest: float) -> float:
        c = (now - median(earlier)) / largest if earlier else 0.0
        earlier.append(now)
        return 1 / (1 + math.exp(-self.q * math.atanh(c)))


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def by_hand(model, prompt: list[int], strength, count: int = 8, eos: int | None = 2) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = read(model, tokens)[0]
        p = logits.softmax(-1).tolist()
        k, alpha = strength(p)
        best, best_score = -1, -math.inf
        for token in sorted(range(len(p)), key=lambda i: (-logits[i].item(), i))[:k]:
            states = read(model, [*tokens, token])[1]
            nearest = max(
                float(states[-1] @ earlier / (states[-1].norm() * earlier.norm()))
                for earlier in states[:-1]
            )
            score = (1 - alpha) * p[token] - alpha * nearest
            if score > best_score:
                best, best_score = token, score
        if best == eos:
            break
        tokens.append(best)
    return tokens[len(prompt) :]


def read(model, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token's logits, and every token's last state."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return out.logits[0, -1], out.hidden_states[-1][0]


@pytest.mark.parametrize("name", short(ARCHITECTURES, "llama", "gemma2", "gpt2", "gpt_neox"))
def test_adaptive_search_is_its_definition(name: str) -> None:
    model = exact(name)
    # Steep, so that k differs from step to step and between the texts of a batch.
    used: list[int] = []
    rules = [ByHand(4.0, used) for _ in PROMPTS]
    expected = [by_hand(model, *each) for each in zip(PROMPTS, rules, strict=True)]
    for batch_size in (1, 3, 16):
        found = adaptive_contrastive_search(
            model, None, PROMPTS, q=4.0, max_new_tokens=8, batch_size=batch_size, progress=False
        )
        assert found == expected, batch_size
    # Otherwise this test could not fail.
    assert len(set(used)) > 2
    assert expected != continuations(model, None, PROMPTS, max_new_tokens=8, progress=False)


def test_where_hidden_states_end_does_not_matter() -> None:
    """With this flag transformers 5.23 gives `hidden_states[-1]` before the final norm."""
    model = exact("llama")
    options = {"q": 4.0, "max_new_tokens": 8, "progress": False}
    expected = adaptive_contrastive_search(model, None, PROMPTS, **options)
    model.config.tie_last_hidden_states = False
    assert adaptive_contrastive_search(model, None, PROMPTS, **options) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (7, 0.95)])
def test_fixed_search_is_its_definition(name: str, k: int, alpha: float) -> None:
    model = exact(name)
    found = contrastive_search(
        model, None, PROMPTS, k=k, alpha=alpha, max_new_tokens=8, progress=False
    )
    assert found == [by_hand(model, prompt, lambda p: (k, alpha)) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pads_are_no_text_and_all_tokens_are_enough_candidates(name: str) -> None:
    """With α = 1 the state farthest from all others wins: those of pads would often be nearest."""
    model = exact(name)
    prompts = [list(range(1, 13)), [1], [7, 9]]
    found = contrastive_search(
        model, None, prompts, k=200, alpha=1.0, max_new_tokens=3, progress=False
    )
    assert found == [by_hand(model, prompt, lambda p: (200, 1.0), 3) for prompt in prompts]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("options", [{"k": 5, "alpha": 0.0}, {"k": 1, "alpha": 0.6}])
def test_without_penalty_or_choice_it_is_greedy(name: str, options: dict) -> None:
    model = make_tiny(name)
    greedy = continuations(model, None, PROMPTS, max_new_tokens=10, progress=False)
    found = contrastive_search(model, None, PROMPTS, max_new_tokens=10, progress=False, **options)
    assert found == greedy


def test_of_tied_tokens_the_first_are_candidates_as_in_greedy_decoding() -> None:
    model = exact("llama")
    with torch.no_grad():
        model.lm_head.weight[20:] = 0  # forty tokens with a logit of exactly 0
    found = contrastive_search(
        model, None, PROMPTS, k=14, alpha=0.9, max_new_tokens=8, progress=False
    )
    assert found == [by_hand(model, prompt, lambda p: (14, 0.9)) for prompt in PROMPTS]
    assert any(token >= 20 for row in found for token in row)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    options = {"max_new_tokens": 3, "stop_at_eos": False, "progress": False}
    flat = contrastive_search(model, None, PROMPTS, k=3, alpha=0.0, **options)
    assert flat == continuations(model, None, PROMPTS, **options) == [[0, 0, 0]] * len(PROMPTS)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_texts_end_at_eos_each_in_its_own_time(batch_size: int) -> None:
    model = exact("llama")
    through = adaptive_contrastive_search(
        model, None, PROMPTS, max_new_tokens=8, stop_at_eos=False, progress=False
    )
    assert through == [by_hand(model, prompt, ByHand(), 8, None) for prompt in PROMPTS]
    model.config.eos_token_id = [through[0][0], through[2][3]]
    model.generation_config.eos_token_id = None
    ended = adaptive_contrastive_search(
        model, None, PROMPTS, max_new_tokens=8, batch_size=batch_size, progress=False
    )
    lengths = set()
    for row, whole in zip(ended, through, strict=True):
        ends = [i for i, token in enumerate(whole) if token in model.config.eos_token_id]
        assert row == whole[: ends[0] if ends else None]
        lengths.add(len(row))
    assert 0 in lengths
    assert len(lengths) > 1


def test_nothing_leaks_between_calls_and_the_model_stays_as_it_was() -> None:
    model = exact("llama").train()

    def write(prompts: list[list[int]]) -> list[list[int]]:
        return adaptive_contrastive_search(
            model, None, prompts, max_new_tokens=8, progress=False
        )  # fmt: skip

    first = write(PROMPTS)
    assert write(PROMPTS) == first
    assert write(PROMPTS[:1]) == first[:1]
    assert write(PROMPTS[::-1]) == first[::-1]
    continued = [[*prompt, *new] for prompt, new in zip(PROMPTS, first, strict=True)]
    assert write(continued) == [by_hand(model.eval(), text, ByHand()) for text in continued]
    assert not model.training
    model.train()
    write(PROMPTS)
    assert model.training


def test_an_adapter_searches_too() -> None:
    model = lora(exact("llama"), "llama").double()
    found = adaptive_contrastive_search(model, None, PROMPTS, max_new_tokens=6, progress=False)
    assert found == [by_hand(model, prompt, ByHand(), 6) for prompt in PROMPTS]


def test_half_precision_searches_too_and_nan_is_refused() -> None:
    model = make_tiny("llama").bfloat16()
    found = adaptive_contrastive_search(
        model, None, PROMPTS, max_new_tokens=6, stop_at_eos=False, progress=False
    )
    assert [len(row) for row in found] == [6] * len(PROMPTS)
    with torch.no_grad():
        model.lm_head.weight[:, 0] = torch.nan
    with pytest.raises(DecodingError, match="NaN"):
        adaptive_contrastive_search(model, None, PROMPTS, max_new_tokens=6, progress=False)


DISTRIBUTIONS = st.lists(
    st.lists(st.floats(-8, 8), min_size=20, max_size=20), min_size=1, max_size=9
)


@given(DISTRIBUTIONS, st.sampled_from([0.5, 1.0, 4.0]))
def test_strengths_are_the_formulas(steps: list[list[float]], q: float) -> None:
    rule, expected = Adaptive(q), ByHand(q)
    for logits in steps:
        p = torch.tensor([logits], dtype=torch.float64).softmax(-1)
        k, alpha = rule(p)
        by_formula = expected(p[0].tolist())
        assert int(k) == by_formula[0]
        assert float(alpha) == pytest.approx(by_formula[1], abs=1e-9)


def test_strengths_at_the_edges() -> None:
    rule = Adaptive()
    flat, sure = torch.full((1, 40), 1 / 40), torch.eye(40)[:1]
    assert (int(rule(flat)[0]), float(rule(sure)[1])) == (10, 0.0)
    assert int(rule(sure)[0]) < 10
    one = Adaptive()
    for _ in range(3):
        k, alpha = one(torch.ones(2, 1))
        assert (k.tolist(), alpha.tolist()) == ([1, 1], [0.5, 0.5])


def test_refusals_say_what_to_do() -> None:
    model = make_tiny("llama")
    common = {"max_new_tokens": 2, "progress": False}
    for options, said in (({"k": 0, "alpha": 0.5}, "k must"), ({"k": 3, "alpha": 1.5}, "alpha")):
        with pytest.raises(DecodingError, match=said):
            contrastive_search(model, None, PROMPTS, **options, **common)
    for q in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DecodingError, match="q must"):
            adaptive_contrastive_search(model, None, PROMPTS, q=q, **common)
    with pytest.raises(CorpusError, match="64 positions"):
        contrastive_search(
            model, None, [[1] * 60], k=3, alpha=0.5, max_new_tokens=8, progress=False
        )
    with pytest.raises(LoadingError, match="PreTrainedModel"):
        contrastive_search(torch.nn.Linear(2, 2), None, PROMPTS, k=3, alpha=0.5, **common)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": D_VOCAB, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(**sizes))
    with pytest.raises(DecodingError, match="no cache of keys and values"):
        contrastive_search(mamba, None, PROMPTS, k=3, alpha=0.5, **common)
