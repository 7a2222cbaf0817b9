"""Where the tuned model's picks stood in the base, against the plain loop and planted truths."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, D_VOCAB, make_tiny, perturbed, token_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import one_token_per_byte
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperlens import cli, compare_models, open_pair, trace_provenance, write_report
from hyperlens.embedded import embedded_base, embedded_tales
from hyperlens.errors import CorpusError
from hyperlens.experiments import ProvenanceResult
from hyperlens.experiments.provenance import FUNCTION_WORDS, KINDS, kind_of, neighbours, repeats
from hyperlens.models.tokenizers import token_names
from hyperlens.models.tokenizers import token_texts as token_texts_of
from hyperlens.probes.rank_reordering import rank_bins
from hyperlens.render.blocks import Chart, Table, flat

TEXTS = token_texts(10, shortest=8, longest=20)
SHORT = {"prompt_tokens": 6, "max_new_tokens": 8, "n_prompts": 6, "progress": False}
BUCKETS = {"1": (1, 1), "2-10": (2, 10), ">10": (11, 10**9)}


def by_hand(base, tuned, text: list[int]) -> list[int]:
    """Base ranks of the tuned model's picks after every token but BOS."""
    with torch.no_grad():
        a, b = (model(torch.tensor([text])).logits[0] for model in (base, tuned))
    found = []
    for i in range(1, len(text)):
        pick = int(b[i].argmax())
        found.append(1 + sum(float(x) > float(a[i, pick]) for x in a[i]))
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shares_are_means_over_texts_of_the_plain_loop(name: str) -> None:
    base = make_tiny(name)
    tuned = perturbed(base, 0.3)
    found = trace_provenance(base, tuned, TEXTS, **SHORT)
    ranks = [by_hand(base, tuned, text) for text in TEXTS]
    for bucket, (low, high) in BUCKETS.items():
        shares = [sum(low <= r <= high for r in text) / len(text) for text in ranks]
        row = found.at(mode="teacher-forced", bucket=bucket, metric="share")
        assert row["value"] == pytest.approx(sum(shares) / len(shares))
        assert row["n"] == len(TEXTS)


def tied(model):
    """Every other token has the logits of the one before it, in every context."""
    with torch.no_grad():
        model.lm_head.weight[1:60:2] = model.lm_head.weight[0:59:2]
    return model


@settings(max_examples=5)
@given(st.integers(0, 10_000), st.booleans())
def test_both_modes_equal_the_plain_loop_ties_included(seed: int, ties: bool) -> None:
    base = make_tiny("llama", seed=seed)
    tuned = perturbed(base, 0.3, seed=seed + 1)
    if ties:
        base = tied(base)
    texts = token_texts(4, seed=seed, shortest=7, longest=12)
    found = trace_provenance(base, tuned, texts, **SHORT)
    written = []
    for text in texts:
        ids = torch.tensor([text[:6]])
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, tuned(ids).logits[:, -1:].argmax(-1)], dim=-1)
        written.append(by_hand(base, tuned, ids[0, :-1].tolist())[4:])
    for mode, of_texts in (
        ("teacher-forced", [by_hand(base, tuned, text) for text in texts]),
        ("free-running", written),
    ):
        for bucket, (low, high) in BUCKETS.items():
            shares = [sum(low <= r <= high for r in ranks) / len(ranks) for ranks in of_texts]
            row = found.at(mode=mode, bucket=bucket, metric="share")
            assert row["value"] == pytest.approx(sum(shares) / len(shares)), (mode, bucket)


