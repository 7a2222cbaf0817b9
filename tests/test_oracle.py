"""Every number against plain Hugging Face, numpy and scipy, written as differently as possible.

The oracle runs one unpadded text at a time, takes the last block's raw output with a plain torch
hook, and computes everything in float64 from stored activations.
"""

from functools import cache

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from dimensionality import participation_ratio

from hyperlens import compare_models
from hyperlens.data.texts import read_texts

N_TEXTS = 24
LENGTH = 48


def hyperfitted(folder, texts, tokenizer, steps=60):
    """A copy trained on eight passages until it has changed a lot; not our own trainer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.tensor([tokenizer(t)["input_ids"][:64] for t in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5
    return model.eval()


def streams(model, ids):
    """[layer, pos, d] raw residual streams of one text, in float64."""
    kept = []
    last = model.model.layers[-1]
    handle = last.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    raw = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    return torch.stack([*states[:-1], raw])[:, 0].double().numpy()


def normed(model, x):
    weight = model.model.norm.weight.detach().double().numpy()
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * weight


def logits(model, x):
    return normed(model, x) @ model.lm_head.weight.detach().double().numpy().T


def interval(values, sequence):
    """Interval of a mean over texts by leaving each text out, with effective degrees of freedom."""
    groups = [values[sequence == s] for s in np.unique(sequence)]
    mean, k = values.mean(), len(groups)
    others = [np.concatenate(groups[:i] + groups[i + 1 :]).mean() for i in range(k)]
    squares = (np.array(others) - mean) ** 2
    if not squares.any():
        return mean, np.nan, np.nan
    weight = np.array([len(g) for g in groups]) / len(values)
    of_spread = 2 * squares.sum() ** 2 / (k * squares.var(ddof=1))
    degrees = min(max(min(1 / (weight**2).sum() - 1, of_spread), 1), k - 1)
    half = scipy.stats.t.ppf(0.975, degrees) * np.sqrt((k - 1) / k * squares.sum())
    return mean, mean - half, mean + half


def plain_ratio(x):
    values = np.linalg.eigvalsh(np.cov(x.T))
    return values.sum() ** 2 / (values**2).sum()


class Oracle:
    def __init__(self, base, tuned, token_ids):
        self.models = base, tuned
        self.sequence = np.repeat(np.arange(len(token_ids)), [len(t) - 1 for t in token_ids])
        per_text = [[streams(m, ids) for ids in token_ids] for m in self.models]
        self.sinks = self._sinks(per_text)
        self.every = [np.concatenate(texts, axis=1) for texts in per_text]
        self.raw = [np.concatenate([x[:, 1:] for x in texts], axis=1) for texts in per_text]

    @staticmethod
    def _sinks(per_text):
        masks = []
        for pair in zip(*per_text, strict=True):
            big = False
            for x in pair:
                norm = np.linalg.norm(x, axis=-1)
                big = big | (norm > 10 * np.median(norm, axis=-1, keepdims=True))
            masks.append(big[:, 1:])
        return np.concatenate(masks, axis=1)

    def view(self, layer, view):
        keep = ~self.sinks[layer]
        for model, raw in zip(self.models, self.raw, strict=True):
            x = raw[layer][keep]
            if view == "unit_rms":
                x = x / np.sqrt((x**2).mean(-1, keepdims=True))
            yield normed(model, x) if view == "final_norm" else x

    def with_excluded(self, layer, view, has_bos):
        """What plain scripts compute: naive ratios and L2 with sinks, and BOS, counted in."""
        chosen = [x[layer] for x in (self.every if has_bos else self.raw)]
        if view == "final_norm":
            chosen = [normed(m, x) for m, x in zip(self.models, chosen, strict=True)]
        base, tuned = (plain_ratio(x) for x in chosen)
        l2 = np.linalg.norm(chosen[1] - chosen[0], axis=1).mean()
        return {"base": base, "tuned": tuned, "delta": tuned - base, "l2": l2}

    def drift(self, layer, view):
        a, b = self.view(layer, view)
        gap, size = np.linalg.norm(b - a, axis=1), np.linalg.norm(a, axis=1)
        cosine = (a * b).sum(1) / size / np.linalg.norm(b, axis=1)
        per_token = {"cosine": cosine, "l2": gap, "relative_l2": gap / size}
        sequence = self.sequence[~self.sinks[layer]]
        return {name: interval(values, sequence) for name, values in per_token.items()}

    def ratios(self, layer, view):
        found = {}
        for name, x in zip(("base", "tuned"), self.view(layer, view), strict=True):
            # The package itself loses digits far from zero, so it gets centred data.
            estimates = participation_ratio(x - x.mean(0), return_all=True)
            found |= {f"{name}_row": estimates["row"], f"{name}_naive": estimates["naive"]}
            found[name] = self.between_texts(x - x.mean(0), self.sequence[~self.sinks[layer]])
        for suffix in ("", "_row", "_naive"):
            found[f"delta{suffix}"] = found[f"tuned{suffix}"] - found[f"base{suffix}"]
        return found

    @staticmethod
    def between_texts(x, sequence):
        """Σ |x|²|y|² / Σ (x·y)² over pairs of tokens of different texts."""
        other = sequence[:, None] != sequence
        length = (x**2).sum(1)
        return (np.outer(length, length) * other).sum() / ((x @ x.T) ** 2 * other).sum()

    def lens(self, layer):
        za, zb = (logits(m, raw[layer]) for m, raw in zip(self.models, self.raw, strict=True))
        p, q = scipy.special.softmax(za, axis=1), scipy.special.softmax(zb, axis=1)
        final = logits(self.models[1], self.raw[1][-1]).argmax(1)
        ranks = scipy.stats.rankdata(-za, axis=1, method="min")[np.arange(len(final)), final]
        return (
            za,
            zb,
            ranks,
            {
                "top1_agreement": (za.argmax(1) == zb.argmax(1)).astype(float),
                "kl": scipy.stats.entropy(q, p, axis=1),
                "base_entropy": scipy.stats.entropy(p, axis=1),
                "tuned_entropy": scipy.stats.entropy(q, axis=1),
            },
        )


@pytest.fixture(scope="module")
def real(stories, fairy_tales):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    passages = [t for t in read_texts(fairy_tales / "grimms.txt") if len(t) > 300][:8]
    base = AutoModelForCausalLM.from_pretrained(stories).eval()
    tuned = hyperfitted(stories, passages, tokenizer)
    texts = [t for t in read_texts(fairy_tales / "andersen.txt") if len(t) > 30][:N_TEXTS]
    comparison = compare_models(
        (base, tokenizer), (tuned, tokenizer), texts, max_length=LENGTH, progress=False
    )
    ids = [tokenizer(t)["input_ids"][:LENGTH] for t in texts]
    return comparison, Oracle(base, tuned, ids)


def close(row, value, tolerance=1e-5, floor=0.0):
    assert row.value == pytest.approx(value, rel=tolerance, abs=floor), row


def test_drift(real):
    comparison, oracle = real
    rows = [r for r in comparison.long if r.probe == "drift" and "_with_" not in r.metric]
    assert len(rows) == 6 * 3 * 3
    drift = cache(oracle.drift)
    for row in rows:
        value, low, high = drift(row.layer, row.view)[row.metric]
        close(row, value)
        assert (row.low, row.high) == pytest.approx(
            (low, min(high, 1.0) if row.metric == "cosine" else high), rel=1e-5
        )


def test_participation_ratio(real):
    comparison, oracle = real
    rows = [
        r for r in comparison.long if r.probe == "participation_ratio" and "_with_" not in r.metric
    ]
    assert len(rows) == 6 * 3 * 9
    ratios = cache(oracle.ratios)
    for row in rows:
        expected = ratios(row.layer, row.view)
        if row.metric in ("base", "tuned", "delta"):
            # By hand the mean is the sample's own; that biases by about 1 / tokens.
            close(row, expected[row.metric], 2e-3, 2e-3 * expected["base"])
        elif row.metric.startswith("delta"):
            # A difference of two ratios carries their absolute error.
            floor = 1e-6 * expected[row.metric.replace("delta", "base")]
            close(row, expected[row.metric], 1e-5, floor)
        else:
            close(row, expected[row.metric], 1e-6)


def test_what_scripts_read_over_every_token(real):
    comparison, oracle = real
    rows = [r for r in comparison.long if "_with_" in r.metric]
    # Raw at six layers and after the norm at the last: three ratios and L2, over two sets.
    assert len(rows) == 7 * 4 * 2
    assert {r.view for r in rows if r.layer < 5} == {"raw"}
    reads = cache(oracle.with_excluded)
    for row in rows:
        numbers = reads(row.layer, row.view, row.metric.endswith("_with_sinks_and_bos"))
        close(row, numbers[row.metric.split("_")[0]], 1e-5, 1e-6 * numbers["base"])
        assert row.n == (oracle.every if row.metric.endswith("bos") else oracle.raw)[0].shape[1]


def test_logit_lens(real):
    comparison, oracle = real
    for layer in range(6):
        _, _, ranks, per_token = oracle.lens(layer)
        for metric, values in per_token.items():
            (row,) = [r for r in comparison.select("logit_lens", metric) if r.layer == layer]
            value, low, high = interval(values, oracle.sequence)
            close(row, value)
            if metric != "top1_agreement":
                assert (row.low, row.high) == pytest.approx((max(low, 0), high), rel=1e-4)
        (row,) = [
            r for r in comparison.select("logit_lens", "median_base_rank") if r.layer == layer
        ]
        close(row, np.median(ranks))
        assert row.low <= row.value <= row.high


def test_rank_reordering(real):
    comparison, oracle = real
    za, zb, ranks, per_token = oracle.lens(5)
    rho = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(za, zb, strict=True)]
    expected = {
        "top1_agreement": per_token["top1_agreement"].mean(),
        "spearman": np.mean(rho),
        "rank_1": (ranks == 1).mean(),
        "rank_2_10": ((ranks >= 2) & (ranks <= 10)).mean(),
        "rank_gt_10": (ranks > 10).mean(),
        "rank_ge_200": (ranks >= 200).mean(),
    }
    rows = [r for r in comparison.long if r.probe == "rank_reordering"]
    assert {r.metric for r in rows} == set(expected)
    for row in rows:
        close(row, expected[row.metric])
    histogram = comparison.extras["rank_reordering"]["rank_histogram"]
    for one in histogram:
        assert one["count"] == ((ranks >= one["low"]) & (ranks <= one["high"])).sum()


def test_the_last_layer_after_the_norm_is_hugging_faces(real, stories):
    comparison, oracle = real
    model = oracle.models[0]
    x = torch.from_numpy(oracle.raw[0][-1]).float()
    with torch.no_grad():
        theirs = model.model.norm(x).double().numpy()
    np.testing.assert_allclose(normed(model, oracle.raw[0][-1]), theirs, rtol=1e-4, atol=1e-5)
    assert comparison.n_layers == 5
