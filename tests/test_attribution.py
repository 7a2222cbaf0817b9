"""Attributions against plain forward hooks, and against what was planted."""

import copy
import math

import pytest
import torch
import transformers
from conftest import SIZES, lora, make_tiny, perturbed, token_texts, trials
from scipy import stats
from test_prompts import one_token_per_byte

from hyperlens import cli, load_hooked, open_pair, write_report
from hyperlens.errors import ArgumentError, LoadingError, PairError, PatchError
from hyperlens.experiments import AttributionResult, attribute
from hyperlens.experiments.attribution import agreement, beyond_controls, bounded_correlation
from hyperlens.hooks.components import find_components
from hyperlens.hooks.patterns import attention_patterns
from hyperlens.statistics.significance import Estimate

TEXTS = token_texts(10, shortest=8, longest=16)
PLAIN = {"n_controls": 0, "n_verified": 0, "progress": False}
N_HEADS = 4


def moe(seed: int = 0):
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=8, mlp_only_layers=[0], **experts)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make(name: str):
    return moe() if name == "qwen3_moe" else make_tiny(name)


def said(found: AttributionResult) -> str:
    return " ".join(found.summary().split())


# An oracle that knows the architectures by name.


def output_projections(model):
    if hasattr(model, "transformer"):
        return [block.attn.c_proj for block in model.transformer.h]
    if hasattr(model, "gpt_neox"):
        return [block.attention.dense for block in model.gpt_neox.layers]
    return [block.self_attn.o_proj for block in model.model.layers]


def by_hand(model, ids):
    """At every token: what embedding, heads, biases and MLPs add to the stream, and the stream."""
    kept = {}

    def keep(name, of_input=False):
        def hook(module, args, kwargs, output):
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            kept[name] = (value[0] if isinstance(value, tuple) else value)[0].double()

        return hook

    if hasattr(model, "transformer"):
        blocks, norm = model.transformer.h, model.transformer.ln_f
        attention, mlp = "attn", "mlp"
    elif hasattr(model, "gpt_neox"):
        blocks, norm = model.gpt_neox.layers, model.gpt_neox.final_layer_norm
        attention, mlp = "attention", "mlp"
    else:
        blocks, norm = model.model.layers, model.model.norm
        after = hasattr(blocks[0], "pre_feedforward_layernorm")
        attention = "post_attention_layernorm" if after else "self_attn"
        mlp = "post_feedforward_layernorm" if after else "mlp"
    handles = [norm.register_forward_hook(keep("last", of_input=True), with_kwargs=True)]
    handles.append(blocks[0].register_forward_hook(keep("first", True), with_kwargs=True))
    for i, (block, out) in enumerate(zip(blocks, output_projections(model), strict=True)):
        for name, module, is_input in (
            (f"attention {i}", getattr(block, attention), False),
            (f"mlp {i}", getattr(block, mlp), False),
            (f"z {i}", out, True),
            (f"y {i}", out, False),
        ):
            handles.append(module.register_forward_hook(keep(name, is_input), with_kwargs=True))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    for handle in handles:
        handle.remove()
    parts = {("embedding", -1, -1): kept["first"]}
    for i, out in enumerate(output_projections(model)):
        is_conv = type(out).__name__ == "Conv1D"
        weight = (out.weight.T if is_conv else out.weight).detach().double()
        width = weight.shape[1] // N_HEADS
        total = kept[f"attention {i}"]
        scale = torch.ones_like(total)
        if attention == "post_attention_layernorm":  # Gemma's norms multiply by 1 + weight
            norm_after = blocks[i].post_attention_layernorm
            mean = kept[f"y {i}"].square().mean(-1, keepdim=True)
            scale = (1 + norm_after.weight.detach().double()) / (mean + norm_after.eps).sqrt()
        for head in range(N_HEADS):
            own = slice(head * width, (head + 1) * width)
            parts["head", i, head] = (kept[f"z {i}"][:, own] @ weight[:, own].T) * scale
        bias = 0 if out.bias is None else out.bias.detach().double()
        parts["attention_bias", i, -1] = torch.zeros_like(total) + bias
        parts["mlp", i, -1] = kept[f"mlp {i}"]
    return parts, kept["last"], norm, logits