@settings(max_examples=5)
@given(st.integers(0, 10_000))
def test_what_changed_picks_are_equals_a_loop_over_them(seed: int) -> None:
    base = make_tiny("llama", seed=seed, vocab_size=16)  # so few that trigrams come again
    tuned = perturbed(base, 0.3, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    texts = [[1, *torch.randint(3, 6, (20,), generator=generator).tolist()] for _ in range(4)]
    found = trace_provenance(base, tuned, texts, **SHORT)
    rows = base.lm_head.weight - base.lm_head.weight.mean(0)
    expected: dict[str, list[float]] = {"near_synonym": [], "avoids": [], "falls_into": []}
    for text in texts:
        with torch.no_grad():
            a, b = (model(torch.tensor([text])).logits[0] for model in (base, tuned))
        seen: dict[str, list[bool]] = {name: [] for name in expected}
        for i in range(1, len(text)):
            first, pick = int(a[i].argmax()), int(b[i].argmax())
            if first == pick:
                continue
            grams = {tuple(text[j : j + 3]) for j in range(i - 1)}
            old, new = ((text[i - 1], text[i], token) in grams for token in (first, pick))
            order = torch.cosine_similarity(rows[first], rows, dim=-1).argsort(descending=True)
            seen["near_synonym"].append(pick in order[1:11].tolist())
            seen["avoids"].append(old and not new)
            seen["falls_into"].append(new and not old)
        if seen["avoids"]:
            for name, flags in seen.items():
                expected[name].append(sum(flags) / len(flags))
    for name, shares in expected.items():
        row = found.at(mode="teacher-forced", bucket="changed", metric=name)
        assert row["value"] == pytest.approx(sum(shares) / len(shares)), name
        assert row["n"] == len(shares)


def test_examples_and_charts() -> None:
    base, texts = embedded_base(), embedded_tales()[:4]
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = (perturbed(model, 0.05), AutoTokenizer.from_pretrained(base))
    short = SHORT | {"prompt_tokens": 8, "n_examples": 3}
    found = trace_provenance(base, tuned, texts, **short)
    every = "\n".join(texts)
    examples = found.extras["examples"]
    assert {e["bucket"] for e in examples} <= {"2-10", ">10"}
    assert {e["mode"] for e in examples} == {"teacher-forced", "free-running"}
    for example in examples:
        low, high = BUCKETS[example["bucket"]]
        assert low <= example["rank"] <= high
        assert example["picked"] != example["base_top1"]
        if example["mode"] == "teacher-forced":
            assert example["context"].removeprefix(" <s>").strip() in every
    charts = [block for block in flat(found.evidence()) if isinstance(block, Chart)]
    ranks, kinds = charts[:2], charts[2:]
    assert [len(chart.rows) for chart in ranks] == [len(rank_bins(4096))] * 2
    assert all(sum(row["value"] for row in chart.rows) == pytest.approx(100) for chart in ranks)
    for chart, mode in zip(kinds, ("teacher-forced", "free-running"), strict=True):
        assert chart.x.scale == "share"
        for row, kind in zip(chart.rows, KINDS, strict=True):
            assert row["value"] == found.value(mode=mode, bucket="changed", metric=kind)
    assert found.plot().to_dict()


def test_the_histogram_counts_every_decision_in_its_bin() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.3)
    found = trace_provenance(base, tuned, TEXTS, **SHORT).extras["rank_histogram"]
    ranks = [rank for text in TEXTS for rank in by_hand(base, tuned, text)]
    bins = found["teacher-forced"]
    assert [one["count"] for one in bins] == [
        sum(one["low"] <= rank <= one["high"] for rank in ranks) for one in bins
    ]
    assert sum(one["count"] for one in bins) == len(ranks)
    assert (bins[0]["low"], bins[-1]["high"]) == (1, D_VOCAB)
    assert sum(one["count"] for one in found["free-running"]) == 6 * 8


def test_a_model_against_itself_picks_what_it_picks() -> None:
    base = make_tiny("gemma2")
    found = trace_provenance(base, base, TEXTS, **SHORT)
    for mode in ("teacher-forced", "free-running"):
        assert found.value(mode=mode, bucket="1", metric="share") == 1.0
        assert found.value(mode=mode, bucket=">10", metric="share") == 0.0
    assert found.extras["examples"] == []
    assert "no pick is changed" in found.summary()


def test_temperature_keeps_every_pick_at_rank_one() -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.lm_head.weight *= 2.0
    found = trace_provenance(base, tuned, TEXTS, **SHORT)
    assert found.value(mode="teacher-forced", bucket="1", metric="share") == 1.0


def test_a_permuted_vocabulary_is_caught() -> None:
    base = make_tiny("llama", vocab_size=900)
    tuned = copy.deepcopy(base)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tuned.lm_head.weight.copy_(base.lm_head.weight[order])
    found = trace_provenance(base, tuned, TEXTS, **SHORT)
    assert found.value(mode="teacher-forced", bucket="all", metric="rank_ge_200") > 0.5
    assert "same vocabulary" in " ".join(found.summary().split())
    assert "vocabulary" not in trace_provenance(base, perturbed(base), TEXTS, **SHORT).summary()


