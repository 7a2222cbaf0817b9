"""The weights of a base and a tuned model, one pair of tensors at a time.

Folders and hub ids are read from their safetensors, whose headers tell what there is; no model is
built. A plain LoRA adapter gives the two factors of each change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoadingError, PairError, first_line
from ..offloading import check_can_be_fetched, check_is_here
from .adapter_layout import PREFIX
from .adapters import (
    ADAPTER_WEIGHTS,
    adapter_folder,
    fetched,
    read_adapter_config,
)
from .kinds import backend_of, plain_model, quantisation_of
from .sources import check_source, identity, same_source
from .weight_sharing import is_tied

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What wraps the language model in one checkpoint and not in another of the same model.
WRAPPERS = ("base_model.model.", "language_model.", "transformer.", "gpt_neox.", "model.")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tokens_embed)\.weight$")
# Masks and frequencies that old checkpoints store although the model computes them.
COMPUTED = re.compile(r"(inv_freq|masked_bias)$")
# GPT-2's kind of linear layer stores its matrix as [in, out], every other as [out, in].
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
FLOATS = {"F64", "F32", "F16", "BF16"}
# Settings of LoRA that leave each change alpha / r · B · A, and initialisations that leave the base
# as it is. Any other setting that is given makes it another kind of adapter.
PLAIN_SETTINGS = {
    *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision"),
    *("target_modules", "task_type", "use_rslora", "eva_config"),
}
PLAIN_STARTS = ("True", "False", "None", "gaussian", "eva", "orthogonal")
FACTOR = re.compile(r"\.lora_(embedding_)?([AB])(\.weight)?$")


class Factors(NamedTuple):
    """A change of a matrix as the product out @ into.

    Attributes:
        out: [rows, rank].
        into: [rank, columns].
    """

    out: Tensor
    into: Tensor


class WeightPair(NamedTuple):
    """One weight of both models; a matrix is [out, in], a token table [tokens, d_model].

    Attributes:
        name: as the base has it, without what wraps the language model.
        base: its values before.
        tuned: its values after, the same object where nothing changed it; None with factors.
        factors: the change where it is known as a product.
    """

    name: str
    base: Tensor
    tuned: Tensor | None
    factors: Factors | None = None


@dataclass
class _Weights:
    """The weights of one model by their names here, and how to read each.

    Attributes:
        name, kind: of the source, as in `OpenedModel`.
        shapes: of every weight.
        read: name to values.
        is_tied: whether the unembedding is the embedding.
        transposed: names of matrices that are stored as [in, out].
        factors: name to what reads the factors of an adapter's change of it.
    """

    name: str
    kind: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    is_tied: bool = False
    transposed: frozenset[str] = frozenset()
    factors: Mapping[str, Callable[[], Factors]] = field(default_factory=dict)

    def table(self, name: str) -> str | None:
        """Where the values of a weight are: of a tied unembedding in the embedding."""
        if name in self.shapes:
            return name
        if not (self.is_tied and HEAD.search(name)):
            return None
        return next((other for other in self.shapes if EMBEDDING.search(other)), None)

    def describe(self) -> dict[str, Any]:
        """Name, source and kind, as JSON values."""
        return identity(self.name, self.kind)


@dataclass
class WeightPairs:
    """All weights of two models in the order of their blocks; iterating reads pair by pair.

    Attributes:
        names: of the weights.
        base, tuned: name, source and kind; once all pairs are read, the hash of what was read.
        notes: what a reader of a result should know.
    """

    names: list[str]
    base: dict[str, Any]
    tuned: dict[str, Any]
    notes: list[str]
    _sides: tuple[_Weights, _Weights]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[WeightPair]:
        digests = hashlib.sha256(), hashlib.sha256()
        for name in self.names:
            pair = self._pair(name)
            for digest, tensors in zip(
                digests, ([pair.base], [pair.tuned, *(pair.factors or ())]), strict=True
            ):
                digest.update(name.encode())
                for tensor in tensors:
                    digest.update(b"" if tensor is None else _bytes(tensor))
            yield pair
        for about, digest in zip((self.base, self.tuned), digests, strict=True):
            about["tensors_sha256"] = digest.hexdigest()

    def _pair(self, name: str) -> WeightPair:
        base, tuned = self._sides
        before = _finite(base, base.table(name) or name)
        place = tuned.table(name)
        after = before if place is None else _finite(tuned, place)
        if name in base.transposed:
            before, after = before.mT, after.mT
        is_same = place is None or _equal(before, after)
        if name not in tuned.factors:
            return WeightPair(name, before, before if is_same else after)
        factors = tuned.factors[name]()
        if (len(factors.out), factors.into.shape[1]) != before.shape:
            raise _misfit(tuned.name, f"its change of {name} has another shape")
        if is_same:
            return WeightPair(name, before, None, factors)
        # An adapter on another base: the whole difference counts.
        return WeightPair(name, before, after.double() + factors.out @ factors.into)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether all numbers are the same, whatever their type and device."""
    wider = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(wider), second.to(first.device, wider))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _finite(side: _Weights, name: str) -> Tensor:
    tensor = side.read(name)
    if not bool(torch.isfinite(tensor).all()):
        raise LoadingError(
            f"{name} of {side.name} holds NaN or infinity: save or download the model again"
        )
    return tensor


