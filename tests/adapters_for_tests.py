"""Every method of the installed peft that acts on a causal LM, with each of its options.

The cells come from peft's own registry: a method or an option that a new peft brings fails
`test_nothing_of_peft_is_new` until it is placed here. Each cell is an adapter on a tiny Llama with
every trainable weight moved. As a folder, as an object and merged it must read as plain peft reads
it, or be refused in one line; the caller's models stay as they are, no weight of the base is held
twice, and two calls agree.

`python tests/adapters_for_tests.py FILE` runs all cells, one line of JSON each, and prints
docs/adapters.md; cells that are in FILE are not run again.
"""

import copy
import dataclasses
import enum
import functools
import itertools
import json
import re
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import config as lora_config
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import AutoModelForCausalLM

from hyperlens.errors import HyperlensError
from hyperlens.hooks.loading import hook
from hyperlens.models.sources import open_source
from hyperlens.models.weight_sharing import converted, weight_sharing_copy
from hyperlens.training import merge

CONFIGS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TARGETS = ["q_proj", "v_proj", "down_proj"]
# What each method needs to fit a model of this size, beside TARGETS and rank 4.
METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 8, "target_modules": ["q_proj", "v_proj"]},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 8},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {"alpha": 8},
    "HIRA": {},
    "HRA": {},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": {},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {},
    "LOKR": {},
    "LORA": {},
    "MISS": {},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "PEANUT": {},
    "POLY": {},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {},
    "PVERA": {"target_modules": ["q_proj", "o_proj"]},
    "P_TUNING": {"num_virtual_tokens": 4},
    "RANDLORA": {},
    "ROAD": {"group_size": 4},
    "SHADOW": {"target_modules": None},
    "SHIRA": {},
    "SUPERTUNING": {"r": None, "sparsity": 0.9},
    "TINYLORA": {"u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5], "target_modules": ["embed_tokens"]},
    "UNILORA": {"theta_d_length": 16},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "VERA": {"target_modules": ["q_proj", "o_proj"]},
    "WAVEFT": {"n_frequency": 8},
    "XLORA": {},
}
# Flags and choices are varied by themselves; a number only where another one is another method.
VALUES: dict[str, list[Any]] = {
    "target_modules": [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]],
    "exclude_modules": [["v_proj"]],
    "modules_to_save": [["lm_head"], ["norm"], ["mlp"]],
    "layers_to_transform": [[1]],
    "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"v_proj": 3}],
    "lambda_pattern": [{"v_proj": 3}],
    "block_size_pattern": [{"v_proj": 4}],
    "n_frequency_pattern": [{"v_proj": 4}],
    "feedforward_modules": [[]],
    "trainable_token_indices": [[3, 4, 5], {"lm_head": [3, 4], "embed_tokens": [3, 4]}],
    "target_parameters": [["mlp.up_proj.weight"], ["mlp.up_proj.weight", "mlp.gate_proj.weight"]],
    "layer_replication": [[(0, 2), (1, 3)]],
    "alora_invocation_tokens": [[5, 6]],
    "use_bdlora": [
        lora_config.BdLoraConfig(
            target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"], nblocks=2
        )
    ],
    "kasa_config": [lora_config.KasaConfig()],
    "velora_config": [lora_config.VeloraConfig()],
    "monteclora_config": [lora_config.MontecloraConfig()],
    "init_lora_weights": ["pissa", "pissa_niter_2", "lora_ga"],
    "bias": ["all", "*_only"],
    "token_indices": [[60]],
    "act_fn": ["tanh"],
    "wavelet_family": ["db2"],
    "boft_n_butterfly_factor": [2],
    "depth": [1],
    "hybrid_r": [2],
    "mini_r": [2],
    "random_seed": [1],
    "stride_A": [2],
    "weight_tying": [1.0],
}
LORA_VALUES: dict[str, list[Any]] = {
    "target_modules": ["all-linear", ["embed_tokens", "lm_head"]],
    "modules_to_save": [["embed_tokens"], ["embed_tokens", "lm_head"], ["input_layernorm"]],
}
# Options that only come with another one, act at training alone, or need what is not here.
NOT_VARIED = {
    "with another option": (
        "layers_pattern loftq_config eva_config corda_config lora_ga_config runtime_config"
    ),
    "of prompt tuning, which is refused": (
        "cpt_token_ids cpt_mask cpt_tokens_type_mask tokenizer_name_or_path tokenizer_kwargs "
        "prompt_tuning_init_text prompt_tuning_init_state_dict_path"
    ),
    "another library, or several adapters": (
        "megatron_config megatron_core shadow_model adapters arrow_config"
    ),
    "computed": "target_svd_config",
}
# Options that act on each other.
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "LORA": [
        {"use_dora": True, "use_rslora": True},
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
        {"ensure_weight_tying": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"ensure_weight_tying": True, "trainable_token_indices": [3, 4]},
        {"init_lora_weights": "pissa", "target_modules": ["q_proj", "lm_head"]},
        {"init_lora_weights": "pissa", "layer_replication": [(0, 2), (1, 3)]},
    ],
    "MISS": [{"init_weights": "mini", "mini_r": 2}],
    "BEFT": [{"target_modules": ["q_proj", "v_proj"]}],
}
OF_PEFT = {field.name for field in dataclasses.fields(peft.PeftConfig)}
TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 5, 6, 17, 18, 60, 20, 21, 22]])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference of logits as a share of the largest: as opened, and merged.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (3e-2, 0.1)}


