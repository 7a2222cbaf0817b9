"""The script people write by hand to compare two models: the yardstick of compare_speed.py.

Straightforward and correct, written the way notebooks have it: ask for all hidden states, keep
them, then loop over layers with numpy. It computes what `compare_models` reports, in the same
three views, but no intervals and no finite-sample correction. One liberty is taken with it: the
last hidden state, which Hugging Face returns after the final norm, is used as it comes.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import spearmanr


def hidden_states(model, tokens, batch_size=8):
    """All hidden states of all texts: [layers, n_tokens, d_model] as numpy."""
    kept = []
    with torch.no_grad():
        for start in range(0, len(tokens), batch_size):
            output = model(tokens[start : start + batch_size], output_hidden_states=True)
            kept.append(torch.stack(output.hidden_states).flatten(1, 2).numpy())
    return np.concatenate(kept, axis=1)


def participation_ratio(x):
    """From the eigenvalues of the covariance."""
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T))
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def lens(model, x, is_last):
    """Log-probabilities of the logit lens; hidden_states[-1] is already normed."""
    with torch.no_grad():
        h = torch.from_numpy(x)
        h = h if is_last else model.model.norm(h)
        return torch.log_softmax(model.lm_head(h), dim=-1).numpy()


def ranks_by_numpy(log_probabilities):
    """Rank of every token of every row, 0 for the most probable."""
    return np.argsort(np.argsort(-log_probabilities, axis=1), axis=1)


def ranks_by_torch(log_probabilities):
    """The same on the tensors the model returned, as most scripts do."""
    ordered = torch.from_numpy(log_probabilities).argsort(dim=1, descending=True)
    return ordered.argsort(dim=1).numpy()


def views(model, x, is_last):
    """Raw, scaled to unit RMS, and after the final norm."""
    with torch.no_grad():
        normed = x if is_last else model.model.norm(torch.from_numpy(x)).numpy()
    return {
        "raw": x,
        "unit_rms": x / np.sqrt((x**2).mean(1, keepdims=True)),
        "final_norm": normed,
    }


def geometry(a, b):
    """Distances and change of dimension of two sets of vectors."""
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    distance = np.linalg.norm(b - a, axis=1)
    return {
        "cosine": ((a * b).sum(1) / (norms[0] * norms[1])).mean(),
        "l2": distance.mean(),
        "relative_l2": (distance / norms[0]).mean(),
        "delta": participation_ratio(b) - participation_ratio(a),
    }


def compare(base, tuned, tokens, ranks_of=ranks_by_torch):
    """Every statistic per layer, as a list of dicts, and the mean rank correlation."""
    hidden = [hidden_states(model, tokens) for model in (base, tuned)]
    n_layers = hidden[0].shape[0]
    final = lens(tuned, hidden[1][-1], True).argmax(-1)
    rows = []
    for layer in range(n_layers):
        a, b = hidden[0][layer], hidden[1][layer]
        is_last = layer == n_layers - 1
        pairs = views(base, a, is_last), views(tuned, b, is_last)
        log_a, log_b = lens(base, a, is_last), lens(tuned, b, is_last)
        ranks = ranks_of(log_a)[np.arange(len(final)), final] + 1
        rows.append(
            {view: geometry(pairs[0][view], pairs[1][view]) for view in pairs[0]}
            | {
                "kl": (np.exp(log_b) * (log_b - log_a)).sum(1).mean(),
                "base_entropy": -(np.exp(log_a) * log_a).sum(1).mean(),
                "tuned_entropy": -(np.exp(log_b) * log_b).sum(1).mean(),
                "top1_agreement": (log_a.argmax(1) == log_b.argmax(1)).mean(),
                "median_base_rank": np.median(ranks),
            }
        )
    rows[-1] |= {"rank_1": (ranks == 1).mean(), "rank_gt_10": (ranks > 10).mean()}
    correlations = [spearmanr(x, y).statistic for x, y in zip(log_a, log_b, strict=True)]
    return rows, float(np.mean(correlations))
