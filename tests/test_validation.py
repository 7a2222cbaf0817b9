"""The zoo of planted pairs: truths are named, and the zoo can fail."""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import short

from hyperlens import cli
from hyperlens.errors import HyperlensError, ResultsError
from hyperlens.experiments import static_bias, temperature
from hyperlens.models.structure import find_structure
from hyperlens.patching import blocks
from hyperlens.patching.expansion import result as expansion_rules
from hyperlens.questions import QUESTIONS
from hyperlens.render.blocks import Table, Verdict, flat
from hyperlens.statistics.significance import clopper_pearson
from hyperlens.validation import ValidationResult, constructions, validate, verdicts
from hyperlens.validation.planted import KINDS, random_gpt2, random_llama, random_texts
from hyperlens.validation.verdicts import ANSWERS, CONTRADICTIONS, contradictions, phrase

LONG = pytest.mark.long
# Kinds, and the experiments that have something to name there.
SHORT = {
    "temperature": ("temperature", "provenance"),
    "attention_head": ("patch_blocks", "patch_weights", "patch_norm"),
    "position": ("patch_positions",),
    "new_features": ("patch_expansion",),
}


def one_of(*kinds, **options):
    return validate(only=kinds, n_nulls=1, n_planted=1, progress=False, **options)


def asking(monkeypatch, *names):
    """Only these experiments are run."""
    chosen = [one for one in verdicts.EXPERIMENTS if one.name in names]
    assert {one.name for one in chosen} == set(names)
    monkeypatch.setattr(verdicts, "EXPERIMENTS", chosen)


def test_a_planted_bias_is_named_by_every_experiment_and_none_contradicts_another():
    found = one_of("bias")
    assert found.false_alarms("bias").hits == 0, found.rows(outcome="wrong")
    assert found.detections("bias").hits == 1, found.rows(outcome="undecided")
    assert found.extras["contradictions"] == []
    names = {question.name for question in QUESTIONS}
    assert names - {one.name for one in verdicts.EXPERIMENTS} == {
        *("decoding", "cross_domain", "mauve", "judge", "variants", "training", "sweep"),
        *("reproduction", "weights", "first_divergence", "attribute", "trajectory", "check"),
    }
    # The null test's answer is not known there, and it is not asked.
    assert {row["verdict"] for row in found.table} == ANSWERS.keys() - {"random changes"}
    assert "named it in 1; something false was said in 0." in found.conclusions()[0]
    assert "On none of 1 pair do two verdicts contradict" in found.conclusions()[1]


@pytest.mark.parametrize("kind", list(SHORT))
def test_other_planted_truths_are_named(kind, monkeypatch):
    asking(monkeypatch, *SHORT[kind])
    found = one_of(kind)
    assert found.false_alarms(kind).hits == 0, found.rows(outcome="wrong")
    assert found.detections(kind).hits == 1, found.rows(outcome="undecided")


@LONG
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_with_every_experiment(kind):
    result = validate(only=[kind], n_nulls=5, n_planted=3, seed=100, progress=False)
    assert result.false_alarms(kind).hits <= (2 if KINDS[kind].is_null else 0)
    assert result.extras["contradictions"] == []


# The zoo can fail: each rule is broken in the one place that makes it.


def test_a_temperature_test_that_always_says_temperature_is_found_out(monkeypatch):
    asking(monkeypatch, "temperature", "provenance")
    monkeypatch.setattr(temperature, "ALIKE", -1.0)
    result = one_of("bias")
    assert result.false_alarms("bias", "temperature").hits == 1
    assert result.detections("bias").hits == 0
    (planted, against) = result.conclusions()[:2]
    assert "something false was said in 1 (bias)" in planted
    assert "On 1 of 1 pairs verdicts contradict each other" in against
    words = {one["words"] for one in result.extras["contradictions"]}
    assert "no more than a temperature, yet top-1 predictions differ" in words
    assert "contradict each other" in result.summary()


def test_a_block_that_is_blamed_for_the_head_is_found_out(monkeypatch):
    """What `patch_blocks` once did: the head's share counted as the last block's."""
    asking(monkeypatch, "patch_blocks", "patch_weights")
    honest = blocks.BlocksResult.parts

    def blamed(self, metric="to_tuned"):
        parts = honest(self, metric)
        head = {**parts["head"], "value": 0.0}
        more = {**parts["head"], "low": 0.9, "high": 1.0}
        return parts | {"last_block": parts["head"], "head": head} | {
            f"last_block - {part}": more for part in ("incoming_residual", "head")
        }  # fmt: skip

    monkeypatch.setattr(blocks.BlocksResult, "parts", blamed)
    result = one_of("bias")
    (row,) = result.rows(verdict="blocks")
    assert (row["answer"], row["outcome"]) == ("the last block", "wrong")
    words = {one["words"] for one in result.extras["contradictions"]}
    assert any("yet no block is needed (patch_weights)" in text for text in words)
    assert any("yet norm or unembedding does most alone" in text for text in words)