class Cell(NamedTuple):
    """An adapter by what it was configured with, on a base by its tie and dtype."""

    method: str
    options: str
    tied: bool
    dtype: str

    @property
    def name(self) -> str:
        tie = "tied" if self.tied else "untied"
        return " ".join(part for part in (self.method, self.options, tie, self.dtype) if part)


def leaves(hint: Any) -> list[Any]:
    """The members of a union, at any depth."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [leaf for member in typing.get_args(hint) for leaf in leaves(member)]
    return [hint]


def choices(hint: Any) -> list[Any] | None:
    """All values of an option by its type; None where it does not tell."""
    found: list[Any] = []
    numbers = True
    for leaf in leaves(hint):
        if leaf is bool:
            found += [True, False]
        elif typing.get_origin(leaf) is Literal:
            found += [value for value in typing.get_args(leaf) if "[" not in str(value)]
        elif isinstance(leaf, type) and issubclass(leaf, enum.Enum):
            found += [member.value for member in leaf]
        elif leaf not in (int, float, type(None)):
            numbers = False
    return found if found or numbers else None


def variations(method: str) -> Iterator[dict[str, Any]]:
    """The options of a method, each with every other value than its default."""
    yield {}
    hints = typing.get_type_hints(CONFIGS[method])
    for field in dataclasses.fields(CONFIGS[method]):
        if field.name in OF_PEFT:
            continue
        values = VALUES.get(field.name, []) + (choices(hints[field.name]) or [])
        if method == "LORA":
            values = values + LORA_VALUES.get(field.name, [])
        seen: list[Any] = [field.default, METHODS[method].get(field.name)]
        for value in values:
            if value == "*_only":
                value = f"{PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType(method)]}only"
            if not any(
                value is other or (value == other and type(value) is type(other)) for other in seen
            ):
                seen.append(value)
                yield {field.name: value}
    yield from TOGETHER.get(method, [])


def fitted(method: str) -> dict[str, Any]:
    """What a configuration of the method needs here."""
    names = {field.name for field in dataclasses.fields(CONFIGS[method])}
    common = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return {name: value for name, value in common.items() if name in names} | METHODS[method]


def spelled(options: dict[str, Any]) -> str:
    def short_form(value: Any) -> str:
        return type(value).__name__ if dataclasses.is_dataclass(value) else str(value)

    return ", ".join(f"{name}={short_form(value)}" for name, value in options.items())


VARIATIONS = {
    method: {spelled(options): options for options in variations(method)}
    for method in sorted(CONFIGS.keys() & METHODS.keys())
}
CELLS = [
    Cell(method, options, tied, dtype)
    for method in VARIATIONS
    for options in VARIATIONS[method]
    for tied in (True, False)
    for dtype in DTYPES
]


@functools.cache
def base_of(tied: bool, dtype: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model.to(DTYPES[dtype])


def trained(base: Any, config: Any) -> Any:
    """The adapter on a base of its own, with every trainable weight moved."""
    by = getattr(config, "init_lora_weights", None)
    if by == "corda":
        config.corda_config = lora_config.CordaConfig()
        preprocess_corda(base, config, run_model=lambda: base(input_ids=TOKENS[:1]))
    elif by == "lora_ga":
        config.lora_ga_config = lora_config.LoraGAConfig()
        step = lambda: base(input_ids=TOKENS, labels=TOKENS).loss.backward()  # noqa: E731
        preprocess_loraga(base, config, step)
        base.zero_grad()
    elif by == "eva":
        config.eva_config = lora_config.EvaConfig()
    model = peft.get_peft_model(base, config)
    if by == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": TOKENS}] * 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.nan_to_num_(0).clamp_(-99, 99)  # TinyLoRA may leave memory as it was
                weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()  # type: ignore[no-any-return]


def gap(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape:
        return float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max())


def state(model: Any) -> dict[str, Any]:
    return {name: (weight.dtype, weight.clone()) for name, weight in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Any]) -> bool:
    after = state(model)
    return before.keys() == after.keys() and all(
        after[name][0] == dtype and torch.allclose(after[name][1], weight, 0, 0, equal_nan=True)
        for name, (dtype, weight) in before.items()
    )


def verdict(
    read: Callable[[], torch.Tensor], again: Callable[[], torch.Tensor], wanted: Any, most: float
) -> str:
    """ "right", or in words: refused in one line, wrong, or an error that is no answer."""
    try:
        both = read(), again()
    except HyperlensError as error:
        return ("refused: " if "\n" not in str(error) else "error: lines: ") + str(error)
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    difference = max(gap(logits, wanted) for logits in both)
    return "right" if difference <= most else f"wrong: logits differ by {difference:.2g}"


def own_tensors(model: Any, other: Any) -> list[torch.Tensor]:
    """What a model holds that does not lie in the storage of the other one."""
    shared = {tensor.untyped_storage().data_ptr() for tensor in held(other)}
    return [tensor for tensor in held(model) if tensor.untyped_storage().data_ptr() not in shared]


def held(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def second_copies(opened: Any, base: Any) -> bool:
    """Whether a weight of the base is held twice."""
    return any(
        tensor.shape == weight.shape and torch.equal(tensor, weight)
        for tensor in own_tensors(opened, base)
        for weight in base.parameters()
    )


def hooked(opened: Any) -> torch.Tensor:
    model = hook(opened, "residual").hooked
    return model.run_with_hooks(TOKENS, return_type="logits", fwd_hooks=[]).float()


def merged(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


@functools.cache
def outcome(cell: Cell) -> dict[str, str]:
    """What becomes of an adapter as "folder", "object" and "merged"; or "unmade" and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _outcome(cell)


