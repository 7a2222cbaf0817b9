"""Models of text and images: their text is read like any other causal language model's."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import short, token_texts
from safetensors.torch import load_file, save_file

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


# Adapters trained on a model of text and images, or on its language model alone


def language_model(whole: Any) -> Any:
    """The text of a model of text and images, as a model of its own with the same weights."""
    alone = transformers.AutoModelForCausalLM.from_config(whole.config.get_text_config()).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    return alone


def save_adapter(base: Any, config: Any, folder: Path) -> Any:
    """An adapter with every trainable weight moved, on a copy of the base; also saved."""
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(folder)
    return adapted


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23).view(2, 10), use_cache=False).logits  # type: ignore[no-any-return]


# Names that the images' part has too, a pattern that spells the place out, and whole modules.
TRAINED = [
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}},
    {"target_modules": "all-linear"},
    {"target_modules": r"model\.(language_model\.)?layers\.1\..*_proj"},
    {"target_modules": ["down_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]},
]


PLACES = [(make, number) for make in (gemma3, llava) for number in range(len(TRAINED))]


@pytest.mark.parametrize(("make", "number"), short(PLACES, (gemma3, 0), (llava, 2), (llava, 3)))
@pytest.mark.filterwarnings("ignore")
def test_adapters_go_with_the_language_model(make: Any, number: int, tmp_path: Path) -> None:
    options: dict[str, Any] = TRAINED[number]
    torch.manual_seed(0)
    whole = make().eval()
    alone = language_model(whole)
    assert torch.equal(logits(whole), logits(alone))
    for trained_on, other in ((whole, alone), (alone, whole)):
        folder = tmp_path / type(trained_on).__name__
        adapted = save_adapter(trained_on, peft.LoraConfig(r=2, **options), folder)
        before = copy.deepcopy(other.state_dict())
        opened = open_source(folder, base=open_source(other))
        torch.testing.assert_close(logits(opened.model), logits(adapted))
        assert not torch.allclose(logits(adapted), logits(other), atol=1e-2)
        assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
        images = sum(
            "language_model" not in name and "lm_head" not in name
            for name in load_file(folder / "adapter_model.safetensors")
        )
        left_out = [note for note in opened.notes if "for the images" in note]
        assert len(left_out) == bool(other is alone and images)
        assert all(f"its {images} tensors" in note for note in left_out)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_before_transformers_4_52(tmp_path: Path) -> None:
    """The language model's names began with another part then."""
    torch.manual_seed(0)
    whole = llava().eval()
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj|lm_head")
    adapted = save_adapter(whole, config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {
        key.replace("model.language_model.", "language_model.model.").replace(
            "model.lm_head", "model.language_model.lm_head"
        ): weight
        for key, weight in load_file(file).items()
    }
    # The pattern fits both; lm_head had its own name.
    config.target_modules = r".*language_model.*q_proj|.*lm_head"
    config.save_pretrained(str(tmp_path))
    save_file(renamed, file)
    for base in (whole, language_model(whole)):
        opened = open_source(tmp_path, base=open_source(base))
        torch.testing.assert_close(logits(opened.model), logits(adapted))


@pytest.mark.filterwarnings("ignore")
def test_what_depends_on_the_images_cannot_be_used_alone(tmp_path: Path) -> None:
    """VeRA's random directions are shared by all modules, and as wide as the widest."""
    torch.manual_seed(0)
    whole = gemma3().eval()
    save_adapter(whole, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(
        LoadingError, match=r"only LoRA's part for the text .* give the whole model"
    ):
        open_source(tmp_path, base=open_source(language_model(whole)))