def test_a_bias_that_is_missed_is_a_miss_and_no_false_alarm(monkeypatch):
    asking(monkeypatch, "static_bias")
    honest = static_bias.StaticBiasResult.verdicts

    def blind(self):
        return [Verdict(one.topic, "The best of 4 biases tried: no clear gain.") for one in
                honest(self)]  # fmt: skip

    monkeypatch.setattr(static_bias.StaticBiasResult, "verdicts", blind)
    kind = KINDS["bias"]
    unsure = kind._replace(plant=lambda seed: replace(kind.plant(seed), wrong={}))
    monkeypatch.setitem(KINDS, "bias", unsure)
    result = one_of("bias")
    (row,) = result.rows(verdict="bias")
    assert (row["answer"], row["outcome"]) == ("no clear gain", "undecided")
    assert result.false_alarms("bias").hits == 0
    assert result.detections("bias").hits == 0
    (table,) = (block for block in flat(result.blocks())
                if isinstance(block, Table) and block.head[0] == "planted"
                and len(block.head) == 4)  # fmt: skip
    assert "bias: no clear gain (1)" in table.rows[0][-1]


def test_an_expansion_rule_that_is_always_for_it_is_found_out(monkeypatch):
    asking(monkeypatch, "patch_expansion")
    honest = expansion_rules.ExpansionResult.verdicts

    def believing(self):
        first, *others = honest(self)
        return [Verdict(first.topic, "Supported: that the expansion causes it."), *others]

    monkeypatch.setattr(expansion_rules.ExpansionResult, "verdicts", believing)
    result = one_of("two_draws")
    assert result.false_alarms("two_draws", "expansion").hits == 1
    # Of one pair more cannot be said.
    assert "above 5%, but not told from it: expansion (two_draws, 1 of 1" in result.conclusions()[0]
    table = [{**row, "pair": pair} for row in result.table for pair in range(4)]
    more = replace(result, table=tuple(table)).conclusions()[0]
    assert "an alarm, by the lower bound, in expansion (two_draws, 4 of 4" in more


def test_a_sentence_that_nobody_knows_is_an_error_and_no_miss(monkeypatch):
    class Worded:
        name = "temperature"

        def verdicts(self):
            return [Verdict("predictions", "It is something else.")]

    with pytest.raises(ResultsError, match="none of the known words"):
        phrase(Worded(), "predictions", {"no more than a temperature": "temperature"})


# The constructions


def test_a_relabelled_model_is_the_same_model_of_other_tokens():
    base = random_llama(3)
    tuned = constructions.relabelled(base, 1)
    (text,) = random_texts(0, 1)
    before, after = base.get_input_embeddings().weight, tuned.get_input_embeddings().weight
    order = [int((before == row).all(1).nonzero()) for row in after]
    assert sorted(order) == list(range(len(before)))
    assert order[:3] == [0, 1, 2]
    assert order != sorted(order)
    with torch.no_grad():
        theirs = tuned(torch.tensor([text])).logits
        ours = base(torch.tensor([[order[token] for token in text]])).logits
    torch.testing.assert_close(theirs, ours[..., order])


@cache
def planted(kind):
    return KINDS[kind].plant(2)


# Expansions take a second each, and are planted in much the same way.
SLOW = ("unread_expansion", "stretched", "new_features")


