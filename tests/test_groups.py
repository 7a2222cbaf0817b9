"""Texts that belong together count once: in intervals, among prompts, in both halves of a split."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny, perturbed, token_texts

from hyperlens import compare_models
from hyperlens.cli import FAILED, OK, main
from hyperlens.data import corpus as corpora
from hyperlens.data.corpus import build_corpus
from hyperlens.data.texts import paragraphs_per_block, read_texts
from hyperlens.decoding.prompts import choose_prompts
from hyperlens.embedded import embedded_base
from hyperlens.errors import CorpusError
from hyperlens.pair import Pair, open_pair
from hyperlens.patching import patch_blocks
from hyperlens.patching.engine import second_half, subset


class Words:
    """A tokenizer whose texts are their own token ids."""

    bos_token_id, pad_token_id, bos_token = 1, 0, "1"

    def __call__(self, texts, **options):
        if isinstance(texts, str):
            return {"input_ids": [1]}
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def get_vocab(self):
        return {}


TEXTS = [" ".join(map(str, ids)) for ids in token_texts(12)]


@pytest.fixture(scope="module")
def pair() -> Pair:
    base = make_tiny("llama")
    return open_pair((base, Words()), (perturbed(base), Words()))


def grouped(texts, groups):
    return read_texts(texts, groups=groups)


def test_groups_of_one_text_change_nothing(pair: Pair) -> None:
    plain, alone = (
        compare_models(pair, texts, progress=False).to_frame()
        for texts in (TEXTS, grouped(TEXTS, range(12)))
    )
    pd.testing.assert_frame_equal(plain, alone)


def test_a_text_that_is_there_three_times_in_one_group_counts_once(pair: Pair) -> None:
    """Its copies, in a random order: every value and every interval is as if it were there once."""
    order = np.random.default_rng(0).permutation(36)
    copies = grouped([TEXTS[i % 12] for i in order], [f"document {i % 12}" for i in order])
    once = compare_models(pair, TEXTS, progress=False)
    found = compare_models(pair, copies, progress=False, batch_size=5)
    assert found.meta["corpus"]["n_groups"] == 12
    assert any("12 independent groups" in note for note in found.meta["notes"])
    keys = ["probe", "metric", "layer", "view"]
    both = once.to_frame().merge(found.to_frame(), on=keys, suffixes=("", "_copies"))
    # Two estimators depend on the number of tokens, and those of the audit have no intervals.
    both = both[~both.metric.str.contains("_row|_naive|_with_")]
    assert len(both) > 90
    # Participation ratios are corrected for the number of tokens as well as for their groups.
    is_ratio = both.probe == "participation_ratio"
    for column in ("value", "low", "high"):
        for rows, tolerance in ((both[~is_ratio], 1e-4), (both[is_ratio], 0.05)):
            ends = rows[f"{column}_copies"], rows[column]
            np.testing.assert_allclose(*ends, rtol=tolerance, atol=1e-6)
    # Taken by themselves they would be far too sure.
    loose = compare_models(pair, [TEXTS[i % 12] for i in order], progress=False).to_frame()
    frames = (loose, once.to_frame())
    drift = [f[(f.metric == "cosine") & (f.layer == 3)] for f in frames]
    widths = [np.array(f.high - f.low) for f in drift]
    assert (widths[0] < 0.7 * widths[1]).all()


def test_patched_decisions_are_counted_by_group(pair: Pair) -> None:
    texts = TEXTS[:6] * 2
    options = {"max_new_tokens": 0, "n_texts": 12, "progress": False}
    once, found = (
        patch_blocks(pair, given, **options)
        for given in (TEXTS[:6], grouped(texts, list(range(6)) * 2))
    )
    assert len(once.table) == len(found.table)
    for a, b in zip(once.table, found.table, strict=True):
        if a["activation"] == "source":
            ends = [[row[key] for key in ("value", "low", "high", "n")] for row in (a, b)]
            np.testing.assert_allclose(*ends, rtol=1e-5, atol=1e-7)


def test_of_each_group_one_prompt_is_drawn() -> None:
    texts = grouped(TEXTS, [i // 3 for i in range(12)])
    corpus = build_corpus(texts, Words(), max_length=32)
    prompts = choose_prompts(corpus, 12, 3, seed=0)
    assert len(prompts) == 4
    owner = {ids[:3].tobytes(): g for ids, g in zip(corpus.sequences, corpus.groups, strict=True)}
    assert len({owner[np.array(prompt).tobytes()] for prompt in prompts}) == 4
    with pytest.raises(CorpusError, match="1 of 1 groups of texts have the 3 tokens"):
        choose_prompts(build_corpus(grouped(TEXTS, 12), Words(), max_length=32), 2, 3, seed=0)


def test_two_halves_share_no_group() -> None:
    texts = grouped(TEXTS, [i // 2 for i in range(12)])
    corpus = build_corpus(texts, Words(), max_length=32)
    half = second_half(corpus, seed=1)
    sides = [
        {g for g, is_in in zip(corpus.groups, half, strict=True) if is_in == s} for s in (0, 1)
    ]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [3, 3]
    assert sorted(set(subset(corpus, half).groups)) == [0, 1, 2]


def test_more_groups_than_can_be_kept_apart_are_united(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MAX_GROUPS", 4)
    labels = [i // 2 for i in range(12)]
    corpus = build_corpus(grouped(TEXTS, labels), Words(), max_length=32)
    assert sorted(set(corpus.groups)) == [0, 1, 2, 3]
    owner = dict(zip(TEXTS, labels, strict=True))
    united = {}
    for ids, group in zip(corpus.sequences, corpus.groups, strict=True):
        united.setdefault(owner[" ".join(map(str, ids))], set()).add(group)
    assert all(len(groups) == 1 for groups in united.values())
    again = build_corpus(grouped(TEXTS[::-1], labels[::-1]), Words(), max_length=32)
    assert again.groups == corpus.groups


def test_where_groups_come_from(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "book": i // 2} for i in range(6)]
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "t.csv")
    for source, kind in ((jsonl, int), (tmp_path / "t.csv", str), (frame, int)):
        texts = read_texts(source, groups="book", column="text")
        assert texts.groups == tuple(kind(i // 2) for i in range(6))
    assert read_texts(jsonl, groups="book", limit=3).groups == (0, 0, 1)
    assert texts[2:4].groups == (1, 1)
    assert read_texts(texts).groups == texts.groups
    assert read_texts(texts, groups=4).groups == (0, 0, 0, 0, 1, 1)
    assert read_texts([row["text"] for row in rows]).groups is None

    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"paragraph {i}" for i in range(200)))
    assert read_texts(book).groups == tuple(i // 5 for i in range(200))
    assert read_texts(book, groups=1).groups == tuple(range(200))
    assert read_texts(book, limit=40).groups is None
    assert all(n // paragraphs_per_block(n) >= 40 for n in range(40, 2000))


def test_groups_that_do_not_fit(tmp_path: Path) -> None:
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_text('{"text": "a b", "book": [1]}\n{"text": "c d"}')
    for source, groups, expected in (
        (["a", "b"], [1], "one label for each of the 2 texts.*got 1 values"),
        (["a", "b"], [1, None], "a string or a whole number"),
        (["a", "b"], 0, "at least 1"),
        (["a", "b"], "book", "names a column, and list has none"),
        (jsonl, "author", "row 1 has no column 'author' for groups; columns: text, book"),
        (jsonl, "book", "row 2 has no column 'book'"),
    ):
        with pytest.raises(CorpusError, match=expected):
            read_texts(source, groups=groups)


def test_the_command_takes_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Once upon a time there was a king of {i}." for i in range(9)))
    base = str(embedded_base())
    command = ["compare", base, base, "--texts", str(book), "-q"]
    assert main([*command, "--groups", "3"]) == OK
    assert "count every 3 consecutive texts as one (3 in all)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*command, "--groups", "book"]) == FAILED
    assert "names a column" in capsys.readouterr().err


def test_an_outcome_adds_up_its_groups() -> None:
    from hyperlens.patching.outcomes import Accumulator

    seen = Accumulator(4)
    changed, text = torch.tensor([True, False, True, True]), torch.tensor([0, 1, 2, 3])
    seen.add({"to_tuned": torch.tensor([1.0, 0.0, 1.0, 0.0])}, changed, text)
    assert seen.outcome().changed.tolist() == [1, 0, 1, 1]
    by_group = seen.outcome((1, 0, 0, 1))
    assert by_group.changed.tolist() == [1, 2]
    assert by_group.sums["to_tuned"].tolist() == [1, 1]


def test_some_of_the_texts_keep_their_groups_and_can_be_read() -> None:
    """As the null test reads some of them to find the scale of its controls."""
    whole = build_corpus(read_texts(TEXTS, groups=2), Words(), max_length=32)
    some = whole.take(range(0, 12, 3))
    assert [ids.tolist() for ids in some.sequences] == [
        ids.tolist() for ids in whole.sequences[::3]
    ]
    assert some.counts.n_tokens == sum(map(len, some.sequences))
    of_some = [whole.groups[i] for i in range(0, 12, 3)]
    assert len(set(some.groups)) == len(set(of_some)) == some.n_units
    slots = torch.cat([b.slot for b in some.batches(2, n_sampled_sequences=9, n_sampled_tokens=3)])
    assert int((slots >= 0).sum()) == 4
