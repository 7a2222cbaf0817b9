"""Every causal LM of the installed transformers, tiny, held against plain forward hooks.

`python tests/architectures_for_tests.py` prints the table of docs/architectures.md.
"""

import signal
import sys
import tempfile
from collections import Counter

import peft
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hyperlens import HyperlensError, load_hooked, open_pair
from hyperlens.hooks import surface

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Given to every configuration that knows the name. One table for all: sizes must only fit.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_attention_heads_sliding"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "chunk_size"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_chunk_size", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim", "rotary_dim"), 4),
    **dict.fromkeys(("linear_num_value_heads", "time_step_rank"), 4),
    **dict.fromkeys(("expand", "mamba_expand", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "vocab_size": 61,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mamba_n_heads": 8,
    "num_kv_shared_layers": 0,
    "image_size": 32,
    "patch_size": 16,
}
# Heads of latent attention are all of one kind.
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
OWN = {
    "bart": {"is_decoder": True},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global"], 2], [["local"], 1]], "window_size": 8},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS | {"moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": HEADS,
    "nemotron": HEADS,
    "reformer": {"is_decoder": True},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}
MOST_PARAMETERS = 2 * 10**7
SECONDS = 240

# Of the page: dtype, and in which form a model is given.
COLUMNS = {
    "float32": (torch.float32, "object"),
    "bfloat16": (torch.bfloat16, "object"),
    "folder": (torch.float32, "folder"),
    "adapter": (torch.float32, "adapter"),
}


def tiny_config(kind: str) -> PretrainedConfig:
    """A configuration of this kind with small sizes, inner ones too."""
    default = CONFIG_MAPPING[kind]()
    inner = {
        name: _sizes(value) | {"model_type": value.model_type}
        for name, value in vars(default).items()
        if isinstance(value, PretrainedConfig)
    }
    return type(default)(**(_sizes(default) | inner | OWN.get(kind, {})))


def _sizes(config: PretrainedConfig) -> dict[str, object]:
    known = {name: size for name, size in SIZES.items() if _takes(config, name)}
    return known | (
        {k: v for k, v in LATENT.items() if k in known} if "kv_lora_rank" in known else {}
    )


def _takes(config: PretrainedConfig, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return getattr(config, name, None) is not None
    except AttributeError:  # a size that differs between layers
        return True


def make(kind: str, dtype: torch.dtype = torch.float32):
    """A random model of this kind.

    Raises:
        ValueError: if it cannot be tiny.
    """
    config = tiny_config(kind)
    torch.manual_seed(0)
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > MOST_PARAMETERS:
        raise ValueError(f"has {n:,} parameters at these sizes")
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def outcome(kind: str, dtype: torch.dtype = torch.float32, form: str = "object") -> tuple[str, str]:
    """What becomes of a model of this kind: "right", "refused", "wrong" or "not tried", and why.

    Its form is the object itself, a folder that transformers saved, or the folder of a LoRA adapter
    that peft saved, which is put on the object.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = make(kind, dtype)
            plain = adapted(model) if form == "adapter" else model
            if form != "object":
                plain.save_pretrained(folder)
            tokens, mask = torch.randint(3, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
            expected = plainly_read(plain, tokens, mask)
        except Exception as error:
            return "not tried", f"{type(error).__name__}: {first(error)}"
        try:
            if form == "adapter":  # peft has changed the other one's modules
                hooked = open_pair(make(kind, dtype), folder).tuned.hooked
            else:
                hooked = load_hooked(model if form == "object" else folder, backend="residual")
        except HyperlensError as error:
            return "refused", first(error).replace(folder, "FOLDER")
    return compared(hooked, expected, tokens, mask, 1e-4 if dtype == torch.float32 else 0.02)


def adapted(model):
    """LoRA with numbers of its own on all linear layers."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def compared(hooked, expected, tokens, mask, allowed: float) -> tuple[str, str]:
    """Whether a hooked model reads what plain hooks have read."""
    with torch.no_grad():
        stream = surface.run_residuals(hooked, tokens, mask)
        logits = surface.float_logits(hooked, surface.final_norm(hooked, stream[-1].flatten(0, 1)))
    candidates, own = expected
    if far(logits.view(own.shape), own) > allowed:
        return "wrong", f"logits differ by {far(logits.view(own.shape), own):.1e}"
    off = min(max(map(far, stream[1:], outputs)) for outputs in candidates)
    return ("right", "") if off <= allowed else ("wrong", f"resid_post differs by {off:.1e}")


def plainly_read(model, tokens, mask):
    """Outputs of every list of as many modules as there are blocks, by forward hooks; logits."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    seen = [{} for _ in lists]

    def keep(at, i):
        def hook(module, args, output):
            seen[at][i] = (output[0] if isinstance(output, tuple | list) else output).clone()

        return hook

    handles = [
        block.register_forward_hook(keep(at, i))
        for at, blocks in enumerate(lists)
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    shape = (*tokens.shape, model.config.get_text_config().hidden_size)
    whole = [[by[i] for i in range(n)] for by in seen if len(by) == n]
    found = [outputs for outputs in whole if all(x.shape == shape for x in outputs)]
    if not found:
        raise ValueError("no list of blocks that return the stream")
    return found, logits


def far(a, b) -> float:
    """The largest difference, relative to the largest number."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def first(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def table() -> None:
    """Print the page: counts, then every kind."""

    def too_slow(*_):
        raise TimeoutError(f"takes more than {SECONDS} s at these sizes")

    signal.signal(signal.SIGALRM, too_slow)
    rows = []
    for kind in KINDS:
        signal.alarm(SECONDS)
        try:
            found = [outcome(kind, *column) for column in COLUMNS.values()]
        except TimeoutError as error:
            found = [("not tried", str(error))] * len(COLUMNS)
        signal.alarm(0)
        rows.append((kind, *found))
        print(kind, *found, file=sys.stderr)
    for i, which in enumerate(COLUMNS, 1):
        counts = Counter(row[i][0] for row in rows)
        print(f"{which}: " + ", ".join(f"{n} {status}" for status, n in counts.most_common()))
    print(f"\n| `model_type` | {' | '.join(COLUMNS)} | why |\n|{'---|' * (len(COLUMNS) + 2)}")
    for kind, *found in rows:
        reason = next((why for _, why in found if why), "").replace("|", "\\|")
        print(f"| `{kind}` | {' | '.join(status for status, _ in found)} | {reason} |")


if __name__ == "__main__":
    table()
