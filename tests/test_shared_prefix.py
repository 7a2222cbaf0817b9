"""What two models have in common is run once, and no number changes by it."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, lora, make_tiny, perturbed, short, token_texts

from hyperlens import compare_models, open_pair
from hyperlens.passes import contexts, streaming
from hyperlens.passes.shared_prefix import find_shared_prefix, shared_on
from hyperlens.passes.streams import NOTHING_SHARED, SharedPrefix
from hyperlens.probes import MeanProbe

TEXTS = token_texts(6, shortest=6, longest=20)


def late(name: str, first: int = 2):
    """A base, and a copy of it with other weights in its blocks from `first` on."""
    base = make_tiny(name)
    tuned = copy.deepcopy(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for block in blocks_of(tuned)[first:]:
            for parameter in block.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return base, tuned


def blocks_of(model):
    return open_pair(model, model).base.hooked.structure.blocks


def shared(base, tuned) -> SharedPrefix:
    pair = open_pair(base, tuned)
    return shared_on(pair.base.hooked, pair.tuned.hooked, TEXTS[0])


def frames(base, tuned, monkeypatch, **options):
    """A comparison as it is made, and with both models run whole."""
    ours = compare_models(base, tuned, TEXTS, progress=False, batch_size=4, **options)
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "shared_on", lambda *args: NOTHING_SHARED)
        whole = compare_models(base, tuned, TEXTS, progress=False, batch_size=4, **options)
    assert not any("run once" in note for note in whole.meta["notes"])
    return ours, whole


@pytest.mark.parametrize("name", short(ARCHITECTURES, "gemma2", "gpt2"))
def test_no_number_changes(name, monkeypatch) -> None:
    base, tuned = late(name)
    assert shared(base, tuned) == SharedPrefix(3, True, True, True)
    ours, whole = frames(base, tuned, monkeypatch)
    assert ours.to_frame().equals(whole.to_frame())
    assert any("the first 2 blocks and the embedding" in note for note in ours.meta["notes"])


def test_an_adapter_on_the_last_block(monkeypatch, tmp_path) -> None:
    base = make_tiny("llama")
    tuned = lora(copy.deepcopy(base), "llama", layers_to_transform=[2])
    tuned.save_pretrained(tmp_path / "adapter")
    for source in (tuned, tmp_path / "adapter"):
        assert shared(base, source) == SharedPrefix(3, True, True, True)
        ours, whole = frames(base, source, monkeypatch)
        assert ours.to_frame().equals(whole.to_frame())


def test_shared_blocks_run_for_the_base_alone() -> None:
    pair = open_pair(*late("llama"))
    corpus = pair.tokenize(TEXTS)
    found = shared_on(pair.base.hooked, pair.tuned.hooked, TEXTS[0])
    runs: dict[str, int] = {}
    for side, model in (("base", pair.base.hooked), ("tuned", pair.tuned.hooked)):
        for i, block in enumerate(model.structure.blocks):
            name = f"{side} {i}"
            attention = block.self_attn
            runs[name] = 0

            def count(*args, name=name) -> None:
                runs[name] += 1

            attention.register_forward_hook(count)
    for batch in corpus.batches(2):
        streaming.read_pair(
            pair.base.hooked, pair.tuned.hooked, batch, 10.0, torch.device("cpu"), found
        )
    n = len(list(corpus.batches(2)))
    assert runs == {
        **{f"base {i}": n for i in range(3)},
        "tuned 0": 0,
        "tuned 1": 0,
        "tuned 2": n,
    }


def test_parts_are_told_apart() -> None:
    base = make_tiny("llama", tie_word_embeddings=False)
    assert shared(base, base) == SharedPrefix(4, True, True, True)
    assert shared(base, perturbed(base)) == NOTHING_SHARED
    for change, expected in (
        (lambda m: m.lm_head.weight, SharedPrefix(4, True, True, False)),
        (lambda m: m.model.norm.weight, SharedPrefix(4, True, False, True)),
        (lambda m: m.model.layers[1].mlp.up_proj.weight, SharedPrefix(2, True, True, True)),
        (lambda m: m.model.layers[0].mlp.up_proj.weight, SharedPrefix(1, False, True, True)),
        (lambda m: m.model.embed_tokens.weight, SharedPrefix(0, False, True, True)),
    ):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            change(tuned)[0] += 0.1
        assert shared(base, tuned) == expected


@pytest.mark.parametrize("part", ["lm_head", "model.norm"])
def test_a_change_behind_all_blocks(part, monkeypatch) -> None:
    base = make_tiny("llama", tie_word_embeddings=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_submodule(part).weight.mul_(1.1)
    ours, whole = frames(base, tuned, monkeypatch)
    assert ours.to_frame().equals(whole.to_frame())


def test_what_is_not_in_the_weights_is_seen_on_the_text() -> None:
    base, tuned = late("llama")
    tuned.model.layers[0].self_attn.scaling *= 2
    pair = open_pair(base, tuned)
    assert find_shared_prefix(pair.base.hooked, pair.tuned.hooked).layers == 3
    assert shared(base, tuned) == SharedPrefix(1, False, True, True)


def test_a_block_with_a_hook_is_not_the_same() -> None:
    base, tuned = late("llama")
    attention = tuned.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, output: None)
    assert shared(base, tuned) == SharedPrefix(2, True, True, True)


def test_another_configuration_shares_nothing() -> None:
    base = make_tiny("llama")
    tuned = make_tiny("llama", rope_theta=500.0)
    tuned.load_state_dict(base.state_dict())
    assert shared(base, tuned) == NOTHING_SHARED


def test_a_model_that_cannot_be_resumed_is_run_whole(monkeypatch) -> None:
    base, tuned = late("llama")
    pair = open_pair(base, tuned)
    layers = streaming.surface.run_layers

    def off(*args, resume=None):
        found = layers(*args, resume=resume)
        return found if resume is None else [x + 1e-6 for x in found]

    monkeypatch.setattr(
        streaming.surface, "run_layers", lambda *args: off(*args[:4], resume=(*args, None)[4])
    )
    assert shared(base, tuned) == SharedPrefix(3, False, True, True)
    assert find_shared_prefix(pair.base.hooked, pair.tuned.hooked).blocks == 0


def test_other_hooked_models_share_nothing() -> None:
    base, tuned = late("llama")
    pair = open_pair(base, tuned, backend="bridge")
    assert find_shared_prefix(pair.base.hooked, pair.tuned.hooked) == NOTHING_SHARED


def test_contexts_are_those_of_whole_passes(monkeypatch) -> None:
    pair = open_pair(*late("llama"))
    corpus = pair.tokenize(TEXTS)
    models = pair.base.hooked, pair.tuned.hooked
    ours = contexts.read_contexts(*models, corpus, 4, False)
    monkeypatch.setattr(contexts, "shared_on", lambda *args: NOTHING_SHARED)
    whole = contexts.read_contexts(*models, corpus, 4, False)
    assert torch.equal(ours.base, whole.base)
    assert torch.equal(ours.tuned, whole.tuned)


class Overwrites(MeanProbe):
    """Changes the vectors that it is given."""

    name = "overwrites"
    metrics = ("gap",)

    def measure(self, pair, layer, view):
        base, tuned = pair.vectors(layer, view)
        before = tuned.clone()
        base.add_(1.0)
        return {"gap": (tuned - before).abs().sum(-1)}


def test_a_probe_may_change_what_it_is_given() -> None:
    found = compare_models(*late("llama"), TEXTS, probes=[Overwrites()], progress=False)
    assert set(found.to_frame().value) == {0.0}
