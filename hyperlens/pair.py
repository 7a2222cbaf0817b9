"""A pair of models made comparable: same kind of hooks, dtype, device, attention and tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import processes
from .checks import check_types
from .data.chat import ChatTemplate, check_template, template_text
from .data.conversations import Conversations, read_examples, read_whole
from .data.corpus import Corpus, are_token_ids, build_corpus, check_max_length
from .data.reading import EVERYTHING, OWN, Reading
from .data.texts import Texts
from .errors import CorpusError, LoadingError, PairError
from .hooks.loading import LoadedModel, check_backend, hook, parse_device, parse_dtype
from .models.kinds import Backend, backend_of, is_peft, plain_model, text_config
from .models.sources import OpenedModel, open_source, same_source
from .models.vocabulary import mass_outside, n_rows, n_shared, narrowed
from .models.weight_sharing import converted
from .offloading import device_of
from .render.format import PERCENT, count
from .results.fingerprint import Known, versions

# The two tokenizers are compared on this many texts.
COMPARED_TEXTS = 64
# Of vocabularies that differ, so large a part has to be the same.
MIN_SHARED = 0.5
# On so many texts the probability of the other tokens is measured.
WEIGHED_TEXTS = 8
# Longer than any text.
WHOLE = 2**31


@dataclass(frozen=True, repr=False)
class Pair:
    """A base and a fine-tuned model, opened, hooked and checked once.

    Every function of hyperlens that takes `(base, tuned, texts)` takes `(pair, texts)` too, and
    then neither loads nor checks nor hashes the two models again. See `open_pair`.

    Attributes:
        base, tuned: the two models; `.hooked` is the hooked one, `.model` the Hugging Face one.
        notes: what a reader of any result should know about how they were opened.
        digests: of the base's tensors, as far as they have been hashed.
        whole: by side, the models that have tokens beyond those that both have, with all of them.
    """

    base: LoadedModel
    tuned: LoadedModel
    notes: tuple[str, ...] = ()
    digests: Known = field(default_factory=dict, compare=False)
    whole: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        cfg = self.base.hooked.cfg
        dtype = str(cfg.dtype).removeprefix("torch.")
        return f"Pair({self.base.name} -> {self.tuned.name}, {cfg.n_layers} blocks, {dtype})"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that texts are read with: the base's, else the tuned model's, else None."""
        return self.base.tokenizer or self.tuned.tokenizer

    @property
    def unpadded(self) -> bool:
        """Whether texts have to be read without pads; a note says why."""
        return self.base.unpadded or self.tuned.unpadded

    def describe(self) -> dict[str, Any]:
        """Sizes, names, hashes of the weights and library versions, as JSON values.

        The weights are hashed at the first call only.
        """
        return copy.deepcopy(self._description)

    @cached_property
    def _description(self) -> dict[str, Any]:
        cfg = self.base.hooked.cfg
        base = self.base.describe(self.digests)
        return {
            "n_layers": cfg.n_layers,
            "d_model": cfg.d_model,
            "d_vocab": cfg.d_vocab,
            "base": base,
            # A copy: tensors of the tuned model may be gone before those of the base.
            "tuned": self.tuned.describe(dict(self.digests)),
            "backend": self.base.backend,
            "device": str(cfg.device),
            "dtype": str(cfg.dtype).removeprefix("torch."),
            "versions": versions(),
        }

    @check_types
    def tokenize(
        self,
        texts: Any,
        *,
        max_length: int = 256,
        include_bos: bool = False,
        reading: Reading = EVERYTHING,
    ) -> Corpus:
        """The token sequences that both models read; `.notes` says what a reader should know.

        Args:
            texts: list of strings, of token ids or of conversations, path of a .txt, .jsonl, .csv
                or .parquet file, `datasets.Dataset`, data frame, or the name of a hub dataset.
            max_length: tokens per text, BOS included; longer texts are cut and counted.
            include_bos: measure BOS positions too.
            reading: the chat template of conversations, and which tokens are counted, where the
                texts do not say it themselves (`read_examples`).

        Raises:
            CorpusError: if the texts cannot be read, or leave nothing to measure.
            PairError: if the two tokenizers read them differently, or the two models have different
                chat templates and none was chosen.
        """
        check_max_length(max_length)
        notes: tuple[str, ...] = ()
        tokenizer, template = self.tokenizer, None
        if not are_token_ids(texts):
            texts = read_examples(texts)
            reading = reading.over(texts.reading)
            if isinstance(texts, Conversations) and texts.have_messages:
                template, notes = _chat_template(self, reading.chat_template)
                tokenizer = template.tokenizer
            elif reading.chat_template is not None:
                raise CorpusError(
                    "chat_template writes conversations, and the texts are none: give texts with "
                    "messages, or leave it out"
                )
            notes += _compared_tokenizers(self, _some_strings(texts), tokenizer)
        cfg = self.base.hooked.cfg
        # BOS where there is no tokenizer to tell: what the model's own configuration says.
        bos = getattr(text_config(self.base.model), "bos_token_id", None)
        corpus = build_corpus(
            texts,
            tokenizer,
            max_length=max_length,
            context_length=getattr(cfg, "n_ctx", None) or None,
            d_vocab=cfg.d_vocab,
            is_shared=bool(self.whole),
            include_bos=include_bos,
            bos_id=bos if isinstance(bos, int) else None,
            unpadded=self.unpadded,
            template=template,
            reading=reading,
        )
        return replace(corpus, notes=(*corpus.notes, *notes, *self._outside(corpus)))

    def _outside(self, corpus: Corpus) -> Iterator[str]:
        """How much probability is on tokens that only one of the models has."""
        n = self.base.hooked.cfg.d_vocab
        for side, model in self.whole.items():
            device = device_of(model)
            texts = [
                torch.as_tensor(ids, device=device) for ids in corpus.sequences[:WEIGHED_TEXTS]
            ]
            mass = torch.cat([mass_outside(model, ids, n) for ids in texts]).mean()
            yield (
                f"the {side} model gives {PERCENT(float(mass))} of its probability to tokens that "
                f"the other model does not have, mean over {count(len(texts), 'text')}; they are "
                "left out"
            )