def _outcome(cell: Cell) -> dict[str, str]:
    base = base_of(cell.tied, cell.dtype)
    before, config_before = state(base), base.config.to_dict()
    try:
        options = fitted(cell.method) | VARIATIONS[cell.method][cell.options]
        if options.get("init_lora_weights") == "loftq":
            options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
        model = trained(copy.deepcopy(base), CONFIGS[cell.method](**copy.deepcopy(options)))
    except Exception as error:
        return {"unmade": f"{type(error).__name__}: {error}"}
    try:
        wanted = logits(model)
    except Exception:  # nothing is right then
        wanted = torch.zeros(0)
    if not bool(wanted.isfinite().all()):
        return {"unmade": "its logits are not finite"}
    opening, merging = TOLERANCE[cell.dtype]
    merging = max(merging, rounding(model, wanted))
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "adapter")
        saving = ""
        try:
            model.save_pretrained(folder, save_embedding_layers=False)
        except Exception as error:
            saving = f"saving: {type(error).__name__}: {error}"
        model_before = state(model)
        found = {"object": opened_as(lambda: open_source(model), wanted, opening, model)}
        if saving:
            return found | {"unmade": saving}
        found["folder"] = opened_as(
            lambda: open_source(folder, base=open_source(base)), wanted, opening, base
        )
        # A second call from the folder, where it can be read.
        sources = [(model, None), (folder, base) if found["folder"] == "right" else (model, None)]
        first, second = (
            lambda i=i, source=source, under=under: merged(
                merge(source, Path(home, str(i)), base=under)
            )
            for i, (source, under) in enumerate(sources)
        )
        found["merged"] = verdict(first, second, wanted, merging)
    if not unchanged(base, before) or base.config.to_dict() != config_before:
        found["base"] = "wrong: changed"
    if not unchanged(model, model_before):
        found["model"] = "wrong: changed"
    return found


