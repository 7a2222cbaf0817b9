"""Models of text and images: their text is read like any other causal language model's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import token_texts

from hyperlens import compare_models
from hyperlens.errors import LoadingError
from hyperlens.models.sources import open_source

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "bos_token_id": 1,
}
IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> Any:
    """AutoModelForCausalLM opens it whole."""
    config = transformers.Gemma3Config(
        text_config=TEXT | {"sliding_window": 6}, vision_config=IMAGE, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    """AutoModelForCausalLM does not know it."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gemma3, llava])
def test_a_folder_reads_as_the_object(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = make().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.05 * torch.randn_like(weight)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    texts = token_texts(6)
    objects = compare_models(base, tuned, texts, progress=False)
    folders = compare_models(tmp_path / "base", tmp_path / "tuned", texts, progress=False)
    assert str(folders.long) == str(objects.long)  # as text, where NaN is NaN
    # Not by hyperlens: the language model's own hidden states, before the last one.
    tokens = torch.tensor(texts[0])[None]
    with torch.no_grad():
        streams = [
            model(input_ids=tokens, output_hidden_states=True).hidden_states[1][0, 1:].double()
            for model in (base, tuned)
        ]
    one = compare_models(base, tuned, texts[:1], probes=["drift"], progress=False)
    by_hand = (streams[1] - streams[0]).norm(dim=-1).mean()
    assert one.value("drift", "l2", 1, "raw") == pytest.approx(float(by_hand), rel=1e-5)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match="encoder-decoder"):
        open_source(tmp_path)
