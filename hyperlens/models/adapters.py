"""PEFT adapters: find them, read their configuration, put them on a base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadingError, PairError, first_line, shortened
from ..offloading import check_is_here
from .adapter_layout import PREFIX, layout_of
from .kinds import HUB_ID
from .vocabulary import resize_tables
from .weight_sharing import token_tables, weight_sharing_copy

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Initialisations of LoRA that change the base in a way that peft cannot repeat from a folder.
LOST = {
    "pissa_niter": "whose directions peft draws at random again at each load",
    "corda": "which changes the base by what it saw in data that the folder does not have",
    "lora_ga": "which changes the base by gradients that the folder does not have",
}
PROMPT_LEARNING = (
    "prompt-learning adapters (prompt, prefix or P-tuning) add positions rather than change weights"
)
INCOMPARABLE = {
    "LILY": "Lily mixes its experts by a mean over all tokens of a batch, later ones too",
    "POLY": "Poly adapters choose by a task that is given beside the tokens",
    "SHADOW": "Shadow adapters run a second network beside the blocks",
    "XLORA": "X-LoRA mixes several adapters by what it reads in a first pass",
}
# Fetched with an adapter from the hub, where they exist: it may come with a tokenizer of its own.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def adapter_folder(source: Any) -> Path | None:
    """The folder of an adapter, in the cache for a hub id; None for any other source.

    Args:
        source: any model source; of a pair (model, tokenizer) the model.
    """
    if isinstance(source, tuple) and source:
        source = source[0]
    if not isinstance(source, str | Path):
        return None
    folder = Path(source).expanduser()
    if folder.exists() or isinstance(source, Path) or not HUB_ID.fullmatch(source):
        return folder if (folder / ADAPTER_CONFIG).exists() else None
    # A full model in the cache is not an adapter; asking the hub again would cost a request, and
    # half a minute of timeouts where there is no network.
    config = None if _is_cached_model(source) else fetched(source, ADAPTER_CONFIG)
    if config is None:
        return None
    for file in (ADAPTER_WEIGHTS, *TOKENIZER_FILES):
        fetched(source, file)
    return config.parent


def _is_cached_model(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    model, adapter = (
        isinstance(try_to_load_from_cache(name, file), str)
        for file in ("config.json", ADAPTER_CONFIG)
    )
    return model and not adapter


def fetched(name: str, file: str) -> Path | None:
    """A file of a hub repository, downloaded into the cache unless it is there; None if missing."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(name, file)
    except OSError:  # no such repository or file, or no hub: loading the model will say so
        return None
    return None if path is None else Path(path)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder that can be loaded.

    Raises:
        LoadingError: if it is unreadable, there are no safe weights beside it, or peft would not
            read it as it was trained.
    """
    from peft import PeftType

    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadingError(
            f"{path} is not readable JSON ({first_line(error)}): save the adapter again"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") not in list(PeftType):
        raise LoadingError(
            f"{path} holds no adapter configuration that the installed peft knows: save the "
            "adapter again, or install the peft that wrote it"
        )
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise LoadingError(
            f"{path} names {shortened(named)} as the adapter's base: write a folder or hub id there"
        )
    by = str(config.get("init_lora_weights"))
    lost = next((why for start, why in LOST.items() if by.startswith(start)), None)
    if config["peft_type"] == PeftType.LORA and lost:
        raise LoadingError(
            f"the adapter {folder} was initialised by {by}, {lost}, so that it cannot be read as "
            "it was trained: save it as plain LoRA with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…), or pass the PeftModel "
            "itself"
        )
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise LoadingError(
            f"{folder} has no {ADAPTER_WEIGHTS}: expected an adapter folder written by PEFT's "
            "save_pretrained (pickled adapters are not loaded)"
        )
    return config


def named_base(folder: Path, config: dict[str, Any]) -> str | Path:
    """Where the base that an adapter names is: beside the adapter, a folder, or a hub id.

    Raises:
        LoadingError: if it names none.
    """
    named = config.get("base_model_name_or_path")
    if not named:
        raise LoadingError(
            f"{folder / ADAPTER_CONFIG} names no base model: give the base yourself, as "
            "compare_models(base, adapter, …) does"
        )
    path = Path(named)
    if path.is_absolute():
        return path
    return folder / named if (folder / named).is_dir() else str(named)


def put_on(
    base: Any, base_name: str, folder: Path, named: str | None
) -> tuple[Any, tuple[str, ...]]:
    """An unmerged PeftModel of an adapter folder on a weight-sharing copy of the base, and notes.

    An adapter trained on a model of text and images can be put on its language model alone, and
    the other way round.

    Args:
        base: plain Hugging Face model; it is not changed.
        base_name: how to call it in errors.
        folder: adapter folder whose configuration has been read.
        named: the base that the adapter itself names.

    Raises:
        LoadingError: if the adapter cannot be read, or is of a kind that cannot be compared.
        PairError: if it does not fit the base.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    made_for = f"it was made for {named or 'another base'}; give that base"
    misfit = PairError(f"adapter {folder} does not fit {base_name}: {made_for}")
    check_is_here(base, "putting an adapter on it")
    try:
        shell = weight_sharing_copy(base)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        layout = layout_of(shell, shapes)
        config = layout.config(PeftConfig.from_pretrained(str(folder)), shell)
        check_adapter_kind(config)
        _check_scales_saved(shell, config, folder)
        placed = {layout.in_base(key): key for key in shapes}
        keys = {name: key for name, key in placed.items() if name is not None}
        stored = {name: shapes[key] for name, key in keys.items()}
        _check_tokens(shell, config, folder, base_name)
        _resize(shell, stored, folder, base_name)
        _unshare_written(shell, set(stored), config)
        _unshare_initialised(shell, config)
        with warnings.catch_warnings():
            # Keys that do not match are an error here, not a warning.
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(
                shell, str(folder), config=config, key_mapping=layout.key_mapping
            ).eval()
            # Told not to look for resized embeddings, peft does not ask the hub about the base.
            loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
        _check_values(loaded, keys, folder)
        expected = set(loaded)
    except (LoadingError, PairError):
        raise
    except SafetensorError as error:
        raise LoadingError(
            f"the adapter weights in {folder} are corrupt ({first_line(error)}): copy or "
            "download them again"
        ) from error
    except (RuntimeError, KeyError) as error:
        misfit.add_note(str(error))
        raise misfit from error
    except ValueError as error:
        raise PairError(
            f"adapter {folder} does not fit {base_name} ({first_line(error)}): {made_for}"
        ) from error
    except Exception as error:
        raise LoadingError(
            f"cannot read the adapter {folder} ({first_line(error)}): save it again with PEFT's "
            "save_pretrained"
        ) from error
    # Whole embeddings may be stored beside the adapter's own weights.
    if expected - stored.keys() or stored.keys() - expected - set(model.state_dict()):
        raise misfit
    unused = len(shapes) - len(stored)
    return model, _unused_note(folder, config, unused) if unused else ()


