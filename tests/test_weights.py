"""What fine-tuning did to each weight matrix: against dense SVDs, planted changes, all sources."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SIZES, lora, make_tiny, perturbed
from peft import LoHaConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from hyperlens import cli, compare_weights, open_pair
from hyperlens.errors import ArgumentError, HyperlensError, LoadingError, PairError
from hyperlens.experiments import WeightChangesResult
from hyperlens.experiments.weights import against
from hyperlens.models.weight_pairs import block_of, read_weight_pairs
from hyperlens.statistics import matrices as maths
from hyperlens.training import merge

QUICK = {"k": 4, "n_controls": 2, "progress": False}


def double(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def frame(d, k, seed=0):
    return torch.linalg.qr(double(d, k, seed=seed)).Q


def numbers(result):
    """The numbers of every module, by its name."""
    skipped = {"module", "kind", "block"}
    return {
        row["module"]: {k: v for k, v in row.items() if k not in skipped} for row in result.table
    }


def assert_same(first, second, tolerance=1e-4):
    first, second = numbers(first), numbers(second)
    assert first.keys() == second.keys()
    for module, row in first.items():
        for metric, value in row.items():
            assert second[module][metric] == pytest.approx(
                value, rel=tolerance, abs=tolerance, nan_ok=True
            ), (module, metric)


# Maths


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (7, 7)])
def test_spectra_are_those_of_a_dense_svd(shape) -> None:
    matrix = double(*shape).float()
    found = maths.singular(matrix)
    expected = torch.linalg.svdvals(matrix.double())
    assert (found.values - expected).abs().max() <= 1e-5 * expected[0]
    assert torch.allclose(found.matrix(), matrix.double())


def test_a_product_is_decomposed_without_being_formed() -> None:
    out, into = double(20, 3), double(3, 50, seed=1)
    found, expected = maths.singular_of_product(out, into), torch.linalg.svdvals(out @ into)
    assert len(found.values) == 3
    assert torch.allclose(found.values, expected[:3], rtol=1e-12)
    assert torch.allclose(found.matrix(), out @ into)


@pytest.mark.parametrize("angle", [1e-7, 0.5, 30.0, 89.0])
def test_a_planted_rotation_is_measured(angle) -> None:
    basis = frame(10, 5)
    turned = basis[:, :3].clone()
    radians = math.radians(angle)
    turned[:, 0] = math.cos(radians) * basis[:, 0] + math.sin(radians) * basis[:, 4]
    found = maths.subspace_angles(basis[:, :3], turned)
    assert float(found[-1]) == pytest.approx(angle, rel=1e-6)
    assert float(found[:2].max()) < 1e-6


def test_a_random_change_keeps_the_values_and_no_direction() -> None:
    change = maths.singular(double(40, 6) @ double(6, 30, seed=1)).first(6)
    randomly = maths.random_change(change, torch.Generator().manual_seed(3))
    found = maths.singular(randomly)
    assert torch.allclose(found.values[:6], change.values)
    assert float(found.values[6]) < 1e-10 * float(found.values[0])
    assert float(maths.subspace_angles(change.left, found.left[:, :6]).mean()) > 30
    again = maths.random_change(change, torch.Generator().manual_seed(3))
    assert torch.equal(randomly, again)


def test_rounding_is_to_nearest_by_row() -> None:
    matrix = double(6, 40).float()
    for bits in (4, 8):
        step = matrix.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        error = (matrix.double() / step).round() * step - matrix.double()
        assert maths.rounding_error(matrix, bits) == pytest.approx(float(error.norm()))
        assert bool((error.abs() <= step / 2 + 1e-12).all())
    assert maths.rounding_error(torch.zeros(2, 2), 4) == 0


def test_changed_values_alone_and_rotation_alone() -> None:
    """The share of changed singular values is 1 and 0 at the two ends."""
    base = double(16, 16)
    left, values, right = torch.linalg.svd(base)
    scaled = left @ torch.diag(values * torch.linspace(1.3, 1.1, 16, dtype=torch.float64)) @ right
    turn = torch.linalg.matrix_exp(0.05 * (frame(16, 16) - frame(16, 16).mT))
    for tuned, share in ((scaled, 1.0), (turn @ base, 0.0)):
        row = one_matrix(base, tuned).table[0]
        assert row["values_share"] == pytest.approx(share, abs=1e-9)
        assert (row["angle"] > 1) == (share == 0)


class OneMatrix(torch.nn.Module):
    """The least that counts as a model in memory."""

    def __init__(self, matrix):
        super().__init__()
        self.weight = torch.nn.Parameter(matrix)


def one_matrix(base, tuned, **options) -> WeightChangesResult:
    return compare_weights(OneMatrix(base), OneMatrix(tuned), **(QUICK | options))


def test_a_planted_intruder_is_found_where_it_is() -> None:
    left, right = frame(30, 20), frame(20, 20, seed=1)
    base = left @ torch.diag(torch.linspace(10, 1, 20, dtype=torch.float64)) @ right.mT
    # Orthogonal to every singular vector of the base, and between its 3rd and 4th in strength.
    new = double(30, seed=2)
    new = new - left @ (left.mT @ new)
    strength = 8.4
    tuned = base + strength * torch.outer(new / new.norm(), right[:, 19])
    result = one_matrix(base, tuned, k=6)
    (found,) = result.extras["intruders"]
    (row,) = result.table
    assert (found["place"], row["intruders"], row["rank"]) == (5, 1, 1)
    # right[:, 19] has the base's own last value, 1.
    assert found["singular_value"] == pytest.approx(math.hypot(strength, 1.0))
    assert found["cosine"] == pytest.approx(1 / math.hypot(strength, 1.0), abs=1e-6)
    assert "1 of 6 leading singular vectors are intruders" in str(result).replace("\n  ", " ")


def test_against_needs_all_draws() -> None:
    words = ("above", "below", "between")
    assert [against(x, [1.0, 2.0], str, *words) for x in (3.0, 2.0, 1.5, 0.5)] == [
        *("above", "between", "between", "below")
    ]


# Sources


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Base, tuned model, adapter and the adapter merged, by architecture."""
    found = {}
    for name, changes in (("gpt2", {}), ("llama", {}), ("tied", {"tie_word_embeddings": True})):
        folder = tmp_path_factory.mktemp(name)
        kind = "llama" if name == "tied" else name
        base = make_tiny(kind, **changes)
        base.save_pretrained(folder / "base")
        perturbed(base, 0.01).save_pretrained(folder / "tuned")
        lora(copy.deepcopy(base), kind).save_pretrained(folder / "adapter")
        merge(folder / "adapter", folder / "merged", base=base)
        found[name] = folder
    return found