def read_weight_pairs(base: Any, tuned: Any) -> WeightPairs:
    """Every weight of two models, tied ones once; values are read as the pairs are iterated over.

    Args:
        base: a folder, hub id or Hugging Face model; of a pair (model, tokenizer) the model.
        tuned: the same, a plain LoRA adapter by folder or hub id, or a `PeftModel`.

    Raises:
        LoadingError: if a source cannot be read, is quantised, or is an adapter of another kind.
        PairError: if the two have other weights, or an adapter does not fit.
    """
    first = _open(base)
    second = _open(tuned, first)
    _check_same(first, second)
    # An adapter, merged or not, may have untied the unembedding.
    names = sorted({*first.shapes, *second.shapes, *second.factors}, key=_in_order)
    notes = _adapter_notes(base, tuned)
    return WeightPairs(names, first.describe(), second.describe(), notes, (first, second))


def _in_order(name: str) -> tuple[Any, ...]:
    """Embeddings, blocks by their numbers, then what follows them."""
    block = block_of(name)
    rank = 0 if block is None and EMBEDDING.search(name) else 1 if block is not None else 2
    parts = [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
    return (rank, -1 if block is None else block, parts)


def block_of(name: str) -> int | None:
    """The 0-based block of a weight; None outside of blocks.

    >>> block_of("layers.3.mlp.experts.7.up_proj.weight"), block_of("lm_head.weight")
    (3, None)
    """
    number = re.search(r"(?:^|\.)(?:h|layers|blocks|layer|block)\.(\d+)\.", name)
    return int(number[1]) if number else None


def _open(source: Any, base: _Weights | None = None) -> _Weights:
    check_source(source)
    if isinstance(source, tuple):
        source = source[0]
    if isinstance(source, nn.Module):
        return _of_object(source)
    adapter = adapter_folder(source)
    if adapter is None:
        return _of_files(source)
    if base is None:
        raise PairError(
            f"{source} is an adapter, and the base must be a whole model: give the model that it "
            "was trained on, and the adapter as the tuned one"
        )
    return _of_adapter(adapter, base)


# Files


def _of_files(source: str | Path) -> _Weights:
    folder = Path(source).expanduser()
    files = _safetensors(folder) if folder.is_dir() else _from_hub(str(source))
    config = _config(str(folder if folder.is_dir() else source))
    if getattr(config, "quantization_config", None):
        raise LoadingError(
            f"{source} is quantised: give the model before it was, or one merged in full precision"
        )
    found = _entries(files, str(source))
    names = plain_names(list(found))
    places = {names[key]: (file, key) for key, (file, *_) in found.items()}
    shapes = {names[key]: shape for key, (_, shape, _) in found.items()}
    head, table = (next(filter(one.search, shapes), None) for one in (HEAD, EMBEDDING))
    is_tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    if is_tied and head and table:
        # A head of its own is not tied when such a model is loaded, whatever its configuration.
        is_tied = _equal(_read(*places[head]), _read(*places[table]))
        shapes = {name: shape for name, shape in shapes.items() if name != head or not is_tied}
    is_conv1d = config.model_type in CONV1D_MODELS
    kind = "folder" if folder.is_dir() else "hub"
    return _Weights(
        str(folder) if folder.is_dir() else str(source),
        kind,
        shapes,
        lambda name: _read(*places[name]),
        is_tied,
        frozenset(name for name in shapes if is_conv1d and CONV1D.search(name)),
    )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise LoadingError(
            f"cannot read the configuration of {name} ({first_line(error)}): expected a model as "
            "save_pretrained writes it"
        ) from None


def _safetensors(folder: Path) -> list[Path]:
    """The files of a folder: those that its index names, or all there are."""
    index = folder / INDEX
    if not index.exists():
        single = folder / SINGLE
        return [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in _indexed(index)]
    for file in files:
        if not file.exists():
            raise LoadingError(f"{index} names {file.name}, which is missing: copy it there, too")
    return files


def _indexed(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(map(str, names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadingError(
            f"{index} is not readable as an index of safetensors ({first_line(error)}): save or "
            "download the model again"
        ) from None


def _from_hub(name: str) -> list[Path]:
    index = fetched(name, INDEX)
    files = [SINGLE] if index is None else _indexed(index)
    found = [fetched(name, file) for file in files]
    if None in found:
        raise LoadingError(
            f"no safetensors of {name}: there is no such folder, and the model hub has none or "
            "cannot be reached; check the name"
        )
    return [path for path in found if path is not None]


Entry = tuple[Path, tuple[int, ...], str]
"""File, shape and kind of number of a tensor."""


def _entries(files: list[Path], name: str) -> dict[str, Entry]:
    """Every floating-point weight in the headers of these files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Entry] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    piece = file.get_slice(key)
                    found[key] = path, tuple(piece.get_shape()), piece.get_dtype()
        except (SafetensorError, OSError) as error:
            raise LoadingError(
                f"the safetensors of {name} are corrupt ({first_line(error)}): copy or download "
                "them again"
            ) from None
    packed = [key for key, (_, _, dtype) in found.items() if dtype not in FLOATS]
    if any(key.endswith(("weight", "qweight")) for key in packed):
        raise LoadingError(
            f"{packed[0]} of {name} holds no plain numbers: it is quantised; give the model before "
            "it was"
        )
    return {key: one for key, one in found.items() if key not in packed and _is_weight(key, one[1])}


def _is_weight(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is no mask or frequency that the model computes itself."""
    is_mask = key.endswith(".bias") and len(shape) > 2
    return not (is_mask or COMPUTED.search(key)) and math.prod(shape) > 0


def _read(file: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(key)
    return tensor


def plain_names(keys: list[str]) -> dict[str, str]:
    """Names without what wraps the language model; as they are where two would be one.

    >>> plain_names(["model.layers.0.norm.weight", "lm_head.weight"])["model.layers.0.norm.weight"]
    'layers.0.norm.weight'
    """
    found = {key: _unwrapped(key) for key in keys}
    return found if len(set(found.values())) == len(keys) else {key: key for key in keys}


def _unwrapped(key: str) -> str:
    start = next((wrapper for wrapper in WRAPPERS if key.startswith(wrapper)), None)
    return key if start is None else _unwrapped(key.removeprefix(start))


# Adapters in files


def _of_adapter(folder: Path, base: _Weights) -> _Weights:
    """The factors of plain LoRA, and what its file replaces whole, such as `modules_to_save`."""
    config = read_adapter_config(folder)
    _check_plain(config, folder)
    file = folder / ADAPTER_WEIGHTS
    entries = _entries([file], str(folder))
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in entries:
        if match := FACTOR.search(key):
            module = key[: match.start()].removeprefix(PREFIX)
            halves.setdefault(module, {})[match[2]] = key
        else:
            whole[_unwrapped(key.replace(".base_layer.", "."))] = key
    if base.is_tied and any(map(EMBEDDING.search, whole)):
        whole = {name: key for name, key in whole.items() if not HEAD.search(name)}
    factors = {
        _unwrapped(f"{module}.weight"): partial(_factors_in, file, keys, config, module)
        for module, keys in halves.items()
        if keys.keys() == {"A", "B"}
    }
    shapes = {name: entries[key][1] for name, key in whole.items()}
    for name in (*factors, *shapes):
        if base.table(name) is None:
            raise _misfit(folder, f"it changes {name}, which the base does not have")
    return _Weights(
        str(folder), "adapter", shapes, lambda name: _read(file, whole[name]), factors=factors
    )


def _misfit(adapter: object, why: str) -> PairError:
    return PairError(
        f"adapter {adapter} does not fit this base ({why}): give the base that it was trained on"
    )


def _factors_in(
    file: Path, keys: Mapping[str, str], config: Mapping[str, Any], module: str
) -> Factors:
    """The factors of one module in an adapter's file, the scale in the first."""
    first, second = _read(file, keys["A"]), _read(file, keys["B"])
    scale = _scale(config, module, first.shape[0])
    return _oriented(first, second, scale, is_table="embedding" in keys["A"])


def _oriented(first: Tensor, second: Tensor, scale: float, *, is_table: bool) -> Factors:
    """scale · B · A; of a token table, [tokens, d_model], the transpose."""
    first, second = first.detach().double(), scale * second.detach().double()
    return Factors(first.mT, second.mT) if is_table else Factors(second, first)


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    """Raise unless an adapter's changes are products that its file holds.

    Raises:
        LoadingError: saying what makes it another kind.
    """
    kind = config["peft_type"]
    others = [name for name, value in config.items() if value and name not in PLAIN_SETTINGS]
    start = str(config.get("init_lora_weights"))
    if kind == "LORA" and others:
        kind = f"LoRA with {others[0]}"
    elif kind == "LORA" and start not in PLAIN_STARTS:
        kind = f"LoRA that begins with {start}, which changes the base"
    if kind != "LORA":
        raise _not_plain(f"the adapter {folder}", kind, str(folder))


def _not_plain(what: str, kind: str, source: str) -> LoadingError:
    return LoadingError(
        f"{what} is {kind}, and only the changes of plain LoRA can be read from its factors: merge "
        f"it (hyperlens merge {source} --out merged), and give the merged folder"
    )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


# Models in memory


def _of_object(model: Any) -> _Weights:
    model = getattr(model, "_orig_mod", model)  # inside a compiled one
    if backend_of(model) is not None:
        raise LoadingError(
            f"{type(model).__name__} is a hooked model, whose weights may have other names and "
            "values: give the Hugging Face model, its folder or hub id"
        )
    plain = plain_model(model)
    if quantisation_of(plain) is not None:
        raise LoadingError(
            f"{type(plain).__name__} is quantised: give the model before it was, or one merged in "
            "full precision"
        )
    check_can_be_fetched(plain)
    check_is_here(plain, "comparing weights")
    name = getattr(getattr(plain, "config", None), "_name_or_path", "") or type(plain).__name__
    factors = _factors_of(plain, name)
    parameters = _own_parameters(plain)
    conv1d = {f"{n}.weight" for n, m in plain.named_modules() if type(m).__name__ == "Conv1D"}
    names = plain_names(list(parameters))
    by_name = {names[key]: parameter for key, parameter in parameters.items()}
    return _Weights(
        name,
        "object",
        {key: tuple(parameter.shape) for key, parameter in by_name.items()},
        lambda key: by_name[key].detach(),
        hasattr(plain, "get_input_embeddings") and is_tied(plain),
        frozenset(_unwrapped(key.replace(".base_layer.", ".")) for key in conv1d),
        factors,
    )


def _own_parameters(plain: Any) -> dict[str, Tensor]:
    """The parameters in use, by their names without an adapter; tied ones once."""
    found: dict[str, Tensor] = {}
    for key, parameter in plain.named_parameters():
        if ".lora_" in key or ".original_module." in key:
            continue
        name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key.replace(".base_layer.", "."))
        found[name] = parameter
    return found


def _factors_of(plain: Any, source: str) -> dict[str, Callable[[], Factors]]:
    """The factors of every LoRA layer that is in use and not merged."""
    found: dict[str, Callable[[], Factors]] = {}
    for key, layer in plain.named_modules():
        kinds = {kind.__name__ for kind in type(layer).__mro__}
        if "BaseTunerLayer" not in kinds:
            continue
        kind = _other_kind(layer, kinds)
        if kind is not None:
            raise _not_plain("the adapter in this model", kind, "ADAPTER")
        if not layer.merged:
            found[_unwrapped(f"{key}.weight")] = partial(_factors_in_layer, layer)
    return found


def _other_kind(layer: Any, kinds: set[str]) -> str | None:
    """What makes an adapter's layer another one than plain LoRA's; None where nothing does."""
    if "LoraLayer" not in kinds or type(layer).__name__ not in ("Linear", "Embedding"):
        return f"of the kind {type(layer).__name__}"
    if any(name in layer.lora_variant for name in layer.active_adapters):
        return "a variant of LoRA, such as DoRA"
    biased = any(layer.lora_bias.get(name, False) for name in layer.active_adapters)
    return "LoRA with lora_bias" if biased else None


def _factors_in_layer(layer: Any) -> Factors:
    """Of all active adapters of a layer side by side: their changes add up."""
    is_table = type(layer).__name__ == "Embedding"
    a, b = (
        (layer.lora_embedding_A, layer.lora_embedding_B)
        if is_table
        else (layer.lora_A, layer.lora_B)
    )
    parts = []
    for name in layer.active_adapters:
        if name in a:
            first, second = (one[name] if is_table else one[name].weight for one in (a, b))
            parts.append(_oriented(first, second, layer.scaling[name], is_table=is_table))
    return Factors(torch.cat([one.out for one in parts], 1), torch.cat([o.into for o in parts]))


# Both


def _check_same(base: _Weights, tuned: _Weights) -> None:
    """Raise where the two models have other weights, or weights of other shapes.

    Raises:
        PairError: with the first of them.
    """
    if base.factors:
        raise PairError(
            f"the base {base.name} has an adapter in it: give the model that the adapter was "
            "trained on, or merge it first (hyperlens merge)"
        )
    if tuned.kind != "adapter":
        for one, other, words in ((base, tuned, "tuned"), (tuned, base, "base")):
            missing = sorted((n for n in one.shapes if other.table(n) is None), key=_in_order)
            if missing:
                raise PairError(
                    f"the {words} model has no {missing[0]} ({len(missing)} of {len(one.shapes)} "
                    "weights are missing there): compare a model with its own base, and both as "
                    "folders or both in memory"
                )
    for name, shape in tuned.shapes.items():
        place = base.table(name)
        if place is not None and base.shapes[place] != shape:
            raise PairError(
                f"{name} is {_size(base.shapes[place])} in the base and {_size(shape)} in the "
                "tuned model: compare a model with its own base; if tokens were added, give "
                "open_pair(base, tuned), which reads the rows that both have"
            )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in shape)


def _adapter_notes(base: Any, tuned: Any) -> list[str]:
    """That an adapter names another base than it is compared with."""
    folder = adapter_folder(tuned)
    named = None if folder is None else read_adapter_config(folder).get("base_model_name_or_path")
    given = base[0] if isinstance(base, tuple) else base
    if not named or not isinstance(given, str | Path):
        return []
    beside = str(folder / named) if folder is not None else named
    if same_source(named, str(given)) or same_source(beside, str(Path(given).expanduser())):
        return []
    return [
        f"adapter {Path(str(tuned)).name} names {named} as its base; its changes are held against "
        f"the weights of {given}"
    ]