def test_it_agrees_with_compare_models_on_texts_of_one_length() -> None:
    base = make_tiny("qwen2")
    tuned = perturbed(base, 0.3)
    texts = token_texts(8, shortest=12, longest=12)
    found = trace_provenance(base, tuned, texts, **SHORT)
    comparison = compare_models(base, tuned, texts, progress=False)
    for bucket, metric in (("1", "rank_1"), ("2-10", "rank_2_10"), (">10", "rank_gt_10")):
        same = comparison.value("rank_reordering", metric, 3, "final_norm")
        assert found.value(mode="teacher-forced", bucket=bucket, metric="share") == pytest.approx(
            same
        )


CONTEXTS = st.lists(st.integers(0, 3), max_size=12)


@given(CONTEXTS, st.integers(0, 3), st.integers(1, 4))
def test_a_repeated_ngram_is_one_that_was_there(context: list[int], token: int, n: int) -> None:
    text = [*context, token]
    grams = ["".join(map(str, text[i : i + n])) for i in range(len(text) - n + 1)]
    expected = len(grams) > 0 and grams[-1] in grams[:-1]
    assert repeats(context, token, n) == expected


def test_neighbours_are_the_nearest_others() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 5, generator=generator)
    centred = matrix - matrix.mean(0)
    for token, near in neighbours(matrix, [3, 7, 3], 4).items():
        cosines = [
            (float(torch.cosine_similarity(centred[token], row, dim=0)), i)
            for i, row in enumerate(centred)
            if i != token
        ]
        assert near == {i for _, i in sorted(cosines)[-4:]}


@pytest.mark.parametrize(
    ("token", "before", "kind"),
    [
        (" the", "in", "function word"), (" The", ".", "function word"),
        (" castle", "the", "content word"), ("The", "", "function word"),
        ("tle", " cas", "subword"), (" tle", " cas", "content word"),
        ("'s", " king", "subword"), ("'", " king", "punctuation"), (",", "king", "punctuation"),
        ('."', "king", "punctuation"), (" 12", "in", "number"), ("\n", ".", "other"),
        ("Alas", '"', "content word"), (" ", "a", "other"), ("é", " caf", "subword"),
        (" $", "for", "punctuation"),
    ],
)  # fmt: skip
def test_kinds(token: str, before: str, kind: str) -> None:
    assert kind_of(token, before) == kind
    assert all(word.isalpha() and word.islower() for word in FUNCTION_WORDS)


def test_a_piece_of_a_character_is_no_word() -> None:
    tokenizer = one_token_per_byte()
    for character in "“”’—😀":
        ids = tokenizer(character)["input_ids"]
        before = "the"
        # As GPT-2 calls them, some are letters.
        for text in token_texts_of(tokenizer, ids):
            assert kind_of(text, before) == "other"
            before = text


def test_nor_is_it_one_in_the_table() -> None:
    reads, model = one_token_per_byte(), make_tiny("llama", vocab_size=256)
    texts = ["The old king said nothing.", "A fox came out of the wood.", "They went home."]
    found = trace_provenance((model, reads), (model, reads), texts, **SHORT)
    pieces = []
    for text in texts:
        with torch.no_grad():
            picks = model(torch.tensor([reads(text)["input_ids"]])).logits[0].argmax(-1).tolist()
        pieces.append(sum("\ufffd" in reads.decode([pick]) for pick in picks) / len(picks))
    assert sum(pieces) > 0
    other = found.value(mode="teacher-forced", bucket="all", metric="other")
    assert other >= sum(pieces) / len(pieces) - 1e-9


def test_nor_is_one_of_sentencepiece_a_number(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("😀 7", add_special_tokens=False)["input_ids"]
    assert "<0xF0>" in token_names(tokenizer, ids)
    kinds = [kind_of(text, "a") for text in token_texts_of(tokenizer, ids)]
    assert kinds.count("number") == 1  # the seven


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (0.1, 0.3, 9, "avoid repetition more often than they cause it"),
        (-0.3, -0.1, 9, "cause repetition more often than they avoid it"),
        (-0.05, 0.45, 9, "avoid repetition not clearly more often than they cause it"),
        (math.nan, math.nan, 1, "too few texts have a changed pick to tell"),
        (math.nan, math.nan, 0, "no pick is changed"),
    ],
)
def test_what_is_said_of_repetition_is_what_the_interval_tells(
    low: float, high: float, n: int, said: str
) -> None:
    base = make_tiny("llama")
    found = trace_provenance(base, perturbed(base, 0.3), TEXTS, **SHORT)
    gap = found.at(mode="free-running", bucket="changed", metric="avoids_minus_falls_into")
    changed = gap | {"low": low, "high": high, "n": n}
    table = tuple(changed if row is gap else row for row in found.table)
    verdicts = {one.topic: one.answer for one in replace(found, table=table).verdicts()}
    assert said in verdicts["repetition"]