def read_by_hand(model, x, last, norm, plus, minus):
    """(weight of the norm ⊙ difference of rows of the unembedding) · x over the stream's size."""
    rows = model.get_output_embeddings().weight.detach().double()
    weight = norm.weight.detach().double()
    if type(norm).__name__.startswith("Gemma"):
        weight = weight + 1
    is_layer_norm = isinstance(norm, torch.nn.LayerNorm)
    centre = (lambda v: v - v.mean(-1, keepdim=True)) if is_layer_norm else (lambda v: v)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    size = (centre(last).square().mean(-1, keepdim=True) + eps).sqrt()
    return ((rows[plus] - rows[minus]) * weight * centre(x) / size).sum(-1)


ARCHITECTURES = ("llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_those_of_a_plain_loop_and_sum_to_the_difference(name: str) -> None:
    base = make(name)
    tuned = perturbed(base, 0.05)
    found = attribute(base, tuned, TEXTS, **PLAIN)
    sums: dict = {}
    whole, n, decisions = {"base": 0.0, "tuned": 0.0}, 0, 0
    for text in TEXTS:
        read = {"base": by_hand(base, text), "tuned": by_hand(tuned, text)}
        tops = [read[side][3].argmax(-1) for side in ("base", "tuned")]
        counted = torch.tensor(text) != 1
        at = counted & (tops[0] != tops[1])
        n, decisions = n + int(at.sum()), decisions + int(counted.sum())
        plus, minus = tops[1][at], tops[0][at]
        for side, model in (("base", base), ("tuned", tuned)):
            parts, last, norm, logits = read[side]
            row = torch.arange(len(plus))
            whole[side] += float((logits[at][row, plus] - logits[at][row, minus]).sum())
            for part, x in parts.items():
                value = float(read_by_hand(model, x[at], last[at], norm, plus, minus).sum())
                sums[part, side] = sums.get((part, side), 0.0) + value
    assert (found.extras["decisions"], found.extras["changed"]) == (decisions, n)
    assert n > 20
    for side, total in whole.items():
        rows = found.rows(metric=side)
        values = {(r["kind"], r["block"], r["head"]): r["value"] for r in rows}
        assert values.pop(("all", -1, -1)) == pytest.approx(total / n, abs=1e-4)
        # The plain loop has positions in the embedding.
        values["embedding", -1, -1] += values.pop(("position", -1, -1), 0.0)
        for part, value in values.items():
            if part[0] not in ("norm_bias", "unembedding_bias", "soft_cap"):
                assert value == pytest.approx(sums[part, side] / n, abs=1e-4), part
        assert sum(values.values()) == pytest.approx(total / n, abs=1e-4)
    assert found.extras["largest_remainder"] < 1e-4  # of every single decision
    change = found.value(kind="all", metric="change")
    assert sum(row["value"] for row in found.rows(metric="written")) == pytest.approx(change)
    assert sum(row["value"] for row in found.rows(metric="share")) == pytest.approx(1.0)
    has_cap = found.value(kind="soft_cap", metric="base") != 0
    assert has_cap == (name == "gemma2")
    assert bool(found.rows(kind="position")) == (name == "gpt2")


def test_branches_are_the_sums_of_their_heads() -> None:
    base = make_tiny("gpt2")
    tuned = perturbed(base, 0.05)
    whole = attribute(base, tuned, TEXTS, by="branches", **PLAIN)
    split = attribute(base, tuned, TEXTS, **PLAIN)
    for block in range(3):
        heads = split.rows(kind="head", block=block, metric="written")
        total = sum(row["value"] for row in heads)
        total += split.value(kind="attention_bias", block=block, metric="written")
        one = whole.value(kind="attention", block=block, metric="written")
        assert one == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize(("name", "block", "head"), [("llama", 2, 1), ("gemma2", 1, 3)])
def test_a_changed_head_leads(name: str, block: int, head: int) -> None:
    base = make_tiny(name)
    tuned = copy.deepcopy(base)
    torch.manual_seed(5)
    with torch.no_grad():
        weight = output_projections(tuned)[block].weight
        width = weight.shape[1] // N_HEADS
        own = weight[:, head * width : (head + 1) * width]
        own += 1.0 * torch.randn_like(own)
    n_controls = 9 if name == "llama" else 0
    found = attribute(base, tuned, TEXTS, n_verified=1, n_controls=n_controls, progress=False)
    first = found.leaders()[0]
    assert (first["kind"], first["block"], first["head"]) == ("head", block, head)
    assert f"Head {head} of block {block} writes" in said(found)
    if n_controls:  # random changes of that matrix change every head of the block
        assert [(r["block"], r["head"]) for r in found.beyond()] == [(block, head)]
    # Nothing else was changed that comes before it, or beside it with no norm after the heads.
    for row in found.rows(kind="head", metric="written"):
        is_before = row["block"] < block + (name == "llama")
        if is_before and (row["block"], row["head"]) != (block, head):
            assert row["value"] == pytest.approx(0.0, abs=1e-6)
    effect = found.value(kind="head", block=block, head=head, metric="effect")
    # All that was changed is put into the base: it becomes the tuned model.
    assert effect == pytest.approx(found.value(kind="all", metric="change"), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_changed_mlp_leads(name: str) -> None:
    base = make(name)
    tuned = copy.deepcopy(base)
    changed = perturbed(base, 0.2)
    tuned.model.layers[1].mlp.load_state_dict(changed.model.layers[1].mlp.state_dict())
    found = attribute(base, tuned, TEXTS, n_verified=2, n_controls=0, progress=False)
    first = found.leaders()[0]
    assert (first["kind"], first["block"]) == ("mlp", 1)
    assert "MLP of block 1 writes most of the change" in said(found)
    effects = {(r["kind"], r["block"]): r["value"] for r in found.rows(metric="effect")}
    change = found.value(kind="all", metric="change")
    assert effects["mlp", 1] == pytest.approx(change, abs=1e-4)
    # Attention of the same block, before it, writes as before.
    assert all(abs(r["value"]) < 1e-6 for r in found.rows(kind="head", block=1, metric="written"))
    routed = found.rows(metric="routing_overlap")
    assert len(routed) == (2 if name == "qwen3_moe" else 0)


def test_effects_and_their_agreement_are_those_of_plain_hooks() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.05)
    found = attribute(base, tuned, TEXTS, n_verified=3, n_controls=0, progress=False)
    tried = [*found.extras["leading"], *found.extras["others"]]
    assert len(tried) == 6
    sums, n = [0.0] * 6, 0
    for text in TEXTS:
        ids = torch.tensor([text])
        with torch.no_grad():
            own, other = (m(ids).logits[0].double() for m in (base, tuned))
        at = (torch.tensor(text) != 1) & (own.argmax(-1) != other.argmax(-1))
        plus, minus = other.argmax(-1)[at], own.argmax(-1)[at]
        row = torch.arange(len(plus))
        n += len(plus)
        for i, one in enumerate(tried):
            changed = patched_by_hand(base, tuned, ids, one)[at]
            moved = (changed - own[at])[row, plus] - (changed - own[at])[row, minus]
            sums[i] += float(moved.sum())
    effects = [total / n for total in sums]
    written = [found.value(**one, metric="written") for one in tried]
    for one, effect in zip(tried, effects, strict=True):
        assert found.value(**one, metric="effect") == pytest.approx(effect, abs=1e-4)
    rho = float(stats.spearmanr(written, effects).statistic)
    assert found.value(metric="rank_correlation") == pytest.approx(rho)
    errors = sum((e - w) ** 2 for e, w in zip(effects, written, strict=True))
    explained = 1 - errors / sum(e**2 for e in effects)
    assert found.value(metric="explained") == pytest.approx(explained, abs=1e-3)


def patched_by_hand(base, tuned, ids, one):
    """Logits of a Llama in which one component is another Llama's."""
    kept = []

    def run(model, module, hook):
        with module.register_forward_hook(hook), torch.no_grad():
            return model(ids).logits[0].double()

    if one["kind"] == "embedding":
        value = tuned.model.embed_tokens(ids)
        return run(base, base.model.embed_tokens, lambda *_: value)
    if one["kind"] == "mlp":
        modules = [m.model.layers[one["block"]].mlp for m in (base, tuned)]
        run(tuned, modules[1], lambda _, args, out: kept.append(out))
        return run(base, modules[0], lambda *_: kept[0])
    own, other = (output_projections(m)[one["block"]] for m in (base, tuned))
    width = own.weight.shape[1] // N_HEADS
    part = slice(one["head"] * width, (one["head"] + 1) * width)
    run(tuned, other, lambda _, args, out: kept.append(args[0]))

    def replace(_, args, out):
        before = args[0][..., part] @ own.weight[:, part].T
        return out - before + kept[0][..., part] @ other.weight[:, part].T

    return run(base, own, replace)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "position"), ("gpt_neox", "mlp")])