def rounding(model: Any, wanted: torch.Tensor) -> float:
    """How far half precision itself is off: much, where an adapter is much larger than its base."""
    try:
        wide = converted(weight_sharing_copy(model), None, torch.float32)
        return gap(wanted, logits(wide))
    except Exception:  # what cannot be copied, or does not run, or not in another dtype
        return 0.0


def opened_as(read: Callable[[], Any], wanted: torch.Tensor, most: float, source: Any) -> str:
    """The verdict on an adapter hooked, and opened once more; also on what it holds in memory."""
    seen: list[torch.Tensor] = []

    def plain() -> torch.Tensor:
        opened = read()
        seen.extend(logits(opened.model) for _ in range(2))
        seen.append(torch.tensor(second_copies(opened.model, source)))
        return seen[0]

    answer = verdict(lambda: hooked(read()), plain, wanted, most)
    if answer == "right" and not torch.equal(seen[0], seen[1]):
        return "wrong: two calls differ"
    return "wrong: a weight is held twice" if answer == "right" and seen[2] else answer


REASON = re.compile(r"refused: (?:this adapter cannot be merged into its base \((.*)\); use|(.*))")
FORMS = ("object", "folder", "merged")
# More options than these are given by their methods alone.
MOST_NAMED = 12
INTRODUCTION = """\
# Which adapters are read?

Every method of peft {peft} that acts on a causal LM, with each value of each of its options, on a
tiny Llama with every trainable weight moved. Each is passed as the PeftModel, read from its
folder, and merged into a folder that is opened anew. `right`: logits are those of plain peft, in
float32 to 1e-4 of the largest (merged 1e-3), in bfloat16 to 3e-2 (merged 0.1, or what the adapter
in bfloat16 is off by from itself in float32, where that is more); the same in a second call; the
caller's models are unchanged, and no weight of the base is held twice. Everything else is refused
in one line. Made by `python tests/adapters_for_tests.py FILE`; `make test-long` runs all of it,
and the numbers here say how many were run for this page: the first options of every method, in
turn.

The numbers in the second table are of options read right: as object / from a folder / merged, of
those that peft makes.
"""


def in_turn() -> list[Cell]:
    """All cells, the first ones of every method first, so that any beginning is a sample of all."""
    bases = itertools.product((False, True), ("bfloat16", "float32"))
    rows = [
        [Cell(method, options, *base) for options in VARIATIONS[method]]
        for base in bases
        for method in VARIATIONS
    ]
    return [cell for cells in itertools.zip_longest(*rows) for cell in cells if cell is not None]


