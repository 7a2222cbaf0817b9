"""What a probe is given: both models' residual streams over one batch, and which tokens count.

Layers follow the paper (arXiv 2605.22579, section 4): layer 0 is the embedding output, layer l the
output of block l - 1, layer L the output of the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..checks import is_list
from ..errors import ProbeError
from ..statistics import distances

View = Literal["raw", "unit_rms", "final_norm"]
VIEWS: tuple[View, ...] = get_args(View)

TokenSet = Literal["geometry", "decisions", "all"]
"""Which tokens a statistic is taken over; pads are never among them.

`geometry`: without BOS and, layer by layer, without attention sinks, whose huge norms would
dominate every distance and every covariance. `decisions`: without BOS only, because each
next-token decision counts once however large its vector. `all`: every real token. Where roles or
tokens were chosen (`Reading`), each set has those of them only.
"""
TOKEN_SETS: tuple[TokenSet, ...] = get_args(TokenSet)
# Each has the tokens of the one before it: attention sinks come in, then BOS.
WIDER_SETS: tuple[TokenSet, ...] = TOKEN_SETS[1:]


def checked_views(views: Any) -> tuple[View, ...]:
    """Check names of views.

    Raises:
        ProbeError: if there are none, or others than `VIEWS`.
    """
    given = list(views) if is_list(views) else []
    if not given or not all(view in VIEWS for view in given):
        raise ProbeError(f"views must be some of {VIEWS}, got {views!r}")
    return tuple(given)


def checked_token_set(token_set: Any) -> TokenSet:
    """Check the name of a token set.

    Raises:
        ProbeError: if it is none of `TOKEN_SETS`.
    """
    if token_set not in TOKEN_SETS:
        raise ProbeError(f"token_set must be one of {TOKEN_SETS}, got {token_set!r}")
    return cast(TokenSet, token_set)


def checked_layers(layers: Any) -> tuple[int, ...] | None:
    """Check that layers are whole numbers; whether a model has them, `StreamSpec` checks.

    Raises:
        ProbeError: if they are neither None nor one or more whole numbers.
    """
    if layers is None:
        return None
    given = list(layers) if is_list(layers) else []
    if not given or not all(isinstance(layer, Integral) for layer in given):
        raise ProbeError(f"layers must be whole numbers, as in (0, -1), or None; got {layers!r}")
    return tuple(int(layer) for layer in given)


# Logits of this many bytes exist at a time, per model, so that they stay in the processor's cache.
# With fewer rows than this the unembedding, which is read again for every chunk, multiplies slower:
# for wide vocabularies chunks are larger than the cache.
LOGIT_CHUNK_BYTES = 16 * 2**20
LOGIT_CHUNK_ROWS = 256
LARGEST_LOGIT_CHUNK_BYTES = 64 * 2**20
# An accelerator needs many rows at once to be used fully.
ACCELERATOR_CHUNK_BYTES = 128 * 2**20


def logit_chunk_rows(d_vocab: int, device: torch.device) -> int:
    """How many rows of logits exist at a time on a device."""
    row = 4 * d_vocab
    if device.type != "cpu":
        return max(16, ACCELERATOR_CHUNK_BYTES // row)
    wide = min(LOGIT_CHUNK_ROWS, LARGEST_LOGIT_CHUNK_BYTES // row)
    return max(16, LOGIT_CHUNK_BYTES // row, wide)


def logit_chunk_bytes(d_vocab: int, device: torch.device) -> int:
    """Size of the largest chunk of logits on a device."""
    return 4 * d_vocab * logit_chunk_rows(d_vocab, device)


def logit_rows(n: int, d_vocab: int, device: torch.device) -> Iterator[slice]:
    """Slices of n tokens, each of as many rows of logits as exist at a time."""
    return slices(n, logit_chunk_rows(d_vocab, device))


def slices(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover 0 to n.

    >>> list(slices(5, 3))
    [slice(0, 3, None), slice(3, 5, None)]
    """
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def logits_in_pieces(
    pieces: Iterable[slice], *models: tuple[Callable[[Tensor], Tensor], Float[Tensor, "n d_model"]]
) -> Iterator[tuple[Any, ...]]:
    """Logits a few rows at a time: the whole of them would not fit in memory.

    Args:
        pieces: which rows exist at the same time.
        models: for each, the function from its vectors to float32 logits, and its vectors.

    Yields the rows, and each model's logits [rows, d_vocab].
    """
    for rows in pieces:
        yield rows, *(to_logits(vectors[rows]) for to_logits, vectors in models)