def test_what_alone_was_changed_makes_the_base_the_tuned_model(name: str, kind: str) -> None:
    base = make_tiny(name)
    tuned, changed = copy.deepcopy(base), perturbed(base, 0.3)
    if kind == "position":
        tuned.transformer.wpe.load_state_dict(changed.transformer.wpe.state_dict())
    else:
        other = changed.gpt_neox.layers[0].mlp.state_dict()
        tuned.gpt_neox.layers[0].mlp.load_state_dict(other)
    found = attribute(base, tuned, TEXTS, n_verified=22, n_controls=0, progress=False)
    block = 0 if kind == "mlp" else -1
    effect = found.value(kind=kind, block=block, metric="effect")
    assert effect == pytest.approx(found.value(kind="all", metric="change"), abs=1e-4)
    # What is before it, or beside it in a parallel block, is as it was.
    assert found.value(kind="embedding", metric="effect") == pytest.approx(0.0, abs=1e-5)
    if kind == "mlp":
        beside = found.rows(kind="head", block=0, metric="effect")
        assert len(beside) == N_HEADS
        assert all(abs(row["value"]) < 1e-5 for row in beside)


def test_the_same_model_has_nothing_to_attribute(tmp_path) -> None:
    base = make_tiny("llama")
    found = attribute(base, copy.deepcopy(base), TEXTS, progress=False)
    assert (found.extras["changed"], found.table) == (0, ())
    assert found.conclusions() == [
        f"The two models' top-1 tokens are the same after all {found.extras['decisions']} tokens. "
        "There is nothing to attribute."
    ]
    found.save(tmp_path / "out")
    assert AttributionResult.load(tmp_path / "out").to_dict() == found.to_dict()
    write_report(tmp_path / "page.html", [found])


