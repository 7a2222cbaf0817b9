"""Bounds on a comparison: judged by the whole interval, with an exit code of their own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm
from test_cli import _here, failed, home  # noqa: F401 (fixtures)
from test_results import make_comparison

from hyperlens import Comparison, check_comparison, cli, read_results
from hyperlens.compare.check import CheckResult, read_expectations, write_expectations
from hyperlens.errors import ExpectationError
from hyperlens.results.rows import Row

MADE = make_comparison(4)


def with_interval(low: float, high: float, metric: str = "relative_l2") -> Comparison:
    """A comparison of one number."""
    value = (low + high) / 2
    return Comparison.of([Row("drift", metric, 4, "raw", value, low, high, 9)], {}, MADE.meta)


def outcome(low: float, high: float, metric: str = "relative_l2", **bounds: float) -> str:
    wanted = {"metric": f"drift.{metric}", **bounds}
    checked = check_comparison(with_interval(low, high, metric), [wanted])
    assert checked.outcome == checked.table[0]["outcome"]
    return checked.outcome


# the rule


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"at_most": 0.5}, "met"),
        ({"at_most": 0.4}, "met"),  # the end counts as inside
        ({"at_most": 0.39}, "cannot tell"),
        ({"at_most": 0.2}, "cannot tell"),
        ({"at_most": 0.19}, "not met"),
        ({"at_least": 0.1}, "met"),
        ({"at_least": 0.2}, "met"),
        ({"at_least": 0.3}, "cannot tell"),
        ({"at_least": 0.4}, "cannot tell"),
        ({"at_least": 0.41}, "not met"),
        ({"at_least": 0.1, "at_most": 0.5}, "met"),
        ({"at_least": 0.25, "at_most": 0.35}, "cannot tell"),
        ({"at_least": 0.3, "at_most": 0.9}, "cannot tell"),
        ({"at_least": 0.5, "at_most": 0.9}, "not met"),
        ({"at_least": 0.0, "at_most": 0.1}, "not met"),
    ],
    ids=str,
)
def test_the_whole_interval_decides(bounds: dict[str, float], expected: str) -> None:
    assert outcome(0.2, 0.4, **bounds) == expected


def test_without_an_interval_nothing_can_be_told() -> None:
    assert outcome(math.nan, math.nan, at_most=1e9) == "cannot tell"


def test_no_interval_goes_beyond_what_is_possible() -> None:
    assert outcome(0.9, 1.1, "cosine", at_most=1) == "met"
    assert outcome(-0.1, 0.1, at_least=0) == "met"


def test_one_that_is_not_met_decides_then_one_that_cannot_be_told() -> None:
    comparison = with_interval(0.2, 0.4)
    bounds = [{"metric": "drift.relative_l2", "at_most": most} for most in (0.5, 0.3, 0.1)]
    assert check_comparison(comparison, bounds).outcome == "not met"
    assert check_comparison(comparison, bounds[:2]).outcome == "cannot tell"
    assert check_comparison(comparison, bounds[:1]).outcome == "met"


# which numbers


def test_layers_and_views() -> None:
    def at(**where: Any) -> set[tuple[int, str]]:
        found = check_comparison(MADE, [{"metric": "drift.cosine", "at_most": 1.0, **where}])
        return {(row["layer"], row["view"]) for row in found.table}

    views = {"raw", "unit_rms", "final_norm"}
    assert at() == {(layer, view) for layer in range(5) for view in views}
    assert at(layer=-1) == {(4, view) for view in views}
    assert at(layer=[0, -2], view="raw") == {(0, "raw"), (3, "raw")}


def test_it_is_a_result_like_any_other(tmp_path: Path) -> None:
    bounds = [
        {"metric": "logit_lens.kl", "layer": -1, "at_most": 0.5},
        {"metric": "rank_reordering.top1_agreement", "at_least": 0.6},
        {"metric": "drift.cosine", "layer": -1, "view": "raw", "at_least": 0.5},
    ]
    found = check_comparison(MADE, bounds)
    assert [row["outcome"] for row in found.table] == ["not met", "cannot tell", "met"]
    assert found.conclusions() == [
        "not met: 1 of 3 bounds met, 1 not met, 1 cannot tell.",
        "not met: logit_lens.kl at layer 4, final_norm, is 1.25 [1.23, 1.27] nats; expected at "
        "most 0.5.",
        "cannot tell: rank_reordering.top1_agreement at layer 4, final_norm, is 60.0% [59.0%, "
        "61.0%]; expected at least 0.6.",
    ]
    found.save(tmp_path / "check")
    (loaded,) = read_results([tmp_path])
    assert isinstance(loaded, CheckResult)
    assert loaded == found
    assert "drift.cosine" in loaded.summary()


# files


def written(folder: Path, text: str, name: str = "bounds.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml = '[[expect]]\nmetric = "drift.cosine"\nview = "raw"\nlayer = [1, -1]\nat_least = 0\n'
    entry = {"metric": "drift.cosine", "view": "raw", "layer": [1, -1], "at_least": 0}
    text = json.dumps({"expect": [entry]})
    same = [written(tmp_path, toml), written(tmp_path, text, "bounds.json"), [entry]]
    tables = [check_comparison(MADE, one).table for one in same]
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 2


ENTRY = '[[expect]]\nmetric = "drift.cosine"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no bounds in .*: give at least one"),
        ("[[expekt]]", "no key 'expekt': expected one of expect; did you mean 'expect'"),
        ("expect = 1", "must be a list"),
        ("expect = [1]", "expectation 1 in .* must hold metric, view, layer"),
        ("[[expect", "cannot be read as toml"),
        (ENTRY + "at_mots = 1", "no key 'at_mots': .* did you mean 'at_most'"),
        (ENTRY, "expectation 1 in .* has no bound: give at_least or at_most"),
        (ENTRY + "at_most = nan", "at_most must be a number, got nan"),
        (ENTRY + "at_most = true", "at_most must be a number, got True"),
        (ENTRY + 'at_most = "1"', "at_most must be a number, got '1'"),
        (ENTRY + "at_most = 1\nat_least = 2", "at_least 2 is above at_most 1"),
        (ENTRY + 'at_most = 1\nlayer = "last"', "layer must be a whole number or a list of some"),
        (ENTRY + "at_most = 1\nlayer = []", "layer must be a whole number or a list of some"),
        (ENTRY + "at_most = 1\nlayer = 5", r"layer 5 was not measured: expected some of \[0, 1,"),
        (ENTRY + "at_most = 1\nlayer = -6", "layer -6 was not measured"),
        (ENTRY + "at_most = 1\nview = 1", "view must be a string, got 1"),
        (ENTRY + 'at_most = 1\nview = "unit"', "no view 'unit': expected one of raw, unit_rms"),
        ("[[expect]]\nat_most = 1", "has no metric: expected such as 'drift.cosine'"),
        ('[[expect]]\nat_most = 1\nmetric = "drift.cosin"', "did you mean 'drift.cosine'?"),
        ('[[expect]]\nat_most = 1\nmetric = "kl"', "did you mean logit_lens.kl?"),
    ],
)
def test_mistakes_are_one_line_that_says_what_was_meant(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExpectationError, match=message) as caught:
        check_comparison(MADE, written(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bounds.yaml", b"", "expected a .toml or .json file"),
        ("bounds.json", b"[]", "must hold"),
        ("bounds.json", b"{", "cannot be read as json"),
        ("bounds.toml", b"\xff\xfe", "cannot be read as toml"),
        ("none.toml", None, "no file of bounds"),
    ],
)
def test_files_that_are_none(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExpectationError, match=message):
        read_expectations(tmp_path / name)


# a first file


def test_a_comparison_meets_the_bounds_made_from_it(tmp_path: Path) -> None:
    path = write_expectations(MADE, tmp_path / "bounds.toml")
    found = check_comparison(MADE, path)
    assert found.outcome == "met"
    assert {row["layer"] for row in found.table} == {4}
    assert len(found.table) == 6
    for row in found.table:
        width = row["high"] - row["low"]
        assert (row["at_least"], row["at_most"]) == (row["low"] - width, row["high"] + width)
    # The probability that the docstring gives: twice the variance, half a width and a whole one.
    assert 2 * norm.cdf(2 * 1.96 / math.sqrt(2)) - 1 == pytest.approx(0.994, abs=5e-4)
    with pytest.raises(ExpectationError, match="already exists"):
        write_expectations(MADE, path)


def test_without_intervals_there_is_no_first_file(tmp_path: Path) -> None:
    with pytest.raises(ExpectationError, match="compare on at least 5 texts"):
        write_expectations(with_interval(math.nan, math.nan), tmp_path / "bounds.toml")
    assert not [*tmp_path.iterdir()]


# the command


CHECK = ("check", "base", "tuned", "--texts", "texts.txt")


def test_two_models_are_compared_by_what_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = written(tmp_path, ENTRY + 'layer = -1\nview = "raw"\nat_least = -1\n')
    out = tmp_path / "out"
    argv = [*CHECK, "--max-length", "8", "--expect", str(bounds), "--out", str(out)]
    assert cli.main(argv) == cli.OK
    printed, err = capsys.readouterr()
    assert err == ""
    assert "met: 1 of 1 bound met." in printed
    assert f"saved in {out}: comparison, check" in printed
    comparison = Comparison.load(out / "comparison")
    assert {row.probe for row in comparison.long} == {"drift"}
    assert comparison.meta["options"]["max_length"] == 8
    assert CheckResult.load(out / "check") == check_comparison(comparison, bounds)


@pytest.mark.parametrize(
    ("at_most", "option", "code"),
    [
        (1.0, None, 0),
        (0.5, None, 4),
        (0.5, "pass", 0),
        (0.5, "fail", 3),
        (0.1, None, 3),
        (0.1, "pass", 3),
        (1.0, "fail", 0),
    ],
)
def test_exit_codes(
    at_most: float,
    option: str | None,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "saved").mkdir()
    MADE.write(tmp_path / "saved")
    entry = f'metric = "drift.relative_l2"\nlayer = -1\nview = "raw"\nat_most = {at_most}\n'
    bounds = written(tmp_path, f"[[expect]]\n{entry}")
    argv = ["check", str(tmp_path / "saved"), "--expect", str(bounds)]
    argv += [] if option is None else ["--cannot-tell", option]
    assert cli.main(argv) == code
    assert capsys.readouterr().err == ""
    assert cli.main([*argv, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["name"] == "check"


def test_a_first_file_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "saved").mkdir()
    MADE.write(tmp_path / "saved")
    bounds = tmp_path / "bounds.toml"
    argv = ["check", str(tmp_path / "saved")]
    assert cli.main([*argv, "--write-expect", str(bounds)]) == cli.OK
    assert capsys.readouterr().out == f"bounds written to {bounds}\n"
    assert cli.main([*argv, "--expect", str(bounds)]) == cli.OK
    capsys.readouterr()
    for more, message in (
        ((tmp_path / "new.json",), "call the file new.toml"),
        ((tmp_path / "new.toml", "--out", tmp_path / "out"), "the comparison is saved already"),
    ):
        failed(capsys, cli.FAILED, (*argv, "--write-expect", *more), message)
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "bounds.toml"}


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("check", "base", "--texts", "t.txt"), 2, "one of the arguments --expect --write-expect"),
        (("check", "saved", "--texts", "texts.txt"), 1, "--texts is for two models"),
        (("check", "saved", "--max-length", "9"), 1, "--max-length is for two models"),
        (("check", "saved", "--split", "test"), 1, "--split is for two models"),
        (("check", "saved"), 1, "no comparison.json in saved"),
        (("check", "base", "tuned"), 1, "add --texts"),
        ((*CHECK, "--cannot-tell", "no"), 2, "choose from"),
    ],
    ids=str,
)
def test_what_cannot_be_checked_is_one_line(
    argv: tuple, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = written(tmp_path, ENTRY + "at_most = 1")
    more = () if "one of" in message else ("--expect", bounds)
    failed(capsys, code, (*argv, *more), message)


def test_bad_bounds_are_told_before_a_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("hyperlens.pair.open_pair", opened)
    bounds = written(tmp_path, '[[expect]]\nmetric = "drfit.cosine"\nat_most = 1\n')
    failed(capsys, 1, (*CHECK, "--expect", bounds), "no probe 'drfit'", "did you mean 'drift'")
    bounds = written(tmp_path, ENTRY)
    failed(capsys, 1, (*CHECK, "--expect", bounds), "has no bound")