ALL = pytest.mark.parametrize("name", ["gpt2", "llama", "tied"])


def opened(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@ALL
def test_folder_and_object_say_the_same(folders, name) -> None:
    base, tuned = folders[name] / "base", folders[name] / "tuned"
    of_files = compare_weights(base, tuned, **QUICK)
    objects = opened(base), opened(tuned)
    before = {n: p.clone() for n, p in objects[0].named_parameters()}
    of_objects = compare_weights(*objects, **QUICK)
    assert_same(of_files, of_objects, 1e-9)
    assert all(torch.equal(p, before[n]) for n, p in objects[0].named_parameters())
    assert of_files.meta["base"]["tensors_sha256"] == of_objects.meta["base"]["tensors_sha256"]
    # Every parameter once; where both ends are tied, one table.
    named = dict(objects[0].named_parameters())
    assert len(of_files.table) == len(named)
    assert sum(row["block"] is None and row["rows"] == 61 for row in of_files.table) == (
        2 if name == "llama" else 1
    )


@ALL
def test_adapter_and_merged_folder_say_the_same(folders, name) -> None:
    folder = folders[name]
    adapter = compare_weights(folder / "base", folder / "adapter", **QUICK)
    merged = compare_weights(folder / "base", folder / "merged", **QUICK)
    assert_same(adapter, merged)
    assert {row["rank"] for row in adapter.changed} == {4.0}
    weights = {n: p.detach().double() for n, p in opened(folder / "merged").named_parameters()}
    base = {n: p.detach().double() for n, p in opened(folder / "base").named_parameters()}
    for row in adapter.changed:
        (key,) = (key for key in weights if key.endswith(row["module"]))
        values = torch.linalg.svdvals(weights[key] - base[key])
        assert row["change"] == pytest.approx(float(values.norm()), rel=1e-5)
        assert row["top_share"] == pytest.approx(
            float(values[0] ** 2 / values.square().sum()), rel=1e-4
        )


@ALL
def test_a_peft_model_in_memory_says_the_same(folders, name) -> None:
    from peft import PeftModel

    folder = folders[name]
    model = PeftModel.from_pretrained(opened(folder / "base"), folder / "adapter")
    from_files = compare_weights(folder / "base", folder / "adapter", **QUICK)
    assert_same(compare_weights(folder / "base", model, **QUICK), from_files, 1e-6)
    model.merge_adapter()
    assert_same(compare_weights(folder / "base", model, **QUICK), from_files)


def test_an_open_pair_is_read(folders) -> None:
    folder = folders["tied"]
    pair = open_pair(folder / "base", folder / "adapter", device="cpu")
    assert_same(
        compare_weights(pair, **QUICK),
        compare_weights(folder / "base", folder / "adapter", **QUICK),
        1e-6,
    )
    with pytest.raises(PairError, match="leave the second out"):
        compare_weights(pair, folder / "base", **QUICK)


def test_gpt2s_matrices_are_read_as_others_are(folders) -> None:
    """Its linear layers store [in, out]: left singular vectors are still of the output."""
    result = compare_weights(folders["gpt2"] / "base", folders["gpt2"] / "tuned", **QUICK)
    row = result.at(module="h.0.attn.c_attn.weight")
    assert row["rows"] == 3 * row["columns"]
    one, other = (opened(folders["gpt2"] / n).transformer.h[0] for n in ("base", "tuned"))
    before, after = (x.attn.c_attn.weight.detach().double().mT for x in (one, other))
    left = [torch.linalg.svd(x).U[:, :4] for x in (before, after)]
    expected = float(maths.subspace_angles(*left).mean())
    assert row["angle_left"] == pytest.approx(expected, rel=1e-6)


def test_shards_are_found_by_their_index(folders, tmp_path) -> None:
    model = opened(folders["llama"] / "tuned")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, sharded = (
        compare_weights(folders["llama"] / "base", tuned, **QUICK)
        for tuned in (folders["llama"] / "tuned", tmp_path / "sharded")
    )
    assert_same(whole, sharded, 1e-12)
    next((tmp_path / "sharded").glob("*2-of*.safetensors")).unlink()
    with pytest.raises(LoadingError, match="which is missing"):
        compare_weights(folders["llama"] / "base", tmp_path / "sharded", **QUICK)


def test_nothing_is_built_and_one_pair_is_read_at_a_time(folders, monkeypatch) -> None:
    import transformers

    def build(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", build)
    pairs = iter(read_weight_pairs(folders["llama"] / "base", folders["llama"] / "adapter"))
    first = next(pairs)
    assert first.name == "embed_tokens.weight"
    assert first.tuned is first.base


def test_the_same_model_twice_is_zero_and_judged_nowhere(folders) -> None:
    result = compare_weights(folders["llama"] / "base", folders["llama"] / "base", **QUICK)
    for row in result.matrices:
        assert row["change"] == row["angle"] == row["angle_high"] == row["intruders"] == 0
        assert row["rank"] == row["effective_rank"] == row["values_share"] == 0
    (verdict,) = result.verdicts()
    assert "the same weights: none of" in verdict.answer
    assert result.evidence() == []


def test_experts_are_read_one_by_one(tmp_path) -> None:
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        experts = dict(tuned.named_parameters())["model.layers.1.mlp.experts.gate_up_proj"]
        experts[1] += 0.1 * torch.randn_like(experts[1])
    result = compare_weights(base, tuned, **QUICK)
    assert [row["module"] for row in result.changed] == ["layers.1.mlp.experts.gate_up_proj[1]"]
    assert result.share(1) == 1.0
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    # Saved as two matrices for each expert.
    of_files = compare_weights(tmp_path / "base", tmp_path / "tuned", **QUICK)
    assert len(of_files.changed) == 2
    assert of_files.changed[0]["block"] == 1


def test_other_adapters_are_sent_to_merge(tmp_path) -> None:
    base = make_tiny("llama")
    loha = LoHaConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    for name, model in (
        ("dora", lora(copy.deepcopy(base), "llama", use_dora=True)),
        ("loha", get_peft_model(copy.deepcopy(base), loha)),
    ):
        model.save_pretrained(tmp_path / name)
        for source in (tmp_path / name, model):
            with pytest.raises(LoadingError, match="hyperlens merge") as caught:
                compare_weights(base, source, **QUICK)
            assert len(str(caught.value).splitlines()) == 1
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    config |= {"use_dora": False, "init_lora_weights": "olora"}
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadingError, match="begins with olora, which changes the base"):
        compare_weights(base, tmp_path / "dora", **QUICK)


def test_what_an_adapter_stores_whole_is_read(folders, tmp_path) -> None:
    base = opened(folders["llama"] / "base")
    model = lora(
        copy.deepcopy(base), "llama", modules_to_save=["lm_head"], alpha_pattern={"v_proj": 3}
    )
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head += 0.1
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    found = compare_weights(base, tmp_path / "adapter", **QUICK)
    assert found.at(module="lm_head.weight")["rank"] == 1
    assert_same(found, compare_weights(base, tmp_path / "merged", **QUICK))
    assert_same(found, compare_weights(base, model, **QUICK))


def test_rank_survives_half_precision(folders, tmp_path) -> None:
    """A merged adapter is of its rank although each weight was rounded."""
    base = opened(folders["llama"] / "base").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    merge(folders["llama"] / "adapter", tmp_path / "merged", base=tmp_path / "base")
    result = compare_weights(tmp_path / "base", tmp_path / "merged", **QUICK)
    assert {row["rank"] for row in result.changed} == {4.0}


# Odd inputs


def test_an_adapter_of_another_base_is_said_or_refused(folders, tmp_path) -> None:
    make_tiny("llama", seed=5).save_pretrained(tmp_path / "other")
    config = folders["llama"] / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "someone/llama"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / config.name).write_text(json.dumps(named))
    weights = "adapter_model.safetensors"
    save_file(load_file(folders["llama"] / "adapter" / weights), tmp_path / "adapter" / weights)
    result = compare_weights(tmp_path / "other", tmp_path / "adapter", **QUICK)
    assert "names someone/llama as its base" in result.notes[0]
    make_tiny("llama", hidden_size=16).save_pretrained(tmp_path / "narrow")
    for base in (tmp_path / "narrow", folders["gpt2"] / "base"):
        with pytest.raises(PairError, match="does not fit this base"):
            compare_weights(base, tmp_path / "adapter", **QUICK)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_hidden_layers": 2}, "has no layers.2."), ({"vocab_size": 64}, "if tokens were added")],
)
def test_other_weights_are_one_line(folders, tmp_path, changes, words) -> None:
    make_tiny("llama", **changes).save_pretrained(tmp_path / "other")
    with pytest.raises(PairError, match=words) as caught:
        compare_weights(folders["llama"] / "base", tmp_path / "other", **QUICK)
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_and_quantised_folders_are_refused(folders, tmp_path) -> None:
    base = folders["llama"] / "base"
    tensors = load_file(base / "model.safetensors")

    def folder(name, changed, **config):
        (tmp_path / name).mkdir()
        about = json.loads((base / "config.json").read_text()) | config
        (tmp_path / name / "config.json").write_text(json.dumps(about))
        save_file(changed, tmp_path / name / "model.safetensors")
        return tmp_path / name

    key = "model.layers.0.mlp.up_proj.weight"
    nan = tensors | {key: torch.full_like(tensors[key], math.nan)}
    whole = tensors | {key: tensors[key].to(torch.int8)}
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    for made, words in (
        (folder("nan", nan), "holds NaN or infinity"),
        (folder("int8", whole), "it is quantised"),
        (folder("gptq", tensors, **quantised), "is quantised"),
    ):
        with pytest.raises(LoadingError, match=words):
            compare_weights(base, made, **QUICK)
    corrupt = folder("corrupt", tensors) / "model.safetensors"
    corrupt.write_bytes(corrupt.read_bytes()[:1000])
    with pytest.raises(LoadingError, match="are corrupt"):
        compare_weights(base, corrupt.parent, **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"n_controls": 0}, "n_controls must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"k": "3"}, "k must be a whole number"),
    ],
)
def test_settings_that_cannot_be(folders, options, words) -> None:
    base = folders["llama"] / "base"
    with pytest.raises(HyperlensError, match=words):
        compare_weights(base, base, **(QUICK | options))
    with pytest.raises(PairError, match="got one model"):
        compare_weights(base)
    assert issubclass(ArgumentError, HyperlensError)