def test_noise_is_not_claimed_to_be_more_than_noise() -> None:
    base = make_tiny("llama")
    tuned = perturbed(base, 0.02)
    found = attribute(base, tuned, TEXTS, n_verified=0, n_controls=2, progress=False)
    assert found.beyond() == []
    assert "No component writes a larger share of the change" in said(found)
    # Alone the list would look meaningful: decisions were chosen for having changed.
    assert found.leaders()[0]["low"] > 0


@pytest.mark.long
def test_noise_is_rarely_claimed_to_be_more_than_noise() -> None:
    """At most 5% of 200 pairs, with what chance adds to it."""
    claims = 0
    for seed in trials(200):
        base = make_tiny("llama", seed=seed)
        tuned = perturbed(base, 0.02, seed=1000 + seed)
        by = ("heads", "branches")[seed % 2]
        found = attribute(
            base, tuned, TEXTS, by=by, n_verified=0, n_controls=9, seed=seed, progress=False
        )
        claims += bool(found.beyond())
    assert claims <= 16  # of 200 at 5%, more in 2% of all trials


def test_an_adapter_and_batches_do_not_matter() -> None:
    base = make_tiny("llama")
    adapter = lora(copy.deepcopy(base), "llama")
    merged = copy.deepcopy(adapter).merge_and_unload()
    options = {"n_verified": 2, "n_controls": 0, "progress": False}
    whole = attribute(base, adapter, TEXTS[:3], batch_size=3, **options)
    single = attribute(base, merged, TEXTS[:3], batch_size=1, **options)
    for a, b in zip(whole.table, single.table, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-3), a