@check_types
def open_pair(
    base: Any,
    tuned: Any,
    *,
    backend: Backend = "residual",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Pair:
    """Open, align, hook and check two models, once for any number of experiments.

    Args:
        base: hub id, local folder, `PreTrainedModel`, `PeftModel`, hooked model, or a pair
            (model, tokenizer).
        tuned: the same; or an adapter, by folder or hub id, which is put on the base's own
            weights. They are held only once.
        backend: how models are hooked, "residual", "bridge" or "hooked_transformer".
        device: None leaves objects where they are and puts folders on the best device.
        dtype: of the forward passes, for both models; None keeps the checkpoints' own.

    Raises:
        LoadingError: if a source cannot be opened.
        ParityError: if a hooked model does not reproduce its source.
        PairError: if the models differ in depth, width, vocabulary or kind, or are swapped.

    >>> from hyperlens.embedded import embedded_base, embedded_tales
    >>> pair = open_pair(embedded_base(), embedded_base())
    >>> pair.base.hooked.cfg.n_layers, pair.tuned.backend
    (10, 'residual')
    >>> pair.tokenize(embedded_tales(), max_length=64).counts.n_sequences
    66
    """
    return next(open_pairs(base, [tuned], backend=backend, device=device, dtype=dtype))


def open_pairs(
    base: Any,
    tuned: Iterable[Any],
    *,
    backend: Backend = "residual",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Iterator[Pair]:
    """One base with each of several fine-tuned models in turn, each pair as `open_pair` opens it.

    The base is opened, hooked, checked and hashed once. A pair is opened when it is asked for, and
    not held here: whoever lets go of it before the next one has two models in memory at a time.

    Args:
        base: what `open_pair` takes.
        tuned: what `open_pair` takes, one after the other.
        backend, device, dtype: as of `open_pair`.

    Raises:
        HyperlensError: as `open_pair` does.
    """
    check_backend(backend)
    where, cast = parse_device(device), parse_dtype(dtype)
    opened: OpenedModel | None = None
    loaded: LoadedModel | None = None
    digests: Known = {}
    for source in tuned:
        if opened is None:
            opened, loaded, digests = open_source(base, device=where, dtype=cast), None, {}
        second = open_source(source, device=where, dtype=cast, base=opened)
        # A base that is cast for this one is another base, and not that of the next.
        is_cast = torch.promote_types(_dtype(opened), _dtype(second)) != _dtype(opened)
        if is_cast:
            loaded, digests = None, {}
        pair = _hooked(opened, second, backend, loaded, digests)
        if is_cast:
            opened = None
        elif "base" not in pair.whole:  # a part of its vocabulary is another base, too
            loaded = pair.base
        del second
        yield pair
        del pair


def _hooked(
    first: OpenedModel,
    second: OpenedModel,
    backend: Backend,
    loaded: LoadedModel | None,
    digests: Known,
) -> Pair:
    """Two opened models as a pair.

    Args:
        first, second: the two.
        backend: how they are hooked, unless one is already.
        loaded: the first one, hooked and checked before.
        digests: of its tensors.
    """
    _check_not_swapped(first, second)
    first, second, notes = _aligned(first, second)
    kinds = {backend_of(o.model) for o in (first, second)} - {None}
    if len(kinds) > 1:
        raise PairError(
            f"the base is a {backend_of(first.model)} model and the tuned one a "
            f"{backend_of(second.model)} model, whose numbers differ: load both the same way"
        )
    # A hooked model given on one side decides how the other is hooked.
    chosen = next((kind for kind in kinds if kind is not None), backend)
    whole: dict[str, Any] = {}
    if not kinds:
        sides = {"base": first, "tuned": second}
        (first, second), shared = _on_shared_vocabulary(first, second)
        notes += shared
        whole = {
            side: one.model
            for (side, one), now in zip(sides.items(), (first, second), strict=True)
            if one is not now
        }
    if "base" in whole:
        loaded, digests = None, {}
    if loaded is None or loaded.backend != chosen:
        loaded = hook(first, chosen)
    hooked = loaded, hook(second, chosen)
    pair = Pair(*hooked, hooked[0].notes + hooked[1].notes + notes, digests, whole)
    _check_sizes(pair)
    return pair


class Inputs(NamedTuple):
    """What an experiment reads: a pair and its texts.

    Attributes:
        pair: the two models.
        corpus: the texts as token sequences.
        notes: what a reader of the result should know of both.
    """

    pair: Pair
    corpus: Corpus
    notes: tuple[str, ...]

    def metadata(
        self, *, seed: int, options: dict[str, Any], notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The `meta` of a result: models, texts, options, seed and notes.

        Args:
            seed: of everything drawn at random.
            options: what else decides the numbers, as JSON values.
            notes: what a reader should know besides.
        """
        return self.pair.describe() | {
            "seed": seed,
            "options": options,
            "corpus": self.corpus.describe(),
            "notes": [*self.notes, *notes],
        }


def open_inputs(
    base: Any,
    tuned: Any,
    texts: Any,
    *,
    max_length: int,
    include_bos: bool = False,
    generates: bool = True,
    only_prompts: bool = False,
    backend: Backend | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    reading: Reading = EVERYTHING,
) -> Inputs:
    """Open a pair unless it is open already, and tokenize the texts for it.

    Args:
        base, tuned, texts: two models and texts; or an open `Pair` and the texts, as the second or
            third argument.
        max_length: tokens per text, BOS included.
        include_bos: measure BOS positions too.
        generates: whether the models have to generate, which hooked models cannot.
        only_prompts: whether texts are continued and nothing else. Conversations are then not cut,
            and no choice of tokens leaves any out.
        backend, device, dtype: see `open_pair`; decided already where a `Pair` is given.
        reading: see `Pair.tokenize`.

    Raises:
        HyperlensError: if a source cannot be opened, or the texts do not fit the models.
    """
    check_max_length(max_length)
    if isinstance(base, Pair):
        pair, texts = base, _texts_beside_pair(tuned, texts, backend, device, dtype)
        if generates:
            check_generates(pair.base.model, pair.tuned.model)
    else:
        if texts is None:
            raise CorpusError(
                "expected (base, tuned, texts) or (pair, texts), got no texts: give a list of "
                "strings, a file or the name of a dataset"
            )
        if generates:
            check_generates(base, tuned)
        # Before any model is loaded: a mistyped file name should not cost a minute.
        texts = texts if are_token_ids(texts) else read_examples(texts)
        pair = open_pair(base, tuned, backend=backend or "residual", device=device, dtype=dtype)
    if only_prompts and not are_token_ids(texts):
        texts = read_whole(texts)
        max_length = WHOLE if isinstance(texts, Conversations) else max_length
    return tokenized(pair, texts, max_length, include_bos, reading)


def tokenized(
    pair: Pair,
    texts: Any,
    max_length: int,
    include_bos: bool = False,
    reading: Reading = EVERYTHING,
) -> Inputs:
    """Texts as an open pair reads them, with the notes on both.

    Raises:
        HyperlensError: if the texts do not fit the models.
    """
    corpus = pair.tokenize(texts, max_length=max_length, include_bos=include_bos, reading=reading)
    processes.check_same("texts", corpus.sha256)
    if processes.sharing():  # hashing takes its time
        models = pair.describe()
        processes.check_same("models", [models[side]["sha256"] for side in ("base", "tuned")])
    return Inputs(pair, corpus, (*pair.notes, *corpus.notes))


def _texts_beside_pair(second: Any, third: Any, backend: Any, device: Any, dtype: Any) -> Any:
    if second is not None and third is not None:
        raise PairError(
            "expected (pair, texts), got a third argument: an open pair holds both models already"
        )
    options = {"backend": backend, "device": device, "dtype": dtype}
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise PairError(f"{given[0]} is decided when a pair is opened: pass it to open_pair")
    texts = second if third is None else third
    if texts is None:
        raise CorpusError("expected (pair, texts), got no texts")
    return texts


def check_generates(base: Any, tuned: Any) -> None:
    """Raise unless both models can generate.

    Raises:
        LoadingError: naming the one that is hooked.
    """
    for side, source in (("base", base), ("tuned", tuned)):
        model = source[0] if isinstance(source, tuple) and source else source
        if isinstance(model, nn.Module) and backend_of(model) is not None:
            raise LoadingError(
                f"{side} is a hooked model, which cannot generate: pass the Hugging Face or PEFT "
                "model, its folder or its hub id"
            )


def _check_not_swapped(base: OpenedModel, tuned: OpenedModel) -> None:
    """Raise where the base is an adapter of what was given as the tuned model."""
    if not is_peft(base.model) or tuned.kind not in ("folder", "hub"):
        return
    for config in base.model.peft_config.values():
        named = config.base_model_name_or_path
        beside = str(Path(base.name) / named) if named and base.kind == "adapter" else named
        if named and (same_source(named, tuned.name) or same_source(beside, tuned.name)):
            raise PairError(
                f"base and tuned are swapped: {base.name} is an adapter of {tuned.name}; give the "
                "base first, then the adapter"
            )


def _aligned(
    first: OpenedModel, second: OpenedModel
) -> tuple[OpenedModel, OpenedModel, tuple[str, ...]]:
    """Give both models one device, dtype and attention: differences there are not tuning."""
    if any(backend_of(o.model) is not None for o in (first, second)):
        if _dtype(first) != _dtype(second) or _device(first) != _device(second):
            raise PairError(
                f"base is {_dtype(first)} on {_device(first)}, tuned is {_dtype(second)} on "
                f"{_device(second)}: load both with the same dtype and device"
            )
        return first, second, ()
    notes = []
    wider = torch.promote_types(_dtype(first), _dtype(second))
    if _dtype(first) != _dtype(second):
        notes.append(f"dtypes differ ({_dtype(first)}, {_dtype(second)}): both run in {wider}")
    if _device(second) != _device(first):
        second = replace(second, model=converted(second.model, _device(first), None))
    # A model that runs in this dtype already keeps what it has in others, such as an adapter's
    # float32 on a half-precision base.
    first, second = (
        o if _dtype(o) == wider else replace(o, model=converted(o.model, None, wider))
        for o in (first, second)
    )
    attention = [plain_model(o.model).config._attn_implementation for o in (first, second)]
    if attention[0] != attention[1]:
        plain_model(second.model).set_attn_implementation(attention[0])
        notes.append(f"attention differs ({attention[0]}, {attention[1]}): both run {attention[0]}")
    return first, second, tuple(notes)


def _on_shared_vocabulary(
    first: OpenedModel, second: OpenedModel
) -> tuple[tuple[OpenedModel, OpenedModel], tuple[str, ...]]:
    """Leave out the rows of the vocabulary that only one of the models has."""
    rows = n_rows(first.model), n_rows(second.model)
    if rows[0] == rows[1]:
        return (first, second), ()
    n = n_shared(rows, (first.tokenizer, second.tokenizer))
    if n < MIN_SHARED * min(rows):
        raise PairError(
            f"the models have {rows[0]} and {rows[1]} tokens, of which only the first {n} are the "
            "same: compare models that share a tokenizer"
        )
    first, second = (
        replace(one, model=narrowed(one.model, n)) if own != n else one
        for one, own in zip((first, second), rows, strict=True)
    )
    note = f"the vocabularies differ (base {rows[0]}, tuned {rows[1]}): both are read on {n} tokens"
    return (first, second), (note,)


def _dtype(opened: OpenedModel) -> torch.dtype:
    dtype: torch.dtype = next(p.dtype for p in opened.model.parameters() if p.is_floating_point())
    return dtype


def _device(opened: OpenedModel) -> torch.device:
    return device_of(opened.model)


def _check_sizes(pair: Pair) -> None:
    base, tuned = pair.base.hooked.cfg, pair.tuned.hooked.cfg
    for what, advice, a, b in (
        ("depth", "compare models with the same blocks", base.n_layers, tuned.n_layers),
        ("width", "compare models of one size", base.d_model, tuned.d_model),
        (
            "vocabulary",
            "of hooked models only those of one vocabulary can be compared",
            base.d_vocab,
            tuned.d_vocab,
        ),
    ):
        if a != b:
            raise PairError(f"the models differ in {what}: base {a}, tuned {b}; {advice}")


def _some_strings(texts: Texts | Conversations) -> list[str]:
    """A few of the texts, or what is said in a few conversations."""
    if isinstance(texts, Conversations):
        return texts.strings(COMPARED_TEXTS)
    return list(texts[:COMPARED_TEXTS])


def _chat_template(pair: Pair, choice: str | None) -> tuple[ChatTemplate, tuple[str, ...]]:
    """What writes conversations for both models, and a note that says whose it is.

    The tokenizer is that of the model whose template it is, else the tuned model's: tuning may have
    added the tokens that templates write.

    Raises:
        CorpusError: if there is no template.
        PairError: if the two differ and none was chosen.
    """
    readers = {
        side: loaded.tokenizer
        for side, loaded in (("tuned", pair.tuned), ("base", pair.base))
        if loaded.tokenizer is not None
    }
    own = {side: text for side, reader in readers.items() if (text := template_text(reader))}
    reader = next(iter(readers.values()), None)
    if choice in OWN:
        check_template(readers.get(choice, reader), own.get(choice), f"the {choice} model's")
        note = f"conversations are written by the chat template of the {choice} model"
        return ChatTemplate(readers[choice], own[choice], choice), (note,)
    if choice is not None:
        if not choice.strip():
            raise CorpusError(
                "the chat template that was given is empty: give the text of one, or leave "
                "chat_template out"
            )
        check_template(reader, choice)
        note = "conversations are written by a chat template that was given"
        return ChatTemplate(reader, choice, "given"), (note,)
    if len(set(own.values())) > 1:
        raise PairError(
            "the two models have different chat templates, and both read the same text: choose "
            'chat_template="tuned" or "base", or give one'
        )
    side = next(iter(own), "tuned")
    check_template(readers.get(side, reader), own.get(side), "the models'")
    if len(own) == 2:
        note = "conversations are written by the chat template that both models have"
        return ChatTemplate(readers[side], own[side], "both"), (note,)
    other = "base" if side == "tuned" else "tuned"
    note = (
        f"conversations are written by the chat template of the {side} model: the {other} model "
        "has none"
    )
    return ChatTemplate(readers[side], own[side], side), (note,)


def _compared_tokenizers(pair: Pair, texts: list[str], used: Any) -> tuple[str, ...]:
    """Compare the two tokenizers, in vocabulary and on some of the texts.

    Returns:
        Notes on differences that do not matter here.

    Raises:
        PairError: if the same text, or the same id, means different things to the two models.
    """
    ours, theirs = pair.base.tokenizer, pair.tuned.tokenizer
    if ours is None or theirs is None or ours is theirs:
        return ()
    vocabularies = ours.get_vocab(), theirs.get_vocab()
    shared = set(vocabularies[0]) & set(vocabularies[1])
    moved = sorted(t for t in shared if vocabularies[0][t] != vocabularies[1][t])
    only = [sorted(set(v) - shared, key=v.__getitem__) for v in vocabularies]
    encoded = [
        t(texts, add_special_tokens=False, verbose=False)["input_ids"] for t in (ours, theirs)
    ]
    changed = sum(a != b for a, b in zip(*encoded, strict=True))
    gone = [] if pair.whole else only[0]  # of two vocabularies what both have is read
    if moved or gone or changed:
        details = []
        if moved:
            token = moved[0]
            details.append(
                f"{len(moved)} tokens have other ids ({token!r} is {vocabularies[0][token]} and "
                f"{vocabularies[1][token]})"
            )
        if gone:
            details.append(f"{len(gone)} base tokens are gone ({gone[0]!r})")
        if changed:
            details.append(f"{changed} of {len(texts)} texts are split differently")
        advice = "compare models that share a tokenizer"
        if only[0] or only[1]:
            advice += ", or leave out of the texts what only one of them knows"
        raise PairError(f"the tokenizers differ: {'; '.join(details)}: {advice}")
    if only[1] and not pair.whole:
        return (
            f"the tuned tokenizer adds {len(only[1])} tokens ({only[1][0]!r}, …): "
            f"the {'base' if used is ours else 'tuned model'}'s is used",
        )
    return ()