def run(file: Path) -> dict[Cell, dict[str, str]]:
    """What becomes of every cell, read from a file or found and added to it."""
    known = {}
    if file.exists():
        for line in file.read_text().splitlines():
            *cell, found = json.loads(line)
            known[Cell(*cell)] = found
    for cell in in_turn():
        if cell not in known:
            known[cell] = outcome(cell)
            with file.open("a") as lines:
                lines.write(json.dumps([*cell, known[cell]]) + "\n")
    return known


BASES = [(tied, dtype) for dtype in DTYPES for tied in (False, True)]


def page(known: dict[Cell, dict[str, str]]) -> str:
    """The content of docs/adapters.md."""
    lines = [INTRODUCTION.format(peft=peft.__version__)]
    lines += ["| base | tried | right | refused in some form | not to be made by peft | wrong |"]
    lines += ["|---|---|---|---|---|---|"]
    for base in BASES:
        lines.append(counts(base, [known[cell] for cell in known if cell[2:] == base]))
    bases = " | ".join(base_name(*base) for base in BASES)
    lines += ["", f"| method | options | {bases} |", "|---|---|" + "---|" * len(BASES)]
    for method, options in VARIATIONS.items():
        shares = [
            share([known[cell] for cell in known if (cell.method, *cell[2:]) == (method, *base)])
            for base in BASES
        ]
        lines.append(f"| {method} | {len(options)} | {' | '.join(shares)} |")
    lines += ["", "Why, and with which options:", "", *reasons(known)]
    return "\n".join(lines)


def base_name(tied: bool, dtype: str) -> str:
    return f"{dtype}, {'tied' if tied else 'untied'}"


def counts(base: tuple[bool, str], found: list[dict[str, str]]) -> str:
    """Of one base, how many cells end in which way."""
    total = sum((cell.tied, cell.dtype) == base for cell in CELLS)
    unmade = sum("unmade" in answers for answers in found)
    made = [list(answers.values()) for answers in found if "unmade" not in answers]
    wrong = sum(any(not a.startswith(("right", "refused")) for a in answers) for answers in made)
    refused = sum(any(a.startswith("refused") for a in answers) for answers in made)
    right = len(made) - refused - wrong
    return (
        f"| {base_name(*base)} | {len(found)} of {total} | {right} | {refused} | {unmade} "
        f"| {wrong} |"
    )


def share(found: list[dict[str, str]]) -> str:
    """Of one method on one base, how many options are read right in each form."""
    made = [answers for answers in found if "unmade" not in answers]
    if not made:
        return "not made" if found else "not tried"
    right = [sum(answers.get(form) == "right" for answers in made) for form in FORMS]
    return f"{' / '.join(map(str, right))} of {len(made)}"


def reasons(known: dict[Cell, dict[str, str]]) -> list[str]:
    """Each reason to refuse something, and the adapters that it is given for."""
    by_reason: dict[str, list[str]] = {}
    forms: dict[str, list[str]] = {}
    for cell, answers in known.items():
        for form, answer in answers.items():
            match = REASON.match(answer)
            if match is not None:
                reason = re.sub(r"(adapter )\S*/\S*", r"\1…", match[1] or match[2])
                reason = re.sub(r"\d+(\.\d+)?(e-?\d+)?( of the largest|% of)", r"…\3", reason)
                label = f"`{cell.method} {cell.options}`".replace(" `", "`")
                by_reason.setdefault(reason, []).append(label)
                forms.setdefault(reason, []).append(form)
    lines = []
    for reason, labels in sorted(by_reason.items()):
        methods = sorted({label.strip("`").split()[0] for label in labels})
        named = sorted(dict.fromkeys(labels))
        shown = ", ".join(named) if len(named) <= MOST_NAMED else ", ".join(methods)
        lines.append(f"- {', '.join(dict.fromkeys(forms[reason]))}: {reason}: {shown}")
    return lines


if __name__ == "__main__":
    print(page(run(Path(sys.argv[1]))))