def test_ids_in_a_context_stand_apart() -> None:
    base = make_tiny("llama")
    found = trace_provenance(base, perturbed(base, 0.3), TEXTS, **SHORT)
    starts = [" ".join(map(str, text)) for text in TEXTS]
    shown = [e["context"] for e in found.extras["examples"] if e["mode"] == "teacher-forced"]
    assert shown
    assert all(any(context in text for text in starts) for context in shown)


def test_kinds_of_a_bucket_add_up() -> None:
    base, text = embedded_base(), "The king went into the old house and sat down there."
    short = {"prompt_tokens": 6, "max_new_tokens": 12, "progress": False}
    found = trace_provenance(base, base, [text] * 3, **short)
    kinds = ("function word", "content word", "subword", "number", "punctuation", "other")
    total = sum(found.value(mode="free-running", bucket="1", metric=kind) for kind in kinds)
    assert total == pytest.approx(1)
    assert found.value(mode="free-running", bucket="1", metric="content word") > 0


def test_same_seed_same_result_and_it_comes_back(tmp_path: Path) -> None:
    base = make_tiny("mistral")
    tuned = perturbed(base, 0.3)
    first, again = (trace_provenance(base, tuned, TEXTS, **SHORT) for _ in range(2))
    # Compared as written: NaN, where a bucket is empty, is not equal to itself.
    assert first.write(tmp_path).read_text() == again.write(tmp_path).read_text()
    loaded = ProvenanceResult.load(tmp_path)
    assert loaded.summary() == first.summary()
    assert max(e["rank"] for e in loaded.extras["examples"]) <= D_VOCAB
    page = first.save(tmp_path / "out") / "report.html"
    assert "Where did the base model rank the tuned model&#39;s picks?" in page.read_text()


def test_page_terminal_and_notebook_show_the_same(tmp_path: Path) -> None:
    base = make_tiny("llama")
    found = trace_provenance(base, perturbed(base, 0.3), TEXTS, **SHORT)
    table, *_ = (block for block in found.evidence() if isinstance(block, Table))
    assert {f"base rank {bucket}" for bucket in BUCKETS} <= {row[0] for row in table.rows}
    page = write_report(tmp_path / "page.html", found).read_text()
    shown = (found.summary(), page, found._repr_html_())
    for cell in (cell for row in table.rows for cell in row[1:] if cell[:1] not in "<>"):
        assert all(cell in text for text in shown), cell


def test_an_open_pair_gives_the_same() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.3)
    pair, plain = (
        trace_provenance(*models, TEXTS, **SHORT)
        for models in ((open_pair(base, tuned),), (base, tuned))
    )
    assert str(pair.table) == str(plain.table)


def test_folders_of_version_0_1_are_read(tmp_path: Path) -> None:
    base = make_tiny("llama")
    found = trace_provenance(base, perturbed(base, 0.3), TEXTS, **SHORT)
    path = found.write(tmp_path)
    assert "base_top1" in path.read_text()
    old = path.read_text().replace('"base_top1"', '"base_first"')
    path.write_text(old.replace('"format": 2', '"format": 1').replace('"corpus"', '"data"'))
    loaded = ProvenanceResult.load(tmp_path)
    assert (loaded.extras, loaded.meta) == (found.extras, found.meta)
    assert str(loaded.table) == str(found.table)


def test_refusals_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny("llama")
    with pytest.raises(CorpusError, match="context"):
        trace_provenance(base, base, TEXTS, prompt_tokens=6, max_new_tokens=90, progress=False)
    file, folder = tmp_path / "texts.txt", str(embedded_base())
    file.write_text("The king went into the wood.\n\nThe fox came out of the wood.")
    short = ["--prompt-tokens", "5", "--max-new-tokens", "4", "-q"]
    assert cli.main(["provenance", folder, folder, "--texts", str(file), *short]) == cli.OK
    assert "base rank 1" in capsys.readouterr().out


def test_tokens_keep_the_space_that_begins_their_word(stories: Path) -> None:
    for folder in (stories, embedded_base()):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Once upon a time there was a cat", add_special_tokens=False)["input_ids"]
        assert "".join(token_names(tokenizer, ids)).strip() == "Once upon a time there was a cat"