def test_patterns_and_experts_are_those_of_the_models() -> None:
    base = moe()
    tuned = perturbed(base, 0.02)
    found = attribute(base, tuned, TEXTS, **PLAIN)
    moved, apart, same, elsewhere, n = 0.0, 0.0, 0.0, 0.0, 0
    load = torch.zeros(2, 4)
    for text in TEXTS:
        ids, counted = torch.tensor([text]), torch.tensor(text) != 1
        patterns, chosen = [], []
        for model in (base, tuned):
            eager = copy.deepcopy(model)
            eager.set_attn_implementation("eager")
            with torch.no_grad():
                out = eager(ids, output_attentions=True, output_router_logits=True)
            patterns.append(out.attentions[1][0, 3])
            chosen.append(out.router_logits[0].topk(2).indices)  # of block 1: block 0 has none
            following = out.attentions[1][0, 0]
            if model is base:
                apart += float((patterns[0] - following).abs().sum(-1)[counted].sum() / 2)
        moved += float((patterns[0] - patterns[1]).abs().sum(-1)[counted].sum() / 2)
        here, there = (x[counted] for x in chosen)
        rolled = there.roll(len(there) // 2, 0)
        for a, b, c in zip(here.tolist(), there.tolist(), rolled.tolist(), strict=True):
            same += len({*a} & {*b}) / 2
            elsewhere += len({*a} & {*c}) / 2
        for i, x in enumerate((here, there)):
            load[i] += torch.bincount(x.flatten(), minlength=4)
        n += int(counted.sum())
    head = {"kind": "head", "block": 1, "head": 3}
    assert found.value(**head, metric="pattern_distance") == pytest.approx(moved / n, abs=1e-5)
    between = found.value(**head, metric="pattern_distance_of_heads")
    assert between == pytest.approx(apart / n, abs=1e-5)
    mlp = {"kind": "mlp", "block": 1}
    assert found.value(**mlp, metric="routing_overlap") == pytest.approx(same / n)
    assert same / n < 1
    load = load / load.sum(-1, keepdim=True)
    loads = [one for one in found.extras["expert_load"] if one["block"] == 1]
    assert [one["tuned"] for one in loads] == pytest.approx(load[1].tolist())
    distance = float((load[0] - load[1]).abs().sum() / 2)
    assert found.value(**mlp, metric="load_distance") == pytest.approx(distance, abs=1e-6)
    assert "experts are the same" in said(found)
    control = found.value(**mlp, metric="routing_overlap_elsewhere")
    assert control == pytest.approx(elsewhere / n)


def test_attention_is_as_it_was_after_its_patterns_were_read() -> None:
    loaded = open_pair(make_tiny("llama"), make_tiny("llama")).base
    before = loaded.model.config._attn_implementation
    tokens = torch.tensor([[1, 5, 7, 9]])
    patterns = attention_patterns(loaded, tokens, torch.ones_like(tokens))
    assert [tuple(x.shape) for x in patterns] == [(1, 4, 4, 4)] * 3
    assert loaded.model.config._attn_implementation == before != "eager"


def test_what_an_architecture_does_not_allow_is_refused_by_name() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    with pytest.raises(PatchError, match="MambaForCausalLM's blocks return"):
        attribute(mamba, perturbed(mamba), TEXTS, **PLAIN)
    small = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    config = transformers.JambaConfig(
        **small, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=8, expert_layer_period=2, expert_layer_offset=1,
    )  # fmt: skip
    jamba = transformers.JambaForCausalLM(config).eval()
    with pytest.raises(PatchError, match=r"block 0 of JambaForCausalLM .* by='branches'"):
        attribute(jamba, perturbed(jamba), TEXTS, **PLAIN)
    found = attribute(jamba, perturbed(jamba, 0.1), TEXTS, by="branches", **PLAIN)
    assert found.extras["largest_remainder"] < 1e-4
    base = make_tiny("llama")
    with pytest.raises(LoadingError, match="cannot generate"):
        attribute(load_hooked(base), load_hooked(base), TEXTS, **PLAIN)
    with pytest.raises(PairError, match="backend='residual'"):
        find_components(open_pair(base, base, backend="bridge").base, "heads")
    with pytest.raises(ArgumentError, match="at least 2"):
        attribute(base, base, TEXTS, n_controls=1)


def test_a_scaled_residual_is_refused_with_the_reason() -> None:
    config = transformers.GraniteConfig(**SIZES, residual_multiplier=0.5)
    granite = transformers.GraniteForCausalLM(config).eval()
    reason = "GraniteForCausalLM's blocks return.*it is scaled.*patch_blocks"
    with pytest.raises(PatchError, match=reason):
        attribute(granite, perturbed(granite), TEXTS, **PLAIN)


def test_another_unembedding_alone_ranks_nothing() -> None:
    base = make_tiny("llama")
    tuned = copy.deepcopy(base)
    torch.manual_seed(3)
    with torch.no_grad():
        tuned.lm_head.weight += 0.1 * torch.randn_like(tuned.lm_head.weight)
    found = attribute(base, tuned, TEXTS, n_verified=2, n_controls=2, progress=False)
    assert found.extras["changed"] > 0
    assert (found.leaders(), found.beyond(), found.extras["leading"]) == ([], [], [])
    assert found.rows(metric="effect") == found.rows(metric="explained") == []
    text = said(found)
    assert "No component writes anything differently" in text
    assert "No head attends differently" in text
    assert "attends most differently" not in text
    assert found.value(kind="reading", metric="share") == pytest.approx(1.0, abs=1e-5)
    assert found.evidence()


def test_few_components_have_no_interval_of_their_order() -> None:
    base = make_tiny("llama")
    found = attribute(
        base, perturbed(base, 0.05), TEXTS, n_verified=2, n_controls=0, progress=False
    )
    row = found.at(metric="rank_correlation")
    assert -1 <= row["value"] <= 1
    assert all(math.isnan(row[end]) for end in ("low", "high", "se"))
    assert "too few components for an interval" in said(found)


def test_a_correlation_stays_within_its_bounds() -> None:
    for value in (-1.0, -0.9, 0.0, 0.99, 1.0):
        found = bounded_correlation(Estimate(value, value - 1.33, value + 1.33, 0.5, 9), 24)
        assert -1 <= found.low <= value <= found.high <= 1
    # On Fisher's scale a small error is as it was.
    small = bounded_correlation(Estimate(0.5, 0.49, 0.51, 0.005, 9), 24)
    assert (small.low, small.high) == pytest.approx((0.49, 0.51), abs=1e-3)
    same = bounded_correlation(Estimate(0.8, 0.8, 0.8, 0.0, 9), 24)
    assert math.isnan(same.low)


def test_effects_of_rounding_are_not_explained() -> None:
    written = torch.tensor([1.0, -2.0, 0.5]).double()
    for effects in (torch.zeros(3).double(), 1e-8 * written):
        assert all(math.isnan(x) for x in agreement(written, effects, 3.0))
    assert agreement(written, written, 3.0) == pytest.approx((1.0, 1.0))


def test_a_norm_of_another_kind_is_refused() -> None:
    base = make_tiny("llama")

    class Squashing(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    base.model.norm = Squashing()
    with pytest.raises(PatchError, match="final norm of LlamaForCausalLM is no scale"):
        attribute(base, perturbed(base), TEXTS, **PLAIN)


def test_shares_above_controls() -> None:
    controls = torch.tensor([[0.10, 0.30], [0.12, 0.50], [0.08, 0.40]])
    found = [Estimate(x, x, x, 0.01, 9) for x in (0.20, 0.50)]
    p = beyond_controls(found, controls, ["head", "head"])
    spread = float(controls.double().var(0).mean())  # more than the first's own
    for value, of in ((p[0], spread), (p[1], 0.1**2)):
        t = 0.10 / math.sqrt(of * 4 / 3 + 0.01**2)
        assert value == pytest.approx(float(stats.t.sf(t, 2)), rel=1e-4)
    same = beyond_controls(
        [Estimate(0.125, 0.1, 0.1, 0.0, 9)], torch.full((3, 1), 0.125).double(), ["mlp"]
    )
    assert math.isnan(same[0])
    # Those of another kind tell nothing of it.
    alone = beyond_controls(found, controls, ["head", "mlp"])
    assert alone[1] == p[1]
    assert alone[0] < p[0]


def test_the_command_and_the_page(tmp_path, capsys) -> None:
    base = make_tiny("llama", vocab_size=300)
    for name, model in (("base", base), ("tuned", perturbed(base, 0.05))):
        model.save_pretrained(tmp_path / name)
        one_token_per_byte().save_pretrained(tmp_path / name)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"{k} once upon a time there was" for k in range(6)))
    sources = [str(tmp_path / "base"), str(tmp_path / "tuned"), "--texts", str(texts)]
    options = ["--n-controls", "2", "--n-verified", "2", "--by", "branches", "-q"]
    out = tmp_path / "out"
    assert cli.main(["attribute", *sources, *options, "--out", str(out)]) == cli.OK
    shown = capsys.readouterr().out
    assert "2 random changes of the same size in the same weights" in " ".join(shown.split())
    found = AttributionResult.load(out)
    assert 'data-section="attribute"' in (out / "report.html").read_text()
    assert found.extras["n_units"] == 6