@pytest.mark.parametrize(
    "kind",
    short([*KINDS], *(kind for kind in KINDS if kind not in SLOW)),
)
def test_a_pair_is_the_same_for_the_same_seed_and_leaves_random_numbers_alone(kind):
    one = planted(kind)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    other = KINDS[kind].plant(2)
    assert torch.equal(torch.get_rng_state(), before)
    for side in ("base", "tuned"):
        first, second = (dict(getattr(pair, side).state_dict()) for pair in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.texts == other.texts
    base, tuned = one.base.state_dict(), one.tuned.state_dict()
    assert base.keys() == tuned.keys()
    differs = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert bool(differs) is (kind != "same")


@pytest.mark.parametrize(
    "kind",
    short([*KINDS], *(kind for kind in KINDS if kind not in SLOW)),
)
def test_truths_are_about_answers_that_exist_and_none_is_right_and_wrong(kind):
    # The block that differs, if it is one, goes by the seed: 2 is the last.
    others = [KINDS[kind].plant(seed) for seed in range(2) if kind in ("block", "attention_head")]
    for pair in (planted(kind), *others):
        for said in (pair.right, pair.wrong):
            for name, answers in said.items():
                assert set(answers) <= set(ANSWERS[name]), name
        for name in pair.right.keys() & pair.wrong.keys():
            assert not set(pair.right[name]) & set(pair.wrong[name]), name
        # What is right of a pair is no contradiction in itself.
        assert list(contradictions({name: said[0] for name, said in pair.right.items()})) == []


def test_contradictions_are_about_answers_that_exist():
    for one in CONTRADICTIONS:
        for name, answers in (one.first, one.second):
            assert set(answers) <= set(ANSWERS[name]), one.words
        both = {one.first[0]: one.first[1][0], one.second[0]: one.second[1][0]}
        assert one.words in set(contradictions(both))


def test_a_position_is_the_only_change():
    base = random_gpt2(0)
    tuned = constructions.with_position(base, 5, 20.0, 1)
    tables = [model.transformer.wpe.weight for model in (base, tuned)]
    assert (tables[0] != tables[1]).any(1).nonzero().flatten().tolist() == [5]


def test_what_is_added_to_a_last_block_keeps_its_place():
    base = copy.deepcopy(random_llama(0))
    same = constructions.same_form(base)
    assert isinstance(find_structure(same).blocks[-1], constructions.Adding)
    ids = torch.tensor(random_texts(0, 1))
    with torch.no_grad():
        assert torch.equal(same(ids).logits, base(ids).logits)


# The function, its result and its command


def test_an_interrupted_run_goes_on_and_a_saved_one_comes_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["validate", "--only", "norm,unembedding", "--planted", "1", "--out", str(out)]
    from hyperlens.validation import experiment

    asked = []

    def watched(base, tuned, texts, seed, with_null_test):
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"norm": "all", "part alone": "unembedding"}

    monkeypatch.setattr(experiment, "answers_of", watched)
    assert cli.main(command) == cli.INTERRUPTED
    assert len(list((tmp_path / "out.partial").iterdir())) == 1
    assert cli.main(command) == cli.OK
    assert asked == [0, 0, 0]
    assert not (tmp_path / "out.partial").exists()
    loaded = ValidationResult.load(out)
    assert loaded.n_pairs == 2
    assert loaded.detections("norm", "norm").hits == 1
    assert loaded.false_alarms("norm", "part alone").hits == 1
    assert loaded.detections("norm").hits == loaded.detections("unembedding").hits == 0
    assert len(loaded.extras["contradictions"]) == 2
    assert loaded.to_frame().shape == (len(loaded.table), 6)
    assert json.loads((out / "validation.json").read_text())["name"] == "validation"
    assert 'data-section="validation"' in (out / "report.html").read_text("utf-8")


def test_what_is_interrupted_without_a_folder_says_that_nothing_is_kept(monkeypatch, capsys):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperlens.validation.experiment.answers_of", stopped)
    assert cli.main(["validate", "--only", "same"]) == cli.INTERRUPTED
    assert "nothing is kept without --out" in capsys.readouterr().err


def test_refusals_say_what_to_do(tmp_path, capsys):
    with pytest.raises(HyperlensError, match=r"only.*temperatur"):
        validate(only=["temperatur"], progress=False)
    with pytest.raises(HyperlensError, match="n_nulls must be at least 1"):
        validate(n_nulls=0, progress=False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(HyperlensError, match="already exists"):
        validate(out=tmp_path / "there", progress=False)
    assert cli.main(["validate", "--only", "biass"]) == cli.FAILED
    assert "bias" in capsys.readouterr().err


def test_only_what_there_is_to_name_of_a_pair_counts_for_it(monkeypatch):
    """Of a last block that earlier tokens do nothing is a truth; of another block it is none."""
    answers = {name: said[0] for name, said in KINDS["block"].plant(2).right.items()}

    def named(base, tuned, texts, seed, with_null_test):
        parts = {"part alone": f"block {seed}"}
        if seed < 2:
            parts |= {"blocks": "what enters the last block", "positions": "a token"}
        return answers | parts

    monkeypatch.setattr("hyperlens.validation.experiment.answers_of", named)
    result = validate(only=["block"], n_planted=3, progress=False)
    assert (result.detections("block").hits, result.detections("block").n) == (3, 3)
    assert result.detections("block", "positions").n == 1


def test_intervals_are_exact():
    # Clopper and Pearson's own relation to the binomial: the tails beyond the ends are 2.5%.
    from scipy.stats import binom

    for hits, n in ((3, 40), (7, 200)):
        low, high = clopper_pearson(hits, n)
        assert binom.sf(hits - 1, n, low) == pytest.approx(0.025)
        assert binom.cdf(hits, n, high) == pytest.approx(0.025)
    assert clopper_pearson(0, 9)[0] == 0
    assert clopper_pearson(9, 9)[1] == 1