def _check_values(loaded: Mapping[str, Any], keys: Mapping[str, str], folder: Path) -> None:
    """Raise unless peft has put every tensor of the file where it was saved from.

    It renames some on the way, as transformers does for a few mixtures of experts, finds no module
    of the new name, and leaves what it initialised at random.

    Args:
        loaded: the adapter's tensors in the model, by the names that peft would save them by.
        keys: those names to the file's.
        folder: of the adapter.

    Raises:
        LoadingError: naming one that is not there.
    """
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        for name, tensor in loaded.items():
            if name not in keys:
                continue
            value = file.get_tensor(keys[name]).to(tensor.device, tensor.dtype)
            if value.shape != tensor.shape or not value.equal(tensor):
                raise LoadingError(
                    f"peft does not read the adapter {folder} as it was saved ({name} has other "
                    "values): pass the PeftModel that was trained, or save what its "
                    "merge_and_unload() returns and pass that folder"
                )


def _check_scales_saved(base: Any, config: Any, folder: Path) -> None:
    """Raise for AdaLoRA on a base in half precision.

    There peft makes the scale of each of its modules (`ranknum`) a float32 parameter that is
    trained, and saves none of them; on a float32 base they stay what they were.

    Raises:
        LoadingError: saying what to give instead.
    """
    half = {p.dtype for p in base.parameters()} & {torch.float16, torch.bfloat16}
    if config.peft_type == "ADALORA" and half:
        raise LoadingError(
            f"the adapter {folder} is AdaLoRA, and on a base in half precision peft trains scales "
            "(ranknum) that it does not save, so that it cannot be read as it was trained: pass "
            "the PeftModel itself, or dtype='float32' if its base was in float32 when it was "
            "trained"
        )


def _unused_note(folder: Path, config: Any, unused: int) -> tuple[str, ...]:
    """Say that an adapter's part for images is left out; raise where its text depends on it.

    Raises:
        LoadingError: for other kinds than LoRA: some draw what they do not store at random, for
            one module after the other, or share it between all.
    """
    if config.peft_type != "LORA":
        raise LoadingError(
            f"the adapter {folder} ({config.peft_type.value}) changes a model of text and images, "
            "and only LoRA's part for the text can be used alone: give the whole model as the base"
        )
    return (
        f"adapter {folder.name} was trained on a model of text and images: its {unused} tensors "
        "for the images are not used",
    )


def _unshare_written(shell: Any, stored: set[str], config: Any) -> None:
    """Give every weight of the base that an adapter file replaces storage of its own.

    Biases (`bias="all"`) and whole embeddings (`save_embedding_layers`) stand in the file beside
    the adapter's own weights, and peft copies them into the model that it is given. Modules of
    `modules_to_save` stand there too, but peft itself makes copies for them, and with
    `ensure_weight_tying` for what is tied to them.
    """
    copied = tuple(getattr(config, "modules_to_save", None) or ())
    own: set[int] = set()
    replaced = {_in_base(key) for key in stored}
    for module_name, module in shell.named_modules():
        if module_name.endswith(copied):  # as peft finds them
            own |= {id(parameter) for parameter in module.parameters()}
            replaced -= {name for name in replaced if name.startswith(f"{module_name}.")}
    keeps_ties = getattr(config, "ensure_weight_tying", False)
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        if keeps_ties and id(parameter) in own:
            continue
        if name in replaced:
            parameter.data = parameter.data.clone()
    for module_name, module in shell.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and f"{module_name}.{name}".lstrip(".") in replaced:
                module._buffers[name] = buffer.clone()


