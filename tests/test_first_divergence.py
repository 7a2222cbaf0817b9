"""Where two models part: against a plain loop with hooks, and where the change was planted."""

import copy
import math

import pytest
import torch
from conftest import lora, make_tiny, perturbed, token_texts
from scipy import stats
from test_prompts import one_token_per_byte

from hyperlens import cli, write_report
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import CorpusError, LoadingError
from hyperlens.experiments import FirstDivergenceResult, find_first_divergence
from hyperlens.statistics.significance import sign_flip_p

TEXTS = token_texts(12, shortest=8, longest=20)
SHORT = {"prompt_tokens": 6, "max_new_tokens": 8, "n_prompts": 10, "progress": False}


def said(found: FirstDivergenceResult) -> str:
    return " ".join(found.summary().split())


def blocks_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def greedy(model, ids, n):
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def entering(model, ids, layer):
    """The residual stream that enters a block, or leaves the last one."""
    kept = []
    blocks = blocks_of(model)
    if layer < len(blocks):
        hook = blocks[layer].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    else:
        hook = blocks[-1].register_forward_hook(
            lambda _, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
    with hook, torch.no_grad():
        model(torch.tensor([ids]))
    return kept[0]


def logits_from(model, ids, layer, residual):
    """The last logits of a model of which a block gets another residual."""
    blocks = blocks_of(model)
    if layer < len(blocks):
        hook = blocks[layer].register_forward_pre_hook(lambda _, args: (residual, *args[1:]))
    else:
        hook = blocks[-1].register_forward_hook(
            lambda _, args, out: (residual, *out[1:]) if isinstance(out, tuple) else residual
        )
    with hook, torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double()


def by_hand(base, tuned):
    """Margins of each parting by layer, (entering, late); the prompts are all texts' openings."""
    found = []
    for text in TEXTS:
        prompt = list(text[:6])
        ours, theirs = (greedy(model, prompt, 8) for model in (base, tuned))
        step = next((i for i in range(14) if ours[i] != theirs[i]), None)
        if step is None:
            continue
        ids, a, b = ours[:step], ours[step], theirs[step]
        layers = []
        for layer in range(4):
            margins = [
                [
                    logits_from(late, ids, layer, entering(early, ids, layer))
                    for late in (base, tuned)
                ]
                for early in (base, tuned)
            ]
            layers.append([[float(logits[b] - logits[a]) for logits in row] for row in margins])
        found.append(layers)
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_equals_a_plain_loop_with_hooks(name: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base, 0.1)
    found = find_first_divergence(base, tuned, TEXTS, **SHORT | {"n_prompts": 99})
    margins = by_hand(base, tuned)
    assert found.extras["n_parted"] == len(margins) > 3
    assert found.extras["n_near_ties"] == 0
    for layer in range(4):
        late = [(m[layer][0][1] - m[layer][0][0] + m[layer][1][1] - m[layer][1][0]) / 2
                for m in margins]  # fmt: skip
        change = [m[layer][1][1] - m[layer][0][0] for m in margins]
        assert found.value(layer=layer, metric="late") == pytest.approx(
            sum(late) / len(late), rel=1e-4, abs=1e-4
        )
        assert found.value(layer=layer, metric="late_share") == pytest.approx(
            sum(late) / sum(change), rel=1e-4, abs=1e-5
        )
        flips = sum(m[layer][0][1] > 0 for m in margins) / len(margins)
        assert found.value(layer=layer, metric="late_flips") == pytest.approx(flips)
        incoming, total = found.value(layer=layer, metric="incoming"), sum(change) / len(change)
        assert found.value(layer=layer, metric="late") + incoming == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("block", "name"), [(0, "llama"), (2, "llama"), (1, "qwen2")])
def test_a_change_of_one_block_is_before_or_after_the_cut(block: int, name: str) -> None:
    base = make_tiny(name)
    tuned = copy.deepcopy(base)
    changed = perturbed(base, 0.3)
    blocks_of(tuned)[block].load_state_dict(blocks_of(changed)[block].state_dict())
    found = find_first_divergence(base, tuned, TEXTS, **SHORT)
    assert found.extras["n_parted"] > 5
    for layer in range(4):
        is_late = layer <= block
        assert found.value(layer=layer, metric="late_share") == float(is_late)
        assert found.value(layer=layer, metric="late_flips") == float(is_late)
        assert found.value(layer=layer, metric="incoming_flips") == float(not is_late)
        assert found.value(layer=layer, metric="interaction") == 0.0
    assert found.fewest_late_blocks() == 3 - block
    assert ("The last block" if block == 2 else f"The last {3 - block} blocks") in said(found)