@dataclass(frozen=True)
class StreamSpec:
    """The sizes a probe allocates its sums from.

    Attributes:
        n_layers: number of blocks L; residual layers run 0..L.
        d_model: width of the residual stream.
        d_vocab: number of logits.
        device: where sums live.
        n_sampled_sequences: how many sequences, or groups of them, keep a sample of their tokens
            (see `TokenSample`).
        n_sampled_tokens: how many tokens of each of those.
        grouped: whether groups of sequences, not sequences, are independent. All are sampled then.
    """

    n_layers: int
    d_model: int
    d_vocab: int
    device: torch.device
    n_sampled_sequences: int = 0
    n_sampled_tokens: int = 0
    grouped: bool = False

    @property
    def layers(self) -> range:
        """All residual layers, 0..L."""
        return range(self.n_layers + 1)

    def resolve_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Layers as non-negative indices; None means all, -1 means L.

        Raises:
            ProbeError: if a layer does not exist.
        """
        if layers is None:
            return tuple(self.layers)
        count = self.n_layers + 1
        missing = [layer for layer in layers if not -count <= layer < count]
        if missing:
            raise ProbeError(
                f"layers {missing} do not exist: this model has layers 0 (embedding) to "
                f"{self.n_layers}; choose among those"
            )
        return tuple(sorted({layer % count for layer in layers}))


@dataclass(frozen=True)
class ModelStream:
    """One model's residual stream over one batch.

    Attributes:
        residuals: L + 1 tensors [batch, pos, d_model], in the model's own dtype.
        final_norm: the model's own final norm, on [n, d_model].
        unembed: final-normed vectors [n, d_model] to logits [n, d_vocab], soft cap included, as
            float32 on the device where statistics are computed.
        d_vocab: number of logits.
    """

    residuals: Sequence[Float[Tensor, "batch pos d_model"]]
    final_norm: Callable[[Tensor], Tensor]
    unembed: Callable[[Tensor], Tensor]
    d_vocab: int

    def vectors(
        self, layer: int, view: View, tokens: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """The chosen tokens' vectors at one layer in one view, as float32."""
        (view,) = checked_views([view])
        if view == "final_norm":
            return self.normed(layer, tokens).float()
        x = self._rows(layer, tokens).float()
        return distances.unit_rms(x) if view == "unit_rms" else x

    def normed(self, layer: int, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """What `unembed` takes: the chosen tokens after the final norm, in the model's dtype."""
        normed: Tensor = self.final_norm(self._rows(layer, tokens))
        return normed

    def _rows(self, layer: int, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        # On the CPU several times faster than square brackets.
        return self.residuals[layer].flatten(0, 1).index_select(0, tokens)


@dataclass(frozen=True)
class TokenSample:
    """A fixed set of tokens, chosen from the corpus alone, that PR intervals are computed from.

    Attributes:
        slot: which row of the sample each sequence's tokens go to, -1 for none; sequences of one
            group share a row.
        position: the position that goes to each place of that row, -1 for none of this sequence.
    """

    slot: Int[Tensor, " batch"]
    position: Int[Tensor, "batch sampled"]


@dataclass(frozen=True)
class SharedPrefix:
    """What is the same, bit for bit, in both models of a pair.

    Attributes:
        layers: so many residual layers, from the embedding on; 0 for none.
        resumes: whether the tuned model can be run from the last of them on.
        norm, head: whether the final norm, and the unembedding, are the same.
    """

    layers: int = 0
    resumes: bool = False
    norm: bool = False
    head: bool = False

    @property
    def blocks(self) -> int:
        """How many blocks the tuned model need not run."""
        return max(0, self.layers - 1) if self.resumes else 0


NOTHING_SHARED = SharedPrefix()


@dataclass(frozen=True)
class StreamPair:
    """Both models' streams over one batch of the same tokens.

    Attributes:
        base, tuned: the two streams.
        tokens: token ids.
        real: True where a position is not padding.
        bos: True where a position is excluded as BOS.
        sinks: True where a position is an attention sink at a layer, in either model.
        sample: the tokens kept for intervals.
        device: where statistics are computed (the CPU when the accelerator has no float64).
        shared: what both models have in common: computed once, whatever a probe asks for.
        chosen: False where a position is in no token set, because of its role or by a mask; None
            where all are.
        roles: who speaks each token, as places in `hyperlens.data.reading.ROLES`; None where there
            are no conversations.
        lens: of the `decisions` tokens those at which a sampled logit lens is read; None for all.
    """

    base: ModelStream
    tuned: ModelStream
    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    bos: Bool[Tensor, "batch pos"]
    sinks: Bool[Tensor, "layer batch pos"]
    sample: TokenSample
    device: torch.device
    shared: SharedPrefix = NOTHING_SHARED
    chosen: Bool[Tensor, "batch pos"] | None = None
    roles: Int[Tensor, "batch pos"] | None = None
    lens: Bool[Tensor, "batch pos"] | None = None

    @property
    def n_layers(self) -> int:
        """Number of blocks L."""
        return len(self.base.residuals) - 1

    @property
    def n_sequences(self) -> int:
        """Sequences in this batch."""
        return self.tokens.shape[0]

    def mask(self, layer: int, token_set: TokenSet) -> Bool[Tensor, "batch pos"]:
        """True where a token belongs to the set at this layer."""
        token_set = checked_token_set(token_set)
        every = self.real if self.chosen is None else self.real & self.chosen
        if token_set == "all":
            return every
        decisions = every & ~self.bos
        return decisions if token_set == "decisions" else decisions & ~self.sinks[layer]

    def index(self, layer: int, token_set: TokenSet) -> Int[Tensor, " n"]:
        """Flat [batch * pos] indices of the tokens of the set at this layer."""
        return self.mask(layer, token_set).flatten().nonzero().squeeze(-1)

    def added(self, layer: int, token_set: TokenSet) -> Iterator[Int[Tensor, " n"]]:
        """Flat indices of the tokens that each of WIDER_SETS adds to a set, one set after another.

        To "geometry", "decisions" adds the attention sinks of this layer, and "all" BOS.
        """
        inside = self.mask(layer, token_set)
        for wider in WIDER_SETS:
            more = self.mask(layer, wider) & ~inside
            yield more.flatten().nonzero().squeeze(-1)
            inside = inside | more

    def per_sequence(
        self, values: Float[Tensor, " n"], layer: int, token_set: TokenSet
    ) -> Float[Tensor, " batch"]:
        """Sum one number per token of the set over each sequence, float64.

        Written into place and summed along a row rather than scattered, which makes the order of
        the sum, and so the last bit, the same on every run on an accelerator too.

        Raises:
            ProbeError: if there are more or fewer numbers than tokens.
        """
        index = self.index(layer, token_set)
        if values.shape != index.shape:
            raise ProbeError(
                f"expected one number for each of the {len(index)} tokens of the set "
                f"{token_set!r}, got a tensor of shape {tuple(values.shape)}"
            )
        spread = torch.zeros(self.tokens.numel(), dtype=torch.float64, device=self.device)
        spread[index.to(self.device)] = values.to(self.device, torch.float64)
        return spread.view(self.tokens.shape).sum(-1)

    def vectors(
        self, layer: int, view: View, token_set: TokenSet = "geometry"
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """(base, tuned) vectors of the tokens of the set at one layer and view, float32."""
        return self.vectors_at(layer, view, self.index(layer, token_set))

    def vectors_at(
        self, layer: int, view: View, index: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]]:
        """(base, tuned) vectors at flat [batch * pos] indices, float32."""
        base = self.base.vectors(layer, view, index).to(self.device)
        if self.is_shared(layer, view):
            return base, base.clone()  # a probe may change one of them
        return base, self.tuned.vectors(layer, view, index).to(self.device)

    def is_shared(self, layer: int, view: View) -> bool:
        """Whether both models have the same vectors here, bit for bit."""
        return layer < self.shared.layers and (view != "final_norm" or self.shared.norm)

    def lens_scale(self) -> Float[Tensor, " batch"]:
        """By how much a sequence's sum over the tokens that a sampled lens reads is too small.

        The number of its decisions by that of those read: the sums so scaled are, over draws of the
        sample, on average those over all decisions (Horvitz and Thompson 1952).
        """
        decisions = self.mask(0, "decisions")
        read = decisions if self.lens is None else decisions & self.lens
        n, n_read = (mask.sum(-1).to(self.device, torch.float64) for mask in (decisions, read))
        return n / n_read.clamp_min(1.0)

    def logits(
        self, layer: int, wanted: Bool[Tensor, " n"] | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk d_vocab"], Float[Tensor, "chunk d_vocab"]]]:
        """Logit lens of both models over the `decisions` tokens, a few rows at a time: final norm,
        unembedding and soft cap applied at `layer`, as float32.

        Args:
            layer: 0 to L.
            wanted: True for those tokens of the set; None for all.

        Yields (rows, base logits, tuned logits), `rows` being the slice of the wanted tokens.
        """
        index = self.index(layer, "decisions")
        if wanted is not None:
            index = index[wanted]
        pieces = logit_rows(len(index), self.base.d_vocab, index.device)
        of_base = self.base.unembed, self.base.normed(layer, index)
        if self.has_shared_logits(layer):
            for rows, logits in logits_in_pieces(pieces, of_base):
                yield rows, logits, logits.clone()
            return
        yield from logits_in_pieces(
            pieces, of_base, (self.tuned.unembed, self.tuned.normed(layer, index))
        )

    def has_shared_logits(self, layer: int) -> bool:
        """Whether both lenses read the same logits here, bit for bit."""
        return self.is_shared(layer, "final_norm") and self.shared.head