def _unshare_initialised(shell: Any, config: Any) -> None:
    """The same for weights that OLoRA's initialisation changes in place; others replace them."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.peft_type != "LORA" or config.init_lora_weights != "olora":
        return
    for name, module in shell.named_modules():
        if "weight" in module._parameters and check_target_module_exists(config, name):
            module.weight.data = module.weight.data.clone()


def _in_base(key: str) -> str:
    """What a key of an adapter file is called in the base, if it is one of the base's weights."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _check_tokens(shell: Any, config: Any, folder: Path, base_name: str) -> None:
    """Raise where an adapter trained single tokens that the base does not have.

    Raises:
        PairError: with how many it needs.
    """
    given = getattr(config, "trainable_token_indices", None) or ()
    lists = given.values() if isinstance(given, Mapping) else [given]
    needed = 1 + max((index for one in lists for index in one), default=-1)
    rows = token_tables(shell)[0].weight.shape[0]
    if needed > rows:
        raise PairError(
            f"adapter {folder} trained token {needed - 1}, and {base_name} has {rows} tokens: "
            "resize the base as for training (model.resize_token_embeddings), and pass that model "
            "as the base"
        )


def _resize(shell: Any, shapes: dict[str, Any], folder: Path, base_name: str) -> None:
    """Give the base the number of tokens that the adapter was trained with.

    What the adapter does not store of tokens that the base lacks is unknown: it has to store all
    rows of embedding and unembedding, as peft does for models that were resized.

    Raises:
        PairError: if it does not, with both numbers.
    """
    tables = token_tables(shell)
    names = {
        name: module
        for name, module in shell.named_modules()
        if any(module is table for table in tables)
    }
    sizes: dict[str, int] = {}
    whole: set[int] = set()
    for key, shape in shapes.items():
        name, _, weight = _in_base(key).rpartition(".")
        name, weight = (name, weight) if name in names else _of_adapter(name, weight)
        axis = {"weight": 0, "lora_B": 0, "lora_embedding_A": 1}.get(weight)
        if name in names and axis is not None:
            sizes[name] = shape[axis]
            whole |= {id(names[name].weight)} if weight == "weight" else set()
    wanted = {size for name, size in sizes.items() if size != names[name].weight.shape[0]}
    if not wanted:
        return
    size, rows = max(wanted), tables[-1].weight.shape[0]
    if len(wanted) > 1 or (size > rows and any(id(t.weight) not in whole for t in tables)):
        raise PairError(
            f"adapter {folder} was trained with {size} tokens, and {base_name} has {rows}: resize "
            f"the base as for training (model.resize_token_embeddings({size})), and pass that "
            "model as the base"
        )
    resize_tables(shell, size)


def _of_adapter(module: str, weight: str) -> tuple[str, str]:
    """Module and kind of weight of lm_head.lora_B.weight or embed_tokens.lora_embedding_A."""
    if weight != "weight":
        return module, weight
    module, _, kind = module.rpartition(".")
    return module, kind


def check_adapter_kind(*configs: Any) -> None:
    """Raise for adapters whose streams cannot be compared with the base's, text by text.

    Args:
        configs: of every adapter of a model.

    Raises:
        LoadingError: saying why, and what to give instead.
    """
    for config in configs:
        kind = config.peft_type.value
        reason = PROMPT_LEARNING if config.is_prompt_learning else INCOMPARABLE.get(kind)
        if reason is not None:
            raise LoadingError(
                f"{reason}, so streams cannot be compared token by token: give an adapter that "
                "changes weights, such as LoRA"
            )
        if getattr(config, "sample_at_inference", False):
            raise LoadingError(
                f"this {kind} adapter draws at random whenever it is run: set sample_at_inference "
                "to False in its configuration"
            )
        if getattr(config, "coft", False):
            raise LoadingError(
                f"this {kind} adapter changes its own weights whenever it is run (coft=True): fold "
                "it into its base with peft's merge_and_unload, and give that model"
            )


def check_not_injected(model: Any) -> None:
    """Raise for the inside of a PeftModel, which is the tuned model whatever it is passed as.

    `get_peft_model` puts its layers into the model that it is given. (A model with adapters from
    transformers' own `load_adapter` says so, and is a tuned model like any other.)

    Raises:
        LoadingError: if a plain model holds adapter layers that it does not know of.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return
    names = {kind.__name__ for m in model.modules() for kind in type(m).__mro__}
    if "BaseTunerLayer" in names:
        raise LoadingError(
            f"this {type(model).__name__} holds adapter layers: peft changes the model that it is "
            "given. Pass the PeftModel as the tuned model, and load the base anew"
        )
