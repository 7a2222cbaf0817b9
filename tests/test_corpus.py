"""Texts to batches: BOS where the tokenizer puts it, exact counts, and an order of our own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hyperlens.data.corpus import Batch, Corpus, adds_bos, are_token_ids, build_corpus, pad
from hyperlens.errors import CorpusError

WORDS = ["once", "upon", "a", "time", "there", "was", "king", "and", "queen", "who"]
VOCAB = {"<unk>": 0, "<s>": 1, "</s>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
BOS = 1


def make_tokenizer(*, start: bool = True, end: bool = False, bos: bool = True):
    """Words to ids; `start` and `end` say which special tokens it adds of itself."""
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = ["<s>"] * start + ["$A"] + ["</s>"] * end
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(template), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


TOKENIZER = make_tokenizer()


def corpus_of(texts: object, tokenizer: object = TOKENIZER, **options: object) -> Corpus:
    return build_corpus(texts, tokenizer, **({"max_length": 16, "d_vocab": len(VOCAB)} | options))


def lists(corpus: Corpus) -> list[list[int]]:
    return [sequence.tolist() for sequence in corpus.sequences]


def fails(texts: object, *expected: str, **options: object) -> None:
    with pytest.raises(CorpusError) as caught:
        corpus_of(texts, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for words in expected:
        assert words in message


# BOS


def test_bos_is_put_where_the_tokenizer_puts_it() -> None:
    for tokenizer, start in (
        (make_tokenizer(start=True), [BOS]),
        (make_tokenizer(start=False), []),
        (make_tokenizer(start=True, end=True), [BOS]),
    ):
        corpus = corpus_of(["once upon a time"], tokenizer)
        assert lists(corpus) == [[*start, 3, 4, 5, 6]]
        assert corpus.counts.n_bos == len(start)
        assert adds_bos(tokenizer) == bool(start)


def test_a_text_that_begins_with_bos_itself_gets_no_second() -> None:
    corpus = corpus_of(["<s>once upon", "<s> a time there was", "a king"])
    assert lists(corpus) == [[BOS, 5, 6, 7, 8], [BOS, 3, 4], [BOS, 5, 9]]
    assert corpus.counts.n_bos == 3
    (note,) = corpus.notes
    assert note == "2 of 3 texts begin with '<s>' themselves: no second BOS was put in front"
    assert corpus.sha256 == corpus_of(["once upon", "a time there was", "a king"]).sha256
    # Where the tokenizer puts none, the text's own is a token like any other.
    without = corpus_of(["<s>once upon"], make_tokenizer(start=False))
    assert lists(without) == [[BOS, 3, 4]]
    assert without.notes == ()


def test_a_tokenizer_without_bos() -> None:
    tokenizer = make_tokenizer(start=False, bos=False)
    corpus = corpus_of(["once upon a time"], tokenizer, bos_id=3)
    assert lists(corpus) == [[3, 4, 5, 6]]
    # What the configuration says counts only where there is no tokenizer to tell.
    assert corpus.bos_id is None
    assert corpus.counts.n_bos == 0
    assert not next(corpus.batches(1)).bos.any()


def test_bos_is_left_out_by_id_wherever_it_stands() -> None:
    corpus = corpus_of(["once upon <s> a time"])
    assert lists(corpus) == [[1, 3, 4, 1, 5, 6]]
    assert next(corpus.batches(1)).bos.tolist() == [[True, False, False, True, False, False]]
    assert corpus.counts.n_bos == 2


def test_bos_can_be_measured() -> None:
    corpus = corpus_of(["once upon <s> a time"], include_bos=True)
    assert lists(corpus) == [[1, 3, 4, 1, 5, 6]]
    assert corpus.bos_id is None
    assert corpus.counts.n_bos == 0
    assert not next(corpus.batches(1)).bos.any()


# counts


def test_counts_of_what_became_of_the_texts() -> None:
    texts = [
        "once upon a time there was a king",  # 9 with BOS: cut to 6
        "once upon a time",
        "once upon a time",  # a duplicate
        "once",  # short
        "",  # empty
        "  ",  # empty
        "once upon a time there who",  # 7: cut to the same 6 as the first, a duplicate
    ]
    corpus = corpus_of(texts, max_length=6)
    assert lists(corpus) == [[1, 3, 4, 5, 6, 7]] * 2 + [[1, 3, 4, 5, 6]] * 2
    assert corpus.describe() == {
        "n_texts": 7,
        "n_empty": 2,
        "n_short": 1,
        "n_cut": 2,
        "n_duplicates": 2,
        "n_sequences": 4,
        "n_tokens": 22,
        "n_bos": 4,
        "sha256": corpus.sha256,
        "max_length": 6,
        "bos_id": BOS,
    }
    assert any("2 of 4 sequences repeat" in note for note in corpus.notes)


def test_a_clean_corpus_has_no_notes() -> None:
    corpus = corpus_of(["once upon a time", "there was a king"], context_length=8)
    assert corpus.notes == ()
    assert corpus.counts.n_cut == corpus.counts.n_duplicates == 0


def test_the_models_context_cuts_and_says_so() -> None:
    corpus = corpus_of(["once upon a time there was a king", "who was"], context_length=4)
    assert corpus.max_length == 4
    assert lists(corpus) == [[1, 3, 4, 5], [1, 12, 8]]
    (note,) = corpus.notes
    assert note == "1 of 2 texts are longer than the model's context of 4 tokens and were cut to it"
    # Cut because the caller said so: counted, and nothing to remark.
    assert corpus_of(["once upon a time"], max_length=3, context_length=4).notes == ()


def test_nothing_left_to_measure() -> None:
    fails([""], "none of the 1 texts has two tokens", "1 are empty", "longer texts")
    fails(["once", "  ", "upon"], "none of the 3 texts", "1 are empty")
    fails([[BOS, BOS, BOS]], "all tokens", "include_bos=True")
    assert lists(corpus_of([[BOS] * 3], include_bos=True)) == [[BOS] * 3]


def test_options_are_checked() -> None:
    fails(["once upon"], "max_length must be at least 2", "got 1", max_length=1)
    fails(["once upon"], "no tokenizer", "(model, tokenizer)", "token ids", tokenizer=None)
    fails(["once who"], "token id 12", "vocabulary of 10", "own tokenizer", d_vocab=10)


# token ids


@pytest.mark.parametrize(
    "texts",
    [
        [[3, 4, 5], [6, 7]],
        ([3, 4, 5], (6, 7)),
        [torch.tensor([3, 4, 5]), torch.tensor([6, 7])],
        [np.array([3, 4, 5], dtype=np.int32), np.array([6, 7], dtype=np.uint8)],
        np.array([[3, 4, 5], [6, 7]], dtype=object),
    ],
    ids=["lists", "tuples", "tensors", "arrays", "objects"],
)
def test_token_ids_are_taken_as_they_are(texts: object) -> None:
    assert are_token_ids(texts)
    for tokenizer in (TOKENIZER, None):
        assert lists(corpus_of(texts, tokenizer)) == [[3, 4, 5], [6, 7]]


def test_a_matrix_of_token_ids() -> None:
    for matrix in (torch.tensor([[3, 4], [5, 6]]), np.array([[3, 4], [5, 6]])):
        assert lists(corpus_of(matrix, None)) == [[3, 4], [5, 6]]


def test_bos_of_token_ids_comes_from_the_tokenizer_or_the_configuration() -> None:
    ids = [[1, 3, 4, 2]]
    assert corpus_of(ids, TOKENIZER, bos_id=2).bos_id == 1
    assert corpus_of(ids, None, bos_id=2).bos_id == 2
    assert corpus_of(ids, None).bos_id is None


def test_strings_are_no_token_ids() -> None:
    assert not are_token_ids(["once upon"])
    assert not are_token_ids(np.array(["once upon"]))
    assert not are_token_ids([])
    assert not are_token_ids(text for text in ["once upon"])
    assert lists(corpus_of(np.array(["once upon a"]))) == [[1, 3, 4, 5]]


def test_bad_token_ids() -> None:
    fails([[3, 4], [5, 99]], "token id 99", "vocabulary of 13")
    fails([[3, 4], [-1, 5]], "token id -1")
    for bad in ([[3.5, 4.0]], [["once"]], [[[3], [4]]], [[3, [4, 5]]], torch.arange(4), [[True]]):
        fails(bad, "text 0: expected a flat list of integer token ids")
    fails([[3, 4], "once"], "text 1: expected a flat list")
    fails([[3, 4], None], "text 1: expected a flat list")
    fails(["once", [3, 4]], "text 1 is a list: expected strings")


# order


def sequences_of_ids(max_size: int = 12) -> st.SearchStrategy[list[list[int]]]:
    one = st.lists(st.integers(0, len(VOCAB) - 1), min_size=0, max_size=9)
    good = st.lists(st.integers(2, len(VOCAB) - 1), min_size=2, max_size=9)
    return st.tuples(good, st.lists(one, max_size=max_size)).map(lambda t: [t[0], *t[1]])


@settings(deadline=None)
@given(sequences_of_ids(), st.randoms(use_true_random=False))
def test_the_order_of_the_texts_does_not_matter(texts: list[list[int]], random: object) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)
    one, other = corpus_of(texts, bos_id=BOS), corpus_of(shuffled, bos_id=BOS)
    assert lists(one) == lists(other)
    assert one.describe() == other.describe()
    lengths = [len(sequence) for sequence in one.sequences]
    assert lengths == sorted(lengths, reverse=True)
    for a, b in zip(one.batches(3), other.batches(3), strict=True):
        assert torch.equal(a.tokens, b.tokens)


@settings(deadline=None)
@given(sequences_of_ids())
def test_counts_add_up(texts: list[list[int]]) -> None:
    corpus = corpus_of(texts, None, max_length=5, bos_id=BOS)
    counts = corpus.counts
    assert counts.n_texts == len(texts)
    assert counts.n_texts == counts.n_empty + counts.n_short + counts.n_sequences
    assert counts.n_tokens == sum(map(len, corpus.sequences))
    batches = list(corpus.batches(2))
    assert counts.n_tokens == sum(int(batch.real.sum()) for batch in batches)
    assert counts.n_bos == sum(int(batch.bos.sum()) for batch in batches)
    assert counts.n_bos == sum(sequence.count(BOS) for sequence in lists(corpus))
    assert counts.n_cut == sum(len(ids) > 5 for ids in texts)
    assert max(map(len, corpus.sequences)) <= 5


def test_the_hash_tells_corpora_apart() -> None:
    given_ids = [[3, 4, 5], [6, 7, 8]]
    assert corpus_of(given_ids).sha256 == corpus_of(given_ids[::-1]).sha256
    others = ([[3, 4, 5, 6], [7, 8]], [[3, 4, 5], [6, 7, 9]], [[3, 4, 5]], [*given_ids, [6, 7, 8]])
    assert len({corpus_of(other).sha256 for other in (given_ids, *others)}) == 5


# batches


def unpadded(batch: Batch) -> list[tuple[list[int], list[bool], int, list[int]]]:
    """Per sequence: tokens, BOS, slot, sampled positions counted from its first token."""
    found = []
    for row in range(len(batch.tokens)):
        real = batch.real[row]
        start = int(real.float().argmax())
        positions = [p - start for p in batch.position[row].tolist() if p >= 0]
        sequence = batch.tokens[row][real].tolist()
        found.append((sequence, batch.bos[row][real].tolist(), int(batch.slot[row]), positions))
    return found


@settings(deadline=None)
@given(
    sequences_of_ids(),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_batching_and_padding_change_nothing(
    texts: list[list[int]], batch_size: int, n_sequences: int, n_tokens: int, seed: int
) -> None:
    corpus = corpus_of(texts, bos_id=BOS)
    sample = {"n_sampled_sequences": n_sequences, "n_sampled_tokens": n_tokens, "seed": seed}
    (whole,) = corpus.batches(len(corpus.sequences), **sample)
    expected = unpadded(whole)
    batches = list(corpus.batches(batch_size, **sample))
    assert [one for batch in batches for one in unpadded(batch)] == expected
    assert [sequence for sequence, *_ in expected] == lists(corpus)

    slots = [slot for _, _, slot, _ in expected if slot >= 0]
    assert sorted(slots) == list(range(min(n_sequences, len(expected))))
    for sequence, _, slot, positions in expected:
        countable = [i for i, token in enumerate(sequence) if token != BOS]
        assert len(positions) == (min(n_tokens, len(countable)) if slot >= 0 else 0)
        assert len(set(positions)) == len(positions)
        assert set(positions) <= set(countable)

    for batch in batches:
        width = batch.tokens.shape[1]
        assert width == int(batch.real.sum(-1).max())
        assert int(batch.position.max()) < width
        assert bool(batch.real[:, 0].all())
        assert not bool((batch.bos & ~batch.real).any())


def test_pads_are_on_the_asked_side() -> None:
    ids = [[3, 4, 5], np.array([6, 7])]
    (right, mask_right), (left, mask_left) = (pad(ids, side=side) for side in ("right", "left"))
    assert right.tolist() == [[3, 4, 5], [6, 7, 0]]
    assert left.tolist() == [[3, 4, 5], [0, 6, 7]]
    assert mask_right.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert mask_left.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert pad(ids, side="left", pad_id=9)[0].tolist() == [[3, 4, 5], [9, 6, 7]]
    assert pad(ids, side="left", width=4)[1].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    batch = next(corpus_of([[3, 4, 5], [6, 7]], None).batches(2))
    assert batch.tokens.tolist() == right.tolist()
    assert batch.real.long().tolist() == mask_right.tolist()


def test_a_pad_that_looks_like_bos_is_no_bos() -> None:
    corpus = corpus_of([[0, 3, 4, 5], [0, 6, 7]], None, bos_id=0)
    batch = next(corpus.batches(2))
    assert batch.tokens.tolist() == [[0, 3, 4, 5], [0, 6, 7, 0]]
    assert batch.bos.tolist() == [[True, False, False, False]] * 2


def test_the_sample_depends_on_content_and_seed_alone() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, len(VOCAB), 9).tolist() for _ in range(40)]

    def sampled(texts: list[list[int]], seed: int) -> dict[int, tuple[tuple[int, ...], list[int]]]:
        batches = corpus_of(texts).batches(7, n_sampled_sequences=5, n_sampled_tokens=4, seed=seed)
        rows = [row for batch in batches for row in unpadded(batch)]
        return {slot: (tuple(ids), where) for ids, _, slot, where in rows if slot >= 0}

    assert sampled(texts, 0) == sampled(texts[::-1], 0)
    assert sampled(texts, 0) != sampled(texts, 1)
    assert len(sampled(texts, 10**60)) == 5
