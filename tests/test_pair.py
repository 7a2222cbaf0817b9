"""One pair, opened once, for any number of experiments: nothing is loaded or checked again."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import lora, make_tiny, perturbed, token_texts

from hyperlens import compare_models, measure_behaviour, run_null_test, trace_provenance
from hyperlens.errors import CorpusError, HyperlensError, PairError
from hyperlens.hooks import loading
from hyperlens.models import sources
from hyperlens.pair import Pair, open_pair

TEXTS = token_texts(10, shortest=8, longest=20)
SHORT = {"n_prompts": 4, "prompt_tokens": 5, "max_new_tokens": 6, "progress": False}


def compared(*models_and_texts: Any) -> Any:
    return compare_models(*models_and_texts, progress=False)


def behaviour(*models_and_texts: Any) -> Any:
    return measure_behaviour(*models_and_texts, **SHORT)


def null(*models_and_texts: Any) -> Any:
    kind = ["rows_and_columns"]  # each rescaled one is checked anew with every factor
    return run_null_test(*models_and_texts, controls=kind, n_controls=2, **SHORT)


def traced(*models_and_texts: Any) -> Any:
    return trace_provenance(*models_and_texts, **SHORT)


EXPERIMENTS: tuple[Callable[..., Any], ...] = (compared, behaviour, null, traced)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = make_tiny("llama")
    made = tmp_path_factory.mktemp("pair")
    base.save_pretrained(made / "base")
    perturbed(base).save_pretrained(made / "tuned")
    return made / "base", made / "tuned"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, Any]]]:
    """How often each model is read, checked and hashed: by what is done and to what."""
    counted: Counter[tuple[str, Any]] = Counter()

    def counting(module: Any, name: str, of: Callable[..., Any]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            counted[name, of(*args)] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    counting(sources, "read_checkpoint", lambda name, *_: name)
    counting(loading, "check_parity", lambda hooked, plain: id(plain))
    counting(loading, "weights_sha256", lambda model, *_: id(model))
    return counted


def test_a_pair_is_loaded_checked_and_hashed_once(folders, calls) -> None:
    pair = open_pair(*folders)
    models = {side: id(getattr(pair, side).model) for side in ("base", "tuned")}
    results = [experiment(pair, TEXTS) for experiment in EXPERIMENTS]
    assert len(results) == 4
    for folder, model in zip(folders, models.values(), strict=True):
        assert calls["read_checkpoint", str(folder)] == 1
        assert calls["check_parity", model] == 1
        assert calls["weights_sha256", model] == 1
    # The null test's own two models, besides.
    assert sum(n for (name, _), n in calls.items() if name == "check_parity") == 4
    assert sum(n for (name, _), n in calls.items() if name == "weights_sha256") == 2


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_pair_gives_the_same_numbers_as_its_sources(folders, experiment) -> None:
    pair = open_pair(*folders)
    of_pair, of_sources = experiment(pair, TEXTS), experiment(*folders, TEXTS)
    assert of_pair.to_frame().equals(of_sources.to_frame())
    assert of_pair.meta == of_sources.meta


def test_texts_are_the_second_argument_or_named(folders) -> None:
    pair = open_pair(*folders)
    frames = [
        compare_models(pair, TEXTS, progress=False).to_frame(),
        compare_models(pair, texts=TEXTS, progress=False).to_frame(),
    ]
    assert frames[0].equals(frames[1])


def test_what_a_pair_cannot_be_given_with(folders) -> None:
    pair = open_pair(*folders)
    wrong: list[tuple[type[HyperlensError], str, Callable[[], object]]] = [
        (PairError, "got a third argument", lambda: compare_models(pair, folders[1], TEXTS)),
        (PairError, "device is decided", lambda: compare_models(pair, TEXTS, device="cpu")),
        (PairError, "dtype is decided", lambda: trace_provenance(pair, TEXTS, dtype="float32")),
        (CorpusError, "got no texts", lambda: compare_models(pair)),
        (CorpusError, "got no texts", lambda: compare_models(*folders)),
    ]
    for error, words, call in wrong:
        with pytest.raises(error, match=words):
            call()


def test_descriptions_are_the_callers_own(folders) -> None:
    pair = open_pair(*folders)
    pair.describe()["base"]["name"] = "another"
    assert pair.describe()["base"]["name"] == "base"


def test_a_pair_and_its_models_are_shown_in_a_line(folders) -> None:
    pair = open_pair(*folders)
    assert repr(pair) == f"Pair({folders[0]} -> {folders[1]}, 3 blocks, float32)"
    assert repr(pair.base) == f"LoadedModel({folders[0]}, 3 blocks, float32, residual)"
    assert repr(sources.open_source(folders[0])) == f"OpenedModel({folders[0]}, folder)"


@pytest.mark.parametrize("named_beside", [False, True])
def test_base_and_adapter_swapped_are_refused(folders, tmp_path, named_beside: bool) -> None:
    base = folders[0]
    adapted = lora(make_tiny("llama"), "llama")
    folder = tmp_path / "adapter"
    if named_beside:
        make_tiny("llama").save_pretrained(folder / "base")
        base = folder / "base"
    adapted.save_pretrained(folder)
    config = folder / "adapter_config.json"
    named = {"base_model_name_or_path": "base" if named_beside else str(base)}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(PairError, match=r"swapped: .*adapter is an adapter of .*base; give the"):
        open_pair(folder, base)
    assert isinstance(open_pair(base, folder), Pair)
    # Another model than its base may be compared with an adapter's.
    assert isinstance(open_pair(folder, folders[1]), Pair)