def test_the_command(folders, tmp_path, capsys) -> None:
    folder = folders["llama"]
    out = tmp_path / "out"
    argv = ["weights", str(folder / "base"), str(folder / "tuned"), "--k", "4", "--out", str(out)]
    assert cli.main([*argv, "--n-controls", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Σ‖ΔW‖²" in printed
    assert "saved in" in printed
    saved = WeightChangesResult.load(out)
    again = compare_weights(folder / "base", folder / "tuned", **QUICK)
    assert str(saved.table) == str(again.table)
    assert len(saved.to_frame()) == len(saved.table)
    (tmp_path / "text.txt").write_text("no model")
    for wrong in ("nowhere", str(tmp_path / "text.txt"), str(tmp_path)):
        assert cli.main(["weights", str(folder / "base"), wrong]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "error: " in line
    assert cli.main(["weights", str(folder / "adapter"), str(folder / "tuned")]) == 1
    assert "the base must be a whole model" in capsys.readouterr().err


def test_blocks_are_read_off_names() -> None:
    names = {
        "h.11.attn.c_attn.weight": 11,
        "layers.0.mlp.experts.7.up_proj.weight": 0,
        "decoder.layers.3.fc1.weight": 3,
        "embed_tokens.weight": None,
        "norm.weight": None,
    }
    assert {name: block_of(name) for name in names} == names


def test_old_checkpoints_have_other_names(folders, tmp_path) -> None:
    """GPT-2's on the hub lacks the prefix and stores masks."""
    base = folders["gpt2"] / "base"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((base / "config.json").read_text())
    with safe_open(base / "model.safetensors", framework="pt") as file:
        tensors = {
            key.removeprefix("transformer."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
        }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    result = compare_weights(tmp_path / "old", base, **QUICK)
    assert not result.changed
    assert Path(result.meta["base"]["source"]).name == "old"


@pytest.mark.parametrize("other", [True, False])
def test_a_head_of_its_own_is_read_whatever_the_configuration_says(other, tmp_path) -> None:
    """As transformers loads such a folder: tied where both are equal, and else not."""
    base = make_tiny("qwen2")
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    weights = load_file(file)
    head = weights["model.embed_tokens.weight"] + float(other)
    save_file(weights | {"lm_head.weight": head.clone()}, file, metadata={"format": "pt"})
    found = compare_weights(tmp_path / "base", tmp_path / "tuned", progress=False)
    assert [row["module"] for row in found.table if row["change"] > 0] == ["lm_head.weight"] * other


def test_a_pair_has_the_names_that_it_was_opened_by(tmp_path: Path) -> None:
    base = make_tiny("llama")
    base.save_pretrained(tmp_path / "before")
    lora(base, "llama").save_pretrained(tmp_path / "after")
    pair = open_pair(tmp_path / "before", tmp_path / "after")
    meta = compare_weights(pair, n_controls=1, progress=False).meta
    assert [meta[side]["name"] for side in ("base", "tuned")] == ["before", "after"]
    assert meta["tuned"]["source"] == str(tmp_path / "after")
