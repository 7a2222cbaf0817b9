"""Where do two models part? The first token they disagree on, and which blocks decide it.

Both models continue the same prompts greedily; up to the first token that differs they have read
the same history, so that there the two can be taken apart and put together crosswise: the residual
stream of one enters the late blocks of the other. What the four combinations say of the two tokens
tells how much of the disagreement comes from the late blocks and how much from what enters them
(a 2 x 2 factorial of the kind that studies of instruction tuning use at the first divergence).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_counts, check_seed, check_types
from ..data.corpus import pad
from ..decoding.generate import GenerationRunner
from ..decoding.prompts import open_prompts, prompt_lengths
from ..hooks import surface
from ..hooks.loading import LoadedModel
from ..hooks.partial_forward import check_resumes, read, resume
from ..models.tokenizers import token_names, token_texts
from ..pair import Pair
from ..passes.failures import explaining_out_of_memory
from ..render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Heading,
    Reference,
    Role,
    Table,
    Text,
    Verdict,
)
from ..render.format import (
    MISSING,
    PERCENT,
    SIGNED,
    Form,
    count,
    ends,
    interval,
    one_line,
    p_value,
    percent,
)
from ..results.result import Result
from ..statistics import significance
from ..statistics.shares import ratio
from .provenance import KINDS, kind_of

EXAMPLES = (
    "hyperlens first-divergence ./base ./tuned --texts held_out.txt --out divergence",
    "hyperlens first-divergence ./base ./tuned --texts held_out.txt --n-prompts 100",
)

# A share of a change leaves 0 to 1 where its parts oppose each other.
SHARE = Form(percent)
WORDS_BEFORE = 12
# With fewer prompts on which the models part, no verdict names a place.
FEWEST = 5
# Examples shown at once; the others are folded away.
SHOWN, SHOWN_LENGTH = 6, 40


@check_types
def find_first_divergence(
    base: Any,
    tuned: Any = None,
    texts: Any = None,
    *,
    n_prompts: int = 32,
    prompt_tokens: int = 17,
    max_new_tokens: int = 96,
    n_examples: int = 12,
    batch_size: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
) -> FirstDivergenceResult:
    """Let both models write from the same prompts, and take apart the first token they disagree on.

    Of the two tokens that the models want there, the margin is the logit of the tuned model's less
    that of the base's: below 0 in the base, above 0 in the tuned model. For every layer at which
    the models can be cut, the residual stream that each has there enters the late blocks (with
    final norm and unembedding) of either. Of the whole change of the margin, the late blocks' part
    is the mean of what changing them does with either residual; the rest is the incoming
    residual's. What both do together beyond their sum is the interaction.

    Args:
        base, tuned: what `compare_models` takes, but no hooked models; or an open `Pair` and the
            texts.
        texts: what `compare_models` takes; their first tokens are the prompts, of conversations
            all before the assistant's last turn.
        n_prompts: how many texts, drawn at random, both models continue.
        prompt_tokens: how many of their first tokens are the prompt, BOS included.
        max_new_tokens: how many are added to it at most; an end-of-text token is a token like any
            other.
        n_examples: disagreements kept with their context.
        batch_size: texts per forward pass; does not change the result.
        seed: of the choice of prompts and of the label swaps.
        device, dtype: as in `compare_models`.
        progress: show progress bars.

    Returns:
        A `FirstDivergenceResult`.

    Raises:
        PatchError: if blocks pass on more than the residual stream.
        HyperlensError: if a source cannot be opened, the texts do not fit the models, or there
            is no room for the continuations.
    """
    check_counts(batch_size=batch_size)
    check_counts(0, n_examples=n_examples)
    check_seed(seed)
    inputs, prompts = open_prompts(
        base,
        tuned,
        texts,
        n_prompts=n_prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    pair = inputs.pair
    runner = GenerationRunner(prompts, max_new_tokens, batch_size, seed, progress)
    written = [runner.run(loaded).tokens for loaded in (pair.base, pair.tuned)]
    parted = list(_partings(prompts, *written))
    with explaining_out_of_memory(batch_size):
        margins = _margins(pair, parted, batch_size, progress)
    # Text is written token by token with cached keys, and read whole here: near ties may turn.
    clear = [bool(m[0, 0, 0] < 0 < m[0, 1, 1]) for m in margins]
    kept = [one for one, is_clear in zip(parted, clear, strict=True) if is_clear]
    taken = [m for m, is_clear in zip(margins, clear, strict=True) if is_clear]
    meta = inputs.metadata(
        seed=seed,
        options={
            "n_prompts": len(prompts),
            "prompt_tokens": prompt_lengths(inputs.corpus, prompts, prompt_tokens),
            "max_new_tokens": max_new_tokens,
        },
    )
    extras = {
        "n_prompts": len(prompts),
        "n_parted": len(parted),
        "n_near_ties": len(parted) - len(kept),
        "steps": [one.step for one in parted],
        "kinds": _kinds(pair, kept),
        "examples": list(_examples(pair, kept, taken, n_examples, seed)),
    }
    return FirstDivergenceResult(tuple(_rows(taken, seed)), extras, meta)


class Parting(NamedTuple):
    """The first disagreement after one prompt.

    Attributes:
        history: what both models have read.
        step: how many tokens they wrote alike.
        base_token, tuned_token: what each writes next.
    """

    history: list[int]
    step: int
    base_token: int
    tuned_token: int


def _partings(
    prompts: Sequence[Sequence[int]],
    base: Sequence[Sequence[int]],
    tuned: Sequence[Sequence[int]],
) -> Iterator[Parting]:
    for prompt, ours, theirs in zip(prompts, base, tuned, strict=True):
        pairs = enumerate(zip(ours, theirs, strict=True))
        step = next((i for i, (a, b) in pairs if a != b), None)
        if step is not None:
            yield Parting([*prompt, *ours[:step]], step, ours[step], theirs[step])


def _margins(
    pair: Pair, partings: Sequence[Parting], batch_size: int, progress: bool
) -> list[Float[Tensor, "layer entering late"]]:
    """Of each parting, the margin for every cut and combination of the two models."""
    found: list[Tensor] = []
    batch_size = 1 if pair.unpadded else batch_size  # histories are of many lengths
    order = sorted(range(len(partings)), key=lambda i: -len(partings[i].history))
    bar = tqdm(total=len(order), desc="crossing", unit="text", disable=not progress)
    with bar:
        for start in range(0, len(order), batch_size):
            some = [partings[i] for i in order[start : start + batch_size]]
            found += _margins_of_batch(pair, some, is_first=start == 0)
            bar.update(len(some))
    places = {i: place for place, i in enumerate(order)}
    return [found[places[i]] for i in range(len(order))]


def _margins_of_batch(
    pair: Pair, partings: Sequence[Parting], is_first: bool
) -> Iterator[Float[Tensor, "layer entering late"]]:
    tokens, mask = (
        x.to(surface.input_device(pair.base.hooked)) for x in pad([p.history for p in partings])
    )
    models = [pair.base, pair.tuned]
    streams = [read(loaded.hooked, tokens, mask, [])[0] for loaded in models]
    if is_first:
        for loaded, stream in zip(models, streams, strict=True):
            check_resumes(loaded.hooked, tokens, mask, stream)
    layers = range(len(streams[0]))
    found = torch.empty(len(partings), len(layers), 2, 2, dtype=torch.float64)
    for late, loaded in enumerate(models):
        for entering, stream in enumerate(streams):
            for layer in layers if entering != late else layers[-1:]:
                ended = resume(loaded.hooked, tokens, mask, layer, stream[layer])
                found[:, layer, entering, late] = _margin(loaded, ended, mask, partings)
        # A model that reads its own residual is the model itself, wherever it is cut.
        found[:, :, late, late] = found[:, -1:, late, late]
    return iter(found)


def _margin(
    loaded: LoadedModel,
    ended: Float[Tensor, "batch pos d_model"],
    mask: Int[Tensor, "batch pos"],
    partings: Sequence[Parting],
) -> Float[Tensor, " batch"]:
    """Logit of the tuned model's token less that of the base's, after the whole history."""
    rows = torch.arange(len(partings), device=ended.device)
    with surface.evaluating(loaded.hooked):
        normed = surface.final_norm(loaded.hooked, ended[rows, mask.sum(-1) - 1])
        logits = surface.float_logits(loaded.hooked, normed).double()
    ours, theirs = (
        torch.tensor([getattr(p, name) for p in partings], device=logits.device)
        for name in ("base_token", "tuned_token")
    )
    return (logits[rows, theirs] - logits[rows, ours]).cpu()


class Parts(NamedTuple):
    """What the change of a margin is made of, for one cut; `late` and `incoming` sum to it."""

    late: float
    incoming: float
    interaction: float
    late_flips: float
    incoming_flips: float


def parts_of(margin: Float[Tensor, "entering late"]) -> Parts:
    """The factorial of one disagreement: main effects and interaction of a 2 x 2.

    >>> parts_of(torch.tensor([[-1.0, 2.0], [0.0, 4.0]]))
    Parts(late=3.5, incoming=1.5, interaction=1.0, late_flips=1.0, incoming_flips=0.0)
    """
    neither, late_only, incoming_only, both = (float(x) for x in margin.flatten())
    return Parts(
        late=(late_only - neither + both - incoming_only) / 2,
        incoming=(incoming_only - neither + both - late_only) / 2,
        interaction=both - incoming_only - late_only + neither,
        late_flips=float(late_only > 0),
        incoming_flips=float(incoming_only > 0),
    )


def _rows(margins: Sequence[Tensor], seed: int) -> list[dict[str, Any]]:
    """For every cut the parts, means over prompts; p of a late part unlike the incoming one."""
    rows: list[dict[str, Any]] = []
    n_cuts = len(margins[0]) if margins else 0
    for layer in range(n_cuts):
        parts = [parts_of(margin[layer]) for margin in margins]
        columns = {name: [getattr(one, name) for one in parts] for name in Parts._fields}
        for name in ("late", "incoming", "interaction"):
            found = significance.estimate(columns[name])
            rows.append({"layer": layer, "metric": name, **found._asdict(), "p": math.nan})
        gaps = [one.late - one.incoming for one in parts]
        shares = {
            "late_share": (columns["late"], [one.late + one.incoming for one in parts], None),
            "late_flips": (columns["late_flips"], [1.0] * len(parts), (0.0, 1.0)),
            "incoming_flips": (columns["incoming_flips"], [1.0] * len(parts), (0.0, 1.0)),
        }
        for name, (y, n, within) in shares.items():
            found = ratio(torch.tensor(y), torch.tensor(n), within=within)
            p = significance.sign_flip_p(gaps, seed) if name == "late_share" else math.nan
            rows.append({"layer": layer, "metric": name, **found._asdict(), "p": p})
    return significance.holm_rows(rows)


def _kinds(pair: Pair, partings: Sequence[Parting]) -> list[dict[str, Any]]:
    """How many disagreements are between each two kinds of tokens."""
    if pair.tokenizer is None:
        return []
    counts: dict[tuple[str, str], int] = {}
    for one in partings:
        before, *texts = token_texts(
            pair.tokenizer, [one.history[-1], one.base_token, one.tuned_token]
        )
        kinds = (kind_of(texts[0], before), kind_of(texts[1], before))
        counts[kinds] = counts.get(kinds, 0) + 1
    order = sorted(counts, key=lambda kinds: (-counts[kinds], kinds))
    return [{"base": a, "tuned": b, "count": counts[a, b]} for a, b in order]


def _examples(
    pair: Pair, partings: Sequence[Parting], margins: Sequence[Tensor], n: int, seed: int
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    for i in sorted(torch.randperm(len(partings), generator=generator)[:n].tolist()):
        one, margin = partings[i], margins[i]
        names = token_names(
            pair.tokenizer, [*one.history[-WORDS_BEFORE:], one.base_token, one.tuned_token]
        )
        yield {
            "context": ("" if pair.tokenizer is not None else " ").join(names[:-2]),
            "step": one.step,
            "base_token": names[-2],
            "tuned_token": names[-1],
            "base_margin": float(margin[0, 0, 0]),
            "tuned_margin": float(margin[0, 1, 1]),
        }


class FirstDivergenceResult(Result):
    """Where two models part, and what of it comes from the late blocks.

    The table has a row per layer at which the models are cut (0: the output of the embedding
    enters; L: all blocks are before the cut) and metric: `late` and `incoming`, the two parts of
    the margin's change, and their `interaction`, in logits; `late_share`, of the whole change,
    whose p is that of a late part unlike the incoming one, labels swapped at random,
    Holm-corrected over layers; `late_flips` and `incoming_flips`, shares of disagreements that
    the tuned model's late blocks, or its residual, decide alone. Values are over prompts on which
    the models part.

    Extras: `n_prompts`, `n_parted`, and `n_near_ties`, left out because the disagreement is within
    rounding; `steps`, tokens written alike before each; `kinds` of the two tokens, with counts;
    `examples`.
    """

    name: ClassVar[str] = "first_divergence"
    title: ClassVar[str] = "Where do the two models part?"
    columns: ClassVar[tuple[str, ...]] = (
        *("layer", "metric", "value", "low", "high", "se", "n", "p"),
    )

    @property
    def n_layers(self) -> int:
        """Blocks of the models."""
        return int(self.meta["n_layers"])

    def fewest_late_blocks(self) -> int | None:
        """How few last blocks make more of the change than what enters them, by p; None if none."""
        rows = self.select(metric="late_share")
        found = [row["layer"] for row in rows if row["value"] > 0.5 and row["p"] < 0.05]
        return self.n_layers - max(found) if found else None

    def verdicts(self) -> list[Verdict]:
        """How soon the models part, where that is decided, and between which tokens."""
        parted, of = self.extras["n_parted"], self.extras["n_prompts"]
        if not parted:
            return [Verdict("where", f"The two models write the same after all {of} prompts.")]
        steps = self.extras["steps"]
        at_once, last = steps.count(0), max(steps)
        said = f"The models part on {parted} of {count(of, 'prompt')}, on {at_once} at once"
        said += f", at the latest after {count(last, 'token')} written alike." if last else "."
        return [Verdict("where", said), *self._depth(), *self._words()]

    def _depth(self) -> Iterator[Verdict]:
        n = self.extras["n_parted"] - self.extras["n_near_ties"]
        k = self.fewest_late_blocks() if n >= FEWEST else None
        if k is None:
            yield Verdict(
                "which blocks",
                f"Which blocks decide cannot be told from {count(n, 'disagreement')}: at no cut "
                "do the later blocks make surely more of the change than what enters them.",
            )
            return
        row = self.at(layer=self.n_layers - k, metric="late_share")
        blocks = f"The last {f'{k} blocks' if k > 1 else 'block'}, the" if k else "The"
        yield Verdict(
            "which blocks",
            f"{blocks} final norm and the unembedding make more than half of what divides the "
            f"models: {interval(row, SHARE)} of the margin's change ({p_value(row['p'])}). Of any "
            "fewer that is not sure.",
        )

    def _words(self) -> Iterator[Verdict]:
        kinds = self.extras["kinds"]
        if kinds:
            first, total = kinds[0], sum(one["count"] for one in kinds)
            yield Verdict(
                "which tokens",
                f"The most frequent of the {count(total, 'disagreement')}: the base writes "
                f"{_one(first['base'])} and the tuned model {_one(first['tuned'])} "
                f"({first['count']}). Token kinds come from an English word list.",
            )

    def evidence(self) -> list[Block]:
        """The parts at every cut, kinds of tokens, and disagreements in their context."""
        told = Text(
            "Both models continue the same prompts greedily up to the first token that differs. "
            "Margin: logit of the tuned model's token less that of the base's. At a cut, the "
            "residual stream of one model enters the later blocks, final norm and unembedding of "
            "the other."
        )
        near = self.extras["n_near_ties"]
        note = f"{count(near, 'disagreement')} within rounding left out."
        blocks: list[Block] = [told, *([Text(note, "note")] if near else [])]
        if not self.table:
            return blocks
        return [*blocks, self._chart(), self._by_cut(), *self._kinds_table(), *self._in_context()]

    def _chart(self) -> Chart:
        words = {"late_share": "late blocks' share of the change", "late_flips": "decided by late "
                 "blocks alone", "incoming_flips": "decided by the residual alone"}  # fmt: skip
        rows = [
            {"series": words[metric], "layer": row["layer"], **ends(row)}
            for metric in words
            for row in self.select(metric=metric)
        ]
        title = "What decides the first disagreement, by the layer at which the models are cut"
        roles: dict[str, Role] = dict(zip(words.values(), ("tuned", "other", "base"), strict=True))
        axes = Axis("layer", "cut at layer"), Axis("value", "share")
        half = Reference("half", 0.5, 0.5, 0.5, "control")
        return Chart("lines", title, f"{title}; 95% intervals", rows, *axes, roles, [half])

    def _by_cut(self) -> Details:
        forms = {
            "late": SIGNED,
            "incoming": SIGNED,
            "interaction": SIGNED,
            "late_share": SHARE,
            "late_flips": PERCENT,
            "incoming_flips": PERCENT,
        }
        rows = [
            [
                str(layer),
                *(interval(self.at(layer=layer, metric=m), form) for m, form in forms.items()),
                p_value(self.at(layer=layer, metric="late_share")["p"]) or MISSING,
            ]
            for layer in range(self.n_layers + 1)
        ]
        head = ["cut at layer", "late blocks", "incoming residual", "interaction", "late share",
                "late blocks alone", "residual alone", "p"]  # fmt: skip
        caption = "the first three in logits; p: late part unlike the incoming one, Holm"
        return Details("every cut", [Table(head, rows, caption)])

    def _kinds_table(self) -> Iterator[Block]:
        kinds = self.extras["kinds"]
        if kinds:
            seen = [kind for kind in KINDS if any(kind in (k["base"], k["tuned"]) for k in kinds)]
            counts = {(k["base"], k["tuned"]): k["count"] for k in kinds}
            rows = [[a, *(str(counts.get((a, b), 0)) for b in seen)] for a in seen]
            head = ["the base writes a ...", *seen]
            yield Table(head, rows, "across: what the tuned model writes there")

    def _in_context(self) -> Iterator[Block]:
        examples: Sequence[Mapping[str, Any]] = self.extras["examples"]
        if examples:
            yield Heading("Which tokens are these?")
            yield _example_table(examples[:SHOWN], SHOWN_LENGTH)
        if len(examples) > SHOWN:
            yield Details(f"all {count(len(examples), 'example')}", [_example_table(examples)])


def _one(kind: str) -> str:
    others = {"other": "a token of another kind", "punctuation": "punctuation"}
    return others.get(kind, f"a {kind}")


def _example_table(examples: Sequence[Mapping[str, Any]], length: int = 0) -> Table:
    """Contexts are cut at their beginning to `length` characters; 0 cuts none."""
    rows = [
        [
            f"…{one_line(one['context'])[-length:]}",
            *(repr(str(one[key]).strip()) for key in ("base_token", "tuned_token")),
            *(SIGNED(one[key]) for key in ("base_margin", "tuned_margin")),
        ]
        for one in examples
    ]
    head = ["context", "base writes", "tuned writes", "margin in base", "margin in tuned"]
    return Table(head, rows)
