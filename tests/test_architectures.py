"""Every architecture is read right, held against plain forward hooks, or refused in one line."""

import re

import pytest
import torch
from architectures_for_tests import COLUMNS, KINDS, make, outcome
from conftest import ROOT

from hyperlens.errors import LoadingError
from hyperlens.models.structure import find_structure

PAGE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w-]+)`" + len(COLUMNS) * r" \| ([\w ]+)" + r" \|", re.MULTILINE)
ROWS = {kind: tuple(statuses) for kind, *statuses in ROW.findall(PAGE)}
DTYPES = (torch.float32, torch.bfloat16)
# Each differs from Llama in what it could be misread by: soft caps of two names, no final norm,
# states instead of attention, two kinds of blocks, experts, latent attention, scaled logits.
SHORT = {
    **dict.fromkeys(
        ("gemma2", "recurrent_gemma", "openai-gpt", "mamba", "granitemoehybrid"), "right"
    ),
    **dict.fromkeys(
        ("falcon_h1", "gpt_oss", "deepseek_v3", "cohere", "gptj", "qwen3_next"), "right"
    ),
    **dict.fromkeys(("bert", "rwkv", "blenderbot-small"), "refused"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SHORT)
def test_it_is_read_right_or_refused(kind: str, dtype: torch.dtype) -> None:
    status, why = outcome(kind, dtype)
    assert status == SHORT[kind], why
    assert "\n" not in why


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # of peft, about experts
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_becomes_of_it(kind: str) -> None:
    assert tuple(outcome(kind, *column)[0] for column in COLUMNS.values()) == ROWS[kind]


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys"
)  # of peft, about experts
@pytest.mark.parametrize("form", ["folder", "adapter"])
@pytest.mark.parametrize("kind", ["gemma2", "deepseek_v3", "laguna"])
def test_folders_and_adapters_are_read_as_objects_are(kind: str, form: str) -> None:
    """Of Laguna peft leaves the shared experts' adapters at random values when it reads them."""
    status, why = outcome(kind, form=form)
    assert status == ("refused" if (kind, form) == ("laguna", "adapter") else "right"), why
    assert status == ROWS[kind][[*COLUMNS].index(form)]


def test_no_row_of_the_page_is_wrong() -> None:
    assert ROWS.keys() >= SHORT.keys()
    assert not any("wrong" in row for row in ROWS.values())
    for kind, status in SHORT.items():
        assert ROWS[kind][:2] == (status, status)


def test_a_scale_before_a_soft_cap_is_found() -> None:
    model = make("llama")
    with_logits(model, lambda logits: 7.5 * torch.tanh(0.25 * logits / 7.5))
    found = find_structure(model)
    assert (found.logit_scale, found.soft_cap) == (pytest.approx(0.25), pytest.approx(7.5))


def test_logits_made_in_another_way_are_refused() -> None:
    model = make("llama")
    with_logits(model, lambda logits: logits + 1)
    with pytest.raises(LoadingError, match="neither a multiple nor a soft cap"):
        find_structure(model)


def with_logits(model, change) -> None:
    """Let a model's forward change its logits."""
    plain = model.forward

    def forward(**given):
        output = plain(**given)
        output.logits = change(output.logits)
        return output

    model.forward = forward
