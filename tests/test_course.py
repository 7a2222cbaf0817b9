"""What is said of training runs follows from their losses and records."""

import json
import math

import pytest
from conftest import make_tiny, token_texts

from hyperlens import cli, read_results
from hyperlens.errors import TrainingError
from hyperlens.training import TrainingResult, compare_training, hyperfit
from hyperlens.training.course import find_spikes, loss_factor

OPTIONS = {
    "recipe": "demo", "n_sequences": 4, "sequence_length": 8, "epochs": 4, "record_every": 2,
    "n_validation": 3, "n_prompts": 3, "prompt_tokens": 3, "new_tokens": 5, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    base, texts = make_tiny("llama"), token_texts(10, shortest=8, longest=20)
    for method in ("full", "late_lora"):
        last_k = {"last_k": 1} if method == "late_lora" else {}
        hyperfit(base, texts, method, out=place / method, **OPTIONS, **last_k)
    return place


@pytest.fixture(scope="module")
def result(folder) -> TrainingResult:
    return compare_training({"full": folder / "full", "late": str(folder / "late_lora")})


def test_numbers_are_those_that_were_saved(folder, result) -> None:
    for name, run in (("full", "full"), ("late", "late_lora")):
        saved = json.loads((folder / run / "hyperfit.json").read_text())
        known = result.known(name)
        assert known["final_loss"] == saved["history"][-1]
        assert known["hours"] == saved["manifest"]["seconds"] / 3600
        assert known["trained_parameters"] == saved["manifest"]["trained_parameters"]
        # Python with torch takes some hundred MiB, a tiny model next to nothing.
        assert 0.1 < known["peak_gib"] == saved["manifest"]["peak_memory"] / 2**30 < 8
        ttrs = {record["epoch"]: record["ttr"] for record in saved["records"]}
        assert known["ttr_peak"] == max(ttrs.values()) == ttrs[known["epoch_ttr_peak"]]
        assert known["perplexity_end"] == saved["records"][-1]["perplexity"]
        assert result.extras["curves"][name]["losses"] == [
            [epoch, loss] for epoch, loss in enumerate(saved["history"], 1)
        ]
    speedup = result.known("full")["hours"] / result.known("late")["hours"]
    assert result.known("late")["speedup"] == pytest.approx(speedup)
    assert result.known("full")["speedup"] == result.known("full")["loss_factor"] == 1


def test_a_run_in_memory_says_the_same(tmp_path) -> None:
    texts = token_texts(10, shortest=8, longest=20)
    run = hyperfit(make_tiny("llama"), texts, out=tmp_path / "run", **OPTIONS)
    first, second = (compare_training({"a": one}) for one in (run, tmp_path / "run"))
    assert first.table == second.table


def test_spikes_stand_out_on_both_sides() -> None:
    falling = [(epoch, 10.0 * 0.5**epoch) for epoch in range(1, 20)]
    assert find_spikes(falling) == []
    spiked = [(e, 5.0 if e == 9 else loss) for e, loss in falling]
    assert find_spikes(spiked) == [(9, 5.0)]
    # The end of a run has nothing after it to stand out from.
    assert find_spikes([(1, 0.1), (2, 0.1), (3, 9.0)]) == []


def test_the_distance_of_curves_is_a_factor() -> None:
    one = [(1, 1.0), (2, 0.5)]
    assert loss_factor(one, one) == 1
    assert loss_factor([(e, 3 * x) for e, x in one], one) == pytest.approx(3)
    assert math.isnan(loss_factor(one, [(7, 1.0)]))


def test_a_saved_result_comes_back(result, tmp_path) -> None:
    result.save(tmp_path / "out")
    assert TrainingResult.load(tmp_path / "out").table == result.table
    assert "Full fine-tuning" in result.summary()


def test_a_report_draws_runs_as_they_are(folder, result, tmp_path) -> None:
    (found,) = read_results([folder])
    assert found.runs == ["full", "late_lora"]
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "How did training go?" in (tmp_path / "page.html").read_text()
    # A saved result is not drawn a second time.
    result.save(folder / "training")
    assert [one.runs for one in read_results([folder])] == [["full", "late"]]


def test_the_command(folder, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["training", str(folder / "full"), str(folder / "late_lora")]) == 0
    assert "Late-Stage LoRA" in capsys.readouterr().out
    assert cli.main(["training", str(folder / "nothing")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(TrainingError, match="at least one"):
        compare_training({})
    (tmp_path / "hyperfit.json").write_text("{")
    with pytest.raises(TrainingError, match=r"no .*history"):
        compare_training({"a": tmp_path})