def test_a_change_of_the_unembedding_needs_no_block() -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    torch.manual_seed(3)
    tuned.lm_head.weight.data += 0.3 * torch.randn_like(tuned.lm_head.weight)
    found = find_first_divergence(base, tuned, TEXTS, **SHORT)
    assert found.fewest_late_blocks() == 0
    assert "• The final norm and the unembedding make" in said(found)


def test_the_same_model_never_parts(tmp_path) -> None:
    base = make_tiny("llama")
    found = find_first_divergence(base, copy.deepcopy(base), TEXTS, **SHORT)
    assert (found.extras["n_parted"], found.table) == (0, ())
    assert "write the same after all 10 prompts" in said(found)
    found.save(tmp_path / "out")
    assert FirstDivergenceResult.load(tmp_path / "out").to_dict() == found.to_dict()
    write_report(tmp_path / "page.html", [found])


def test_an_adapter_and_batches_do_not_matter() -> None:
    base = make_tiny("llama")
    adapter = lora(copy.deepcopy(base), "llama")
    whole, single = (
        find_first_divergence(base, adapter, TEXTS, batch_size=n, **SHORT) for n in (8, 1)
    )
    merged = find_first_divergence(base, copy.deepcopy(adapter).merge_and_unload(), TEXTS, **SHORT)
    for a, b, c in zip(whole.table, single.table, merged.table, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-4, abs=1e-4)
        assert a["value"] == pytest.approx(c["value"], rel=1e-3, abs=1e-3)


def test_few_disagreements_cannot_tell() -> None:
    base = make_tiny("llama")
    found = find_first_divergence(base, perturbed(base, 0.1), TEXTS, **SHORT | {"n_prompts": 3})
    assert 0 < found.extras["n_parted"] <= 3
    assert "cannot be told" in said(found)


def test_words_kinds_and_the_page(tmp_path) -> None:
    base = make_tiny("llama", vocab_size=300)
    tokenizer = one_token_per_byte()
    texts = [f"{k} once upon a time there was a king" for k in range(10)]
    found = find_first_divergence(
        (base, tokenizer), (perturbed(base, 0.2), tokenizer), texts, **SHORT
    )
    total = found.extras["n_parted"] - found.extras["n_near_ties"]
    assert sum(one["count"] for one in found.extras["kinds"]) == total > 3
    assert len(found.extras["examples"]) == min(12, total)
    for one in found.extras["examples"]:
        assert one["base_margin"] < 0 < one["tuned_margin"]
        assert one["base_token"] != one["tuned_token"]
    write_report(tmp_path / "page.html", [found])
    page = (tmp_path / "page.html").read_text()
    assert 'data-section="first_divergence"' in page
    assert "the base writes a" in said(found)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base)
    with pytest.raises(CorpusError, match="do not fit the model's context"):
        find_first_divergence(base, tuned, TEXTS, prompt_tokens=6, max_new_tokens=10_000)
    from hyperlens import load_hooked

    with pytest.raises(LoadingError, match="cannot generate"):
        find_first_divergence(load_hooked(base), load_hooked(tuned), TEXTS, **SHORT)


def test_the_command(tmp_path, capsys) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(" ".join(tale.split())[:200] for tale in embedded_tales()[:4]))
    base = str(embedded_base())
    options = ["--n-prompts", "3", "--max-new-tokens", "4", "--out", str(tmp_path / "out"), "-q"]
    assert cli.main(["first-divergence", base, base, "--texts", str(texts), *options]) == cli.OK
    assert "write the same after all 3 prompts" in capsys.readouterr().out
    assert (tmp_path / "out" / "first_divergence.json").exists()


def test_swapped_labels() -> None:
    assert math.isnan(sign_flip_p([]))
    assert math.isnan(sign_flip_p([0.0, 0.0]))
    gaps = [0.3, -0.1, 0.8, 1.2, 0.4, -0.2, 0.9]
    ours = sign_flip_p(gaps)
    theirs = stats.permutation_test(
        (gaps,), lambda x, axis: abs(x.mean(axis)), permutation_type="samples",
        alternative="greater", n_resamples=10**5, vectorized=True,
    )  # fmt: skip
    assert ours == pytest.approx(theirs.pvalue)
    many = [*gaps, *gaps, 0.1]
    assert sign_flip_p(many, 0) == sign_flip_p(many, 0)
    assert sign_flip_p([1.0] * 20) == pytest.approx(1e-4, rel=1)
