"""Conversations in comparisons: ids and roles of twelve templates, statistics over roles."""

import functools
import json
import math
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from chat_for_tests import CHATML, D_VOCAB, GEMMA, LLAMA3, TALK, TWELVE, letters
from conftest import make_tiny, perturbed
from torch.nn import functional

from hyperlens import (
    cli,
    compare_models,
    measure_behaviour,
    open_pair,
    patch_blocks,
    trace_provenance,
)
from hyperlens.data.chat import ChatTemplate, tag_conversation
from hyperlens.data.conversations import read_examples
from hyperlens.data.reading import ROLES, read_as
from hyperlens.decoding.prompts import choose_openings, choose_prompts
from hyperlens.errors import HyperlensError
from hyperlens.experiments.cross_domain import _texts_identity
from hyperlens.experiments.decoding import compare_decoding
from hyperlens.experiments.variants import compare_variants
from hyperlens.models.tokenizers import token_names
from hyperlens.pair import Pair
from hyperlens.probes import OutputByPosition
from hyperlens.results.fingerprint import texts_sha256
from hyperlens.training.examples import examples

SYSTEM = {"role": "system", "content": "be kind"}
THOUGHTFUL = [
    TALK[0],
    {"role": "assistant", "content": "<think>hm</think>\n\nthe answer"},
    *TALK[2:],
]
LONG = 160


def spoken(template: str, messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The roles in turn, with their text."""
    tokenizer = letters(template)
    ids, roles = tag_conversation(messages, ChatTemplate(tokenizer, template, "given"), 1)
    own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == own
    assert roles.shape == ids.shape
    assert set(roles.tolist()) <= set(range(len(ROLES)))
    pairs = zip(roles.tolist(), ids.tolist(), strict=True)
    found = groupby(pairs, key=lambda pair: pair[0])
    return [(ROLES[role], tokenizer.decode([i for _, i in run])) for role, run in found]


def rows(n: int = 6, system: bool = True) -> list[dict[str, Any]]:
    """Short conversations of several lengths."""
    return [
        {
            "messages": [
                *[SYSTEM] * system,
                {**TALK[0], "content": "hi " * (i % 3) + str(i)},
                TALK[1],
            ]
        }
        for i in range(n)
    ]


@functools.cache
def models() -> tuple[Any, Any]:
    base = make_tiny("llama", vocab_size=D_VOCAB, max_position_embeddings=LONG)
    return base, perturbed(base)


@functools.cache
def opened() -> Pair:
    base, tuned = models()
    return open_pair((base, letters()), (tuned, letters()))


def pair_with(base_template: str | None, tuned_template: str | None) -> Pair:
    base, tuned = (
        replace(loaded, tokenizer=letters(template))
        for loaded, template in ((opened().base, base_template), (opened().tuned, tuned_template))
    )
    return Pair(base, tuned)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_with(None, LLAMA3)


# Twelve templates: ids are the tokenizer's own, and every token has one role


ENDS = {
    **dict.fromkeys(("chatml", "marked", "qwen", "thinking"), "<|im_end|>"),
    "llama3": "<|eot|>",
    "gemma": "</turn>",
    **dict.fromkeys(("mistral", "zephyr", "plain"), "</s>"),
    "llama2": " </s>",
    "phi": "<|eot|>\n</s>",
    "forgetful": "",
}
BEGINS = dict.fromkeys(("mistral", "llama2"), " ")


@pytest.mark.parametrize("family", TWELVE)
def test_ids_are_the_tokenizers_own_and_roles_are_who_wrote_them(family) -> None:
    found = spoken(TWELVE[family], TALK)
    said = {role: [text for who, text in found if who == role] for role in ROLES}
    answer = BEGINS.get(family, "") + "so, because." + ENDS[family]
    assert said["assistant"][-1] == answer
    if family == "forgetful":  # earlier contents are not in the text at all
        assert said["user"] == []
        return
    assert said["user"] == ["hi you", "why?"]
    assert said["system"] == []
    # Where the last turn is ended otherwise than others, the answers alone are told.
    first = answer if family != "phi" else "x"
    assert said["assistant"][0] == first.replace("so, because.", "the answer").replace(
        "x", "the answer"
    )


@pytest.mark.parametrize("family", [name for name in TWELVE if name not in ("gemma", "forgetful")])
def test_system_messages_have_their_role_wherever_they_are_written(family) -> None:
    found = spoken(TWELVE[family], [SYSTEM, *TALK])
    assert [text for role, text in found if role == "system"] == ["be kind"]
    assert [text for role, text in found if role == "user"] == ["hi you", "why?"]


def test_bos_is_where_the_template_writes_it_and_never_twice() -> None:
    for template in TWELVE.values():
        tokenizer = letters(template)
        ids, _ = tag_conversation(TALK, ChatTemplate(tokenizer, template, "given"), 1)
        n_bos = (ids == tokenizer.bos_token_id).sum()
        assert n_bos == ("bos_token" in template) + (template is TWELVE["llama2"])
        assert not ((ids[1:] == tokenizer.bos_token_id) & (ids[:-1] == ids[1:])).any()


def test_contents_that_look_like_the_template_stay_in_their_roles() -> None:
    messages = [
        {"role": "user", "content": "assistant\nuser\n  <|im_start|> is what?  "},
        {"role": "assistant", "content": "user\n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "mark"},
    ]
    found = spoken(CHATML, messages)
    assert [text for role, text in found if role == "user"] == [messages[0]["content"]]
    assert [text for role, text in found if role == "assistant"] == [
        "user\n<|im_end|>",
        "mark<|im_end|>",
    ]
    trimmed = spoken(LLAMA3, messages)
    assert [t for r, t in trimmed if r == "user"] == [messages[0]["content"].strip()]


def test_what_a_template_leaves_out_of_a_content_is_in_no_role() -> None:
    found = spoken(TWELVE["thinking"], THOUGHTFUL)
    assert [text for role, text in found if role == "assistant"] == [
        "the answer<|im_end|>",
        "so, because.<|im_end|>",
    ]


def test_a_template_that_rewrites_contents_is_refused() -> None:
    shouting = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(HyperlensError, match="row 1: the chat template changes what is said"):
        spoken(shouting, TALK)


def test_a_template_that_writes_nothing_of_what_is_said_is_refused() -> None:
    with pytest.raises(HyperlensError, match="writes nothing of what is said"):
        pair_with("hello world", "hello world").tokenize(rows())


def test_unknown_speakers_are_said() -> None:
    odd = [{"messages": [{**TALK[0], "role": "critic"}, TALK[1]]} for _ in range(3)]
    corpus = pair_with(CHATML, CHATML).tokenize(odd)
    assert any("'critic' say counts as the user's" in note for note in corpus.notes)
    usual = pair_with(CHATML, CHATML).tokenize(rows())
    assert not any("counts as the user's" in note for note in usual.notes)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a\ud83d b"}]},
        {"prompt": "a\ud83d b", "completion": "c"},
        {"conversations": [{"from": ["human"], "value": "x"}]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_what_is_no_text_or_no_name_is_told(row) -> None:
    with pytest.raises(HyperlensError, match=r"^row 1"):
        read_examples([row])


# One template for both models


def test_whose_template_it_is_is_said() -> None:
    for base, tuned, chosen, words, origin in (
        (None, CHATML, None, "of the tuned model: the base model has none", "tuned"),
        (CHATML, None, None, "of the base model: the tuned model has none", "base"),
        (CHATML, CHATML, None, "that both models have", "both"),
        (GEMMA, CHATML, "tuned", "of the tuned model", "tuned"),
        (CHATML, GEMMA, "base", "of the base model", "base"),
        (GEMMA, None, CHATML, "that was given", "given"),
    ):
        corpus = pair_with(base, tuned).tokenize(
            read_examples(rows(), chat_template=chosen), max_length=LONG
        )
        assert any(words in note for note in corpus.notes), (corpus.notes, words)
        assert corpus.describe()["chat_template"]["from"] == origin
        messages = rows()[0]["messages"]
        expected = letters(CHATML).apply_chat_template(messages, tokenize=True, return_dict=True)
        assert expected["input_ids"] in [ids.tolist() for ids in corpus.sequences]


def test_two_templates_are_refused_where_none_is_chosen() -> None:
    with pytest.raises(HyperlensError, match=r"different chat templates.*choose chat_template="):
        pair_with(GEMMA, CHATML).tokenize(rows())
    with pytest.raises(HyperlensError, match="no chat template"):
        pair_with(None, None).tokenize(rows())
    with pytest.raises(HyperlensError, match="no chat template"):
        pair_with(CHATML, None).tokenize(read_examples(rows(), chat_template="tuned"))


def test_a_template_is_given_as_a_file_too(tmp_path, pair) -> None:
    (tmp_path / "t.jinja").write_text(CHATML)
    by_file, by_text = (
        pair.tokenize(read_examples(rows(), chat_template=one)).describe()
        for one in (tmp_path / "t.jinja", CHATML)
    )
    assert by_file == by_text
    assert by_file["sha256"] != pair.tokenize(rows()).describe()["sha256"]
    with pytest.raises(HyperlensError, match="cannot read 'tunned'"):
        read_examples(rows(), chat_template="tunned")
    with pytest.raises(HyperlensError, match="chat_template writes conversations"):
        compare_models(pair, ["some text"] * 3, chat_template="tuned", progress=False)


# Statistics over roles


def by_hand(pair: Pair, role: str | None, max_length: int) -> dict[str, float]:
    """Plain transformers, one text at a time, and a mask from the text itself."""
    tokenizer = letters(LLAMA3)
    totals: dict[str, list[torch.Tensor]] = {"kl": [], "top1_agreement": [], "cosine": []}
    for row in rows():
        ids, marks = [], []
        ids.append(tokenizer.bos_token_id)
        marks.append("bos")
        for message in row["messages"]:
            head = f"<|head|>{message['role']}<|/head|>\n\n"
            for text, mark in (
                (head, "template"),
                (message["content"].strip(), message["role"]),
                ("<|eot|>", "assistant" if message["role"] == "assistant" else "template"),
            ):
                more = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += more
                marks += [mark] * len(more)
        ids, marks = ids[:max_length], marks[:max_length]
        inside = torch.tensor([mark == role if role else mark != "bos" for mark in marks])
        with torch.no_grad():
            outs = [
                side.model(torch.tensor([ids]), output_hidden_states=True)
                for side in (pair.base, pair.tuned)
            ]
        base, tuned = (out.logits[0].double()[inside] for out in outs)
        log_base, log_tuned = base.log_softmax(-1), tuned.log_softmax(-1)
        totals["kl"].append((log_tuned.exp() * (log_tuned - log_base)).sum(-1))
        totals["top1_agreement"].append((base.argmax(-1) == tuned.argmax(-1)).double())
        hidden = [out.hidden_states[1][0].double()[inside] for out in outs]
        totals["cosine"].append(functional.cosine_similarity(*hidden, dim=-1))
    return {name: float(torch.cat(parts).mean()) for name, parts in totals.items()} | {
        "n": sum(map(len, totals["kl"]))
    }


@pytest.mark.parametrize(("role", "max_length"), [("user", 40), ("assistant", LONG)])
def test_statistics_over_a_role_are_those_of_plain_forward_passes(pair, role, max_length) -> None:
    found = compare_models(
        pair, rows(), roles=[role], max_length=max_length, sink_threshold=0.0, progress=False
    )
    expected = by_hand(pair, role, max_length)
    kl = found.at("logit_lens", "kl", -1, "final_norm")
    assert kl.n == expected["n"]
    assert kl.value == pytest.approx(expected["kl"], rel=1e-4)
    agreement = found.value("rank_reordering", "top1_agreement", -1, "final_norm")
    assert agreement == pytest.approx(expected["top1_agreement"], abs=1e-9)
    assert found.value("drift", "cosine", 1, "raw") == pytest.approx(expected["cosine"], rel=1e-5)
    assert found.meta["corpus"]["roles"] == [role]
    assert found.meta["corpus"]["n_counted"] == expected["n"]
    assert f"over {role} tokens only" in found.summary()


def test_the_summary_tells_the_output_by_role(pair) -> None:
    found = compare_models(pair, rows(), max_length=LONG, probes=["logit_lens"], progress=False)
    n = {}
    for role in ROLES:
        row = found.at("output_by_role", f"kl_{role}", -1, "final_norm")
        n[role] = row.n
        if role != "template":
            expected = by_hand(pair, role, LONG)
            assert row.n == expected["n"]
            assert row.value == pytest.approx(expected["kl"], rel=1e-4)
    assert sum(n.values()) == found.at("logit_lens", "kl", -1, "final_norm").n
    for role in ROLES:
        assert f"\n{role} " in found.summary()
    # BOS is a token of the template, and left out.
    by_role = found.meta["corpus"]["n_tokens_by_role"]
    assert by_role == n | {"template": n["template"] + len(rows())}


def test_participation_ratios_are_of_the_chosen_tokens(pair) -> None:
    found = compare_models(
        pair, rows(), roles=["assistant"], max_length=LONG, sink_threshold=0.0,
        probes=["participation_ratio"], progress=False,
    )  # fmt: skip
    corpus = pair.tokenize(read_examples(rows(), roles=["assistant"]), max_length=LONG)
    parts = []
    for i, ids in enumerate(corpus.sequences):
        with torch.no_grad():
            out = pair.base.model(torch.from_numpy(ids)[None], output_hidden_states=True)
        parts.append(out.hidden_states[1][0].double()[torch.from_numpy(corpus.counted(i))])
    centred = torch.cat(parts) - torch.cat(parts).mean(0)
    moments = centred.T @ centred
    naive = float(moments.trace() ** 2 / moments.square().sum())
    assert found.value("participation_ratio", "base_naive", 1, "raw") == pytest.approx(naive, 1e-4)
    assert math.isfinite(found.value("participation_ratio", "base", 1, "raw"))


def test_a_model_compared_with_itself_reads_exact_zeros() -> None:
    base, _ = models()
    same = open_pair((base, letters(CHATML)), (base, letters(CHATML)))
    found = compare_models(same, rows(), roles=["assistant"], max_length=LONG, progress=False)
    for role, metric in (("assistant", "kl"), ("assistant", "top1_agreement")):
        row = found.at("output_by_role", f"{metric}_{role}", -1, "final_norm")
        assert row.value == row.low == row.high == float(metric != "kl")
    assert "No change" in found.summary()


def test_batches_do_not_change_what_is_measured(pair) -> None:
    first, second = (
        compare_models(
            pair, rows(), roles=["user"], batch_size=size, max_length=LONG, progress=False
        ).to_frame()
        for size in (1, 6)
    )
    numbers = ["value", "low", "high", "n"]
    np.testing.assert_allclose(first[numbers], second[numbers], rtol=2e-4, atol=1e-5)


def test_texts_without_a_chosen_token_are_left_out_and_told(pair) -> None:
    talks = [*rows(4), {"messages": [SYSTEM, TALK[0]]}]
    corpus = pair.tokenize(read_examples(talks, roles=["assistant"]), max_length=LONG)
    assert len(corpus.sequences) == 4
    assert any("1 of 5 texts have no chosen token" in note for note in corpus.notes)
    with pytest.raises(HyperlensError, match="none of the 5 texts has a chosen token"):
        pair.tokenize(read_examples(talks, roles=["assistant"]), max_length=5)
    with pytest.raises(HyperlensError, match="roles are of conversations"):
        pair.tokenize(read_examples(["one text"], roles=["assistant"]))
    with pytest.raises(HyperlensError, match=r"roles must be some of .*'assistent'"):
        compare_models(pair, rows(), roles=["assistent"])


def test_prompts_and_completions_have_roles(pair) -> None:
    talks = [{"prompt": f"ask {i} ", "completion": "answer"} for i in range(3)]
    corpus = pair.tokenize(talks)
    assert "chat_template" not in corpus.describe()
    for ids, roles in zip(corpus.sequences, corpus.roles, strict=True):
        assert letters().decode(ids[roles == ROLES.index("assistant")]) == "answer"
    found = compare_models(pair, talks, roles=["assistant"], progress=False)
    assert found.at("logit_lens", "kl", -1, "final_norm").n == 3 * len("answer")


def test_the_command_takes_roles_and_a_template(tmp_path, capsys) -> None:
    base, tuned = models()
    for name, model, template in (("base", base, GEMMA), ("tuned", tuned, CHATML)):
        model.save_pretrained(tmp_path / name)
        letters(template).save_pretrained(tmp_path / name)
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows())))
    argv = ["compare", str(tmp_path / "base"), str(tmp_path / "tuned")]
    argv += ["--texts", str(tmp_path / "chats.jsonl"), "--max-length", str(LONG)]
    argv += ["--quiet", "--probes", "logit_lens", "--roles", "assistant"]
    assert cli.main(argv) == cli.FAILED
    assert "different chat templates" in capsys.readouterr().err
    assert cli.main([*argv, "--chat-template", "tuned"]) == cli.OK
    out = capsys.readouterr().out
    assert "over assistant tokens only" in out
    assert "of the tuned model" in out


# Where text is generated


def test_generation_begins_where_the_assistants_last_turn_does(pair) -> None:
    tokenizer = letters(LLAMA3)
    talks = [{"messages": [SYSTEM, {**TALK[0], "content": "hi" * i}, *TALK[1:]]} for i in range(4)]
    talks.append({"messages": [TALK[0], TALK[1], TALK[2]]})  # an answer is still to come
    corpus = pair.tokenize(talks, max_length=30)
    prompts = choose_prompts(corpus, 9, 17, seed=0)
    befores = [talk["messages"][:-1] for talk in talks[:4]] + [talks[4]["messages"]]
    expected = [
        tokenizer.apply_chat_template(
            before, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for before in befores
    ]
    assert sorted(prompts) == sorted(expected)
    assert all(tokenizer.decode(ids).endswith("<|head|>assistant<|/head|>\n\n") for ids in prompts)
    openings = choose_openings(corpus, 9, 17, seed=0, n_after=5)
    assert [tokenizer.decode(one.after) for one in openings] == ["so, b"] * 4
    # What leaves no room for an answer is left out.
    longest = max(map(len, expected))
    assert longest not in map(
        len, choose_prompts(corpus, 9, 17, 0, max_new_tokens=LONG + 1 - longest)
    )
    with pytest.raises(HyperlensError, match="0 of 5 texts have something before"):
        choose_prompts(corpus, 9, 17, 0, max_new_tokens=LONG)


def test_experiments_write_answers(pair) -> None:
    """Both models continue every conversation where the assistant speaks; roles leave none out."""
    behaviour = measure_behaviour(
        pair, read_examples(rows(), roles=["assistant"]), n_prompts=4, max_new_tokens=6,
        strategies=["greedy"], progress=False,
    )  # fmt: skip
    low, high = behaviour.meta["options"]["prompt_tokens"]
    assert 0 < low < high
    assert "conversations up to the assistant's last turn" in behaviour.summary()
    ids = letters(LLAMA3).apply_chat_template(
        rows()[0]["messages"][:-1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    shown = {one["prompt"] for one in behaviour.extras["examples"]}
    assert len(shown) == 4
    with torch.no_grad():
        first = int(pair.tuned.model(torch.tensor([ids])).logits[0, -1].argmax())
    by_prompt = {one["prompt"]: one for one in behaviour.extras["examples"]}
    everything = measure_behaviour(
        pair, rows(), n_prompts=6, max_new_tokens=2, strategies=["greedy"], n_examples=6,
        progress=False,
    )  # fmt: skip
    opening = letters().decode(ids, skip_special_tokens=True)
    found = [one for one in everything.extras["examples"] if one["prompt"].endswith(opening)]
    assert found, by_prompt
    assert found[0]["tuned"]["tokens"][0] == token_names(letters(), [first])[0]


def test_decoding_and_patching_take_conversations(pair) -> None:
    decoded = compare_decoding(
        pair, rows(), n_prompts=3, max_new_tokens=4, methods=["greedy", "guard"], n_samples=1,
        n_examples=0, progress=False,
    )  # fmt: skip
    assert len(decoded.meta["options"]["prompt_tokens"]) == 2
    swept = patch_blocks(
        pair, read_examples(rows(), roles=["assistant"]), n_texts=6, n_prompts=2, max_new_tokens=4,
        max_length=LONG, progress=False,
    )  # fmt: skip
    assert swept.meta["corpus"]["roles"] == ["assistant"]
    traced = trace_provenance(
        pair, read_examples(rows(), roles=["assistant"]), n_prompts=2, max_new_tokens=4,
        max_length=LONG, progress=False,
    )  # fmt: skip
    n_answer = len("the answer|") * 6
    assert traced.meta["corpus"]["n_counted"] == n_answer


def test_variants_with_templates_of_their_own_are_refused(pair) -> None:
    variants = {"one": pair, "other": pair_with(None, CHATML)}
    with pytest.raises(HyperlensError, match="variant 'other': its chat template differs"):
        compare_variants(None, variants, rows(), n_prompts=2, max_new_tokens=2, progress=False)
    chats = read_examples(rows(), chat_template=CHATML)
    found = compare_variants(None, variants, chats, n_prompts=2, max_new_tokens=2, progress=False)
    assert found.meta["corpus"]["chat_template"]["from"] == "given"


def test_what_is_resumed_was_read_in_the_same_way(pair) -> None:
    plain = _texts_identity(read_examples(["a text"]))
    assert plain == {"texts": texts_sha256(["a text"])}
    ways: list[dict[str, Any]] = [
        {}, {"roles": ["user"]}, {"chat_template": "base"}, {"chat_template": CHATML},
        {"chat_template": GEMMA}, {"tokens": closing_over(3)},
    ]  # fmt: skip
    found = [_texts_identity(read_examples(rows(), **way)) for way in ways]
    found.append(_texts_identity(read_examples(rows(5))))
    assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)


def test_groups_are_kept_with_conversations(pair, tmp_path) -> None:
    named = [{**row, "subject": i // 2} for i, row in enumerate(rows())]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, named)))
    texts = read_examples(tmp_path / "chats.jsonl", groups="subject", roles=["user"])
    assert texts.groups == (0, 0, 1, 1, 2, 2)
    corpus = pair.tokenize(texts, max_length=LONG)
    assert corpus.describe()["n_groups"] == 3
    assert texts[:2].groups == (0, 0)
    assert texts[:2].reading.roles == ("user",)
    found = compare_models(pair, texts, max_length=LONG, probes=["logit_lens"], progress=False)
    assert found.at("output_by_role", "kl_user", -1, "final_norm").n > 0


# Token sets of one's own


def test_a_function_or_a_mask_chooses_tokens(pair) -> None:
    texts = ["once upon a time", "there was a king", "who had no name"]
    tokenizer = letters()
    vowels = torch.tensor([tokenizer.convert_tokens_to_ids(letter) for letter in "aeiou"])
    chosen = lambda ids, positions: torch.isin(ids, vowels) & (positions >= 4)  # noqa: E731
    options = {"probes": ["logit_lens"], "progress": False}
    found = compare_models(pair, texts, tokens=chosen, **options)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    masks = [[i in vowels.tolist() and at >= 4 for at, i in enumerate(one)] for one in ids]
    kl = []
    for one, mask in zip(ids, masks, strict=True):
        with torch.no_grad():
            base, tuned = (
                side.model(torch.tensor([one])).logits[0].double()[torch.tensor(mask)]
                for side in (pair.base, pair.tuned)
            )
        log_base, log_tuned = base.log_softmax(-1), tuned.log_softmax(-1)
        kl += (log_tuned.exp() * (log_tuned - log_base)).sum(-1).tolist()
    row = found.at("logit_lens", "kl", -1, "final_norm")
    assert row.n == len(kl) == sum(map(sum, masks))
    assert row.value == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.meta["corpus"]["n_counted"] == len(kl)
    assert "tokens chosen by" in found.summary()
    for given in (ids, texts):
        again = compare_models(pair, given, tokens=masks, **options)
        assert again.at("logit_lens", "kl", -1, "final_norm") == row
        assert again.meta["corpus"]["sha256"] == found.meta["corpus"]["sha256"]
    everything = compare_models(pair, texts, **options)
    assert everything.meta["corpus"]["sha256"] != found.meta["corpus"]["sha256"]


def test_tokens_and_roles_are_chosen_together(pair) -> None:
    first = read_examples(rows(), roles=["assistant"], tokens=lambda ids, at: ids != at.max())
    corpus = pair.tokenize(first, max_length=LONG)
    assert corpus.describe()["n_counted"] == 6 * len("the answer|")
    reading = read_as(tokens=lambda ids, positions: positions < 30)
    fewer = pair.tokenize(
        read_examples(rows(), roles=["assistant", "system"]), max_length=LONG, reading=reading
    )
    assert fewer.describe()["n_counted"] == 6 * len("be kind")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (lambda ids: ids > 0, "text 0: the function given as tokens failed"),
        (lambda ids, positions: positions, "text 0: expected 8 truth values"),
        (lambda ids, positions: positions[:3] > 0, "text 0: expected 8 truth values"),
        ([[True] * 8], "tokens has 1 sequences of truth values for 2 texts"),
        ([[True] * 8, [True] * 3], "text 1: expected 8 truth values"),
        ("assistant", "tokens must be a function"),
        (lambda ids, positions: positions < 0, "none of the 2 texts has a chosen token"),
    ],
)
def test_what_chooses_no_tokens_is_told(pair, tokens, message) -> None:
    with pytest.raises(HyperlensError, match=message):
        compare_models(pair, ["a text a", "b text b"], tokens=tokens, progress=False)


def test_a_function_is_told_from_another_of_its_name() -> None:
    made = [read_as(tokens=lambda ids, at, k=k: at < k).describe() for k in (1, 2)]
    closed = [read_as(tokens=closing_over(k)).describe() for k in (1, 2, 2)]
    assert made[0] != made[1]
    assert closed[0] != closed[1] == closed[2]
    masks = [read_as(tokens=[[True, False], mask]).describe() for mask in ([True], [False])]
    assert masks[0] != masks[1]


def closing_over(k: int) -> Any:
    return lambda ids, positions: positions < k


# Along an answer


def test_the_output_along_answers_is_that_of_plain_forward_passes(pair) -> None:
    talks = [{"messages": [SYSTEM, {**TALK[0], "content": "hi" * i}, *TALK[1:]]} for i in range(5)]
    found = compare_models(
        pair, talks, probes=[OutputByPosition(4)], max_length=LONG, progress=False
    )
    tokenizer = letters(LLAMA3)
    expected: dict[int, list[float]] = {}
    for talk in talks:
        messages = talk["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"][:LONG]
        with torch.no_grad():
            base, tuned = (
                side.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
                for side in (pair.base, pair.tuned)
            )
        kl = (tuned.exp() * (tuned - base)).sum(-1)
        for turn in (2, 4):
            before = tokenizer.apply_chat_template(
                messages[:turn], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for place in range(5):
                if len(before) - 1 + place < len(whole):
                    expected.setdefault(place, []).append(float(kl[len(before) - 1 + place]))
    for place, values in expected.items():
        row = found.at("output_by_position", f"kl_{place}", -1, "final_norm")
        assert row.n == len(values)
        assert row.value == pytest.approx(np.mean(values), rel=1e-4)
    assert found.select("output_by_position", "kl_4")
    assert "along the answer" in str(list(found.evidence()))


def test_the_output_along_texts_counts_their_tokens(pair) -> None:
    texts = ["once upon", "there", "who had no name"]
    found = compare_models(pair, texts, probes=["output_by_position"], progress=False)
    n = {r.metric: r.n for r in found.long if r.metric.startswith("kl_")}
    lengths = [len(text) for text in texts]
    assert n == {f"kl_{k}": sum(k <= length for length in lengths) for k in range(1, 16)}


# ShareGPT


def test_conversations_of_sharegpt_are_read(tmp_path, pair) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [
        {
            "id": "x",
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row],
        }
        for row in (one["messages"] for one in rows())
    ]
    (tmp_path / "shared.jsonl").write_text("\n".join(map(json.dumps, shared)))
    for source in (shared, tmp_path / "shared.jsonl"):
        assert list(read_examples(source)) == rows()
    assert pair.tokenize(shared).sha256 == pair.tokenize(rows()).sha256
    (trained,) = examples(read_examples(shared[:1]), letters(CHATML), "completions")
    (usual,) = examples(read_examples(rows()[:1]), letters(CHATML), "completions")
    assert trained.ids.tolist() == usual.ids.tolist()
    assert trained.counted.tolist() == usual.counted.tolist()
    with pytest.raises(HyperlensError, match="row 1: expected messages"):
        read_examples([{"conversations": [{"from": "human"}]}])
    with pytest.raises(
        HyperlensError, match="row 2 has messages, and rows before it conversations"
    ):
        read_examples([shared[0], rows()[0]])


def test_training_refuses_answers_that_the_template_shortens() -> None:
    tokenizer = letters(TWELVE["thinking"])
    assert list(examples(read_examples([{"messages": TALK}]), tokenizer, "completions"))
    with pytest.raises(HyperlensError, match="writes the assistant's turns otherwise"):
        list(examples(read_examples([{"messages": THOUGHTFUL}]), tokenizer, "completions"))


def test_training_refuses_a_choice_of_tokens() -> None:
    with pytest.raises(HyperlensError, match="leave roles, tokens and chat_template out"):
        list(examples(read_examples(rows(), roles=["user"]), letters(CHATML), "completions"))
