"""What stands on the page, without a browser: every number under its own model, every note."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from test_browser import behaviour, named, null_test
from test_results import make_comparison

from hyperlens import cli
from hyperlens.errors import ResultsError
from hyperlens.render import write_report
from hyperlens.render.labels import told_apart
from hyperlens.render.page import section_modules
from hyperlens.render.parts import p_in_words, pair_name, share
from hyperlens.render.saved import finding_classes
from hyperlens.results.result import Result

NAN = math.nan


def of(result: Any, base: str, tuned: str) -> Any:
    """The same result of models in these folders, each with weights of its own."""
    sides = {
        side: {"name": Path(folder).name, "source": folder, "kind": "folder", "sha256": folder * 9}
        for side, folder in (("base", base), ("tuned", tuned))
    }
    return replace(result, meta={**result.meta, **sides})


def page(tmp_path: Path, results: Sequence[Any]) -> str:
    return write_report(tmp_path / "page.html", results).read_text(encoding="utf-8")


def charts(html: str) -> list[list[dict[str, Any]]]:
    """The rows of every chart."""
    texts = re.findall(
        r'class="chart"[^>]*><script type="application/json">(.*?)</script>', html, re.S
    )
    return [_values(json.loads(text)) for text in texts]


def _values(spec: dict[str, Any]) -> list[dict[str, Any]]:
    (found,) = (
        inner["values"] for inner in (spec.get("data", {}), *spec.get("datasets", {}).values())
        if "values" in inner
    )  # fmt: skip
    return found


def tables(html: str, first: str) -> list[list[list[str]]]:
    """Cells, row by row, of the tables whose first heading begins so."""
    found = []
    for text in re.findall(r"<table>(.*?)</table>", html, re.S):
        rows = [
            [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)
        ]
        if rows[0][0].startswith(first):
            found.append(rows)
    return found


# --- names


def test_models_called_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    pairs = [("base", "runs/a/tuned"), ("base", "runs/b/tuned")]
    results = [of(make_comparison(4), *pair) for pair in pairs]
    drawn = charts(page(tmp_path, results))
    assert len(drawn) > 6
    for rows in drawn:
        assert {row["pair"] for row in rows} == {"base → a/tuned", "base → b/tuned"}
        places = Counter((row["pair"], row.get("layer", row.get("rank"))) for row in rows)
        assert set(places.values()) == {1}
    shares = [rows for rows in drawn if "rank" in rows[0]]
    assert len(shares) == 1
    for pair in ("base → a/tuned", "base → b/tuned"):
        assert sum(r["value"] for r in shares[0] if r["pair"] == pair) == pytest.approx(100)


def test_a_pair_measured_twice_gets_a_number(tmp_path: Path) -> None:
    once = make_comparison(4)
    texts = once.meta["corpus"] | {"sha256": "d" * 64}
    again = replace(once, meta={**once.meta, "corpus": texts})
    html = page(tmp_path, [once, again, behaviour()])
    assert "base → tuned: 4 blocks" in html
    assert "SHA-256 of the texts dddddddddddddddd" in html
    for rows in charts(html):
        if "pair" in rows[0]:
            assert {row["pair"] for row in rows} == {"base → tuned", "base → tuned (2)"}
    # The same two models measured in another way are no other pair.
    assert "<h1>base → tuned; base → tuned (2)</h1>" in html


SOURCES = st.sampled_from(["a/m", "b/m", "./b/m", "x/b/m", "m", ".", "org/m", "a/m (2)", "M"])


@given(st.lists(st.tuples(SOURCES, SOURCES, st.sampled_from("kl")), min_size=1, max_size=6))
def test_no_two_results_of_a_kind_have_one_name(given_: list[tuple[str, str, str]]) -> None:
    kinds = {"k": null_test(), "l": behaviour(1, 2)}
    results = [of(kinds[kind], base, tuned) for base, tuned, kind in given_]
    labelled = told_apart(results)
    assert [type(result) for result in labelled] == [type(result) for result in results]
    names = [(result.name, pair_name(result)) for result in labelled]
    assert len(set(names)) == len(names)
    # Nobody's name grows without need, and every name still ends as it did.
    for before, after in zip(results, labelled, strict=True):
        for side in ("base", "tuned"):
            assert after.meta[side]["name"].endswith(before.meta[side]["name"])
    assert pair_name(told_apart(results[:1])[0]).count("(2)") == "".join(given_[0][:2]).count("(2)")


def test_names_that_nobody_shares_stay() -> None:
    results = [of(make_comparison(4), "runs/base", "runs/one"), behaviour(1), null_test()]
    assert [pair_name(result) for result in told_apart(results)] == [
        "runs/base → one",
        "base → tuned",
        "base → tuned",
    ]
    for result in (behaviour(1), replace(behaviour(1), meta={})):
        assert told_apart([result]) == [result]


# --- what models write


def without(finding: Any, **unwanted: str) -> Any:
    """The finding without rows that have these values."""
    left = (r for r in finding.table if any(r[k] != v for k, v in unwanted.items()))
    return replace(finding, table=tuple(left))


def scaled(finding: Any, by: float) -> Any:
    """The finding with other numbers."""
    return replace(
        finding,
        table=tuple(
            {**r, **{k: r[k] * by for k in ("value", "low", "high")}} for r in finding.table
        ),
    )


@pytest.mark.parametrize("missing", [0, 1])
def test_every_difference_stands_under_its_own_pair(tmp_path: Path, missing: int) -> None:
    whole = [of(scaled(behaviour(), k), "base", f"tuned{k}") for k in (1, 2, 3)]
    results = list(whole)
    results[missing] = without(without(whole[missing], strategy="sample"), metric="ttr")
    for strategy, rows in zip(
        ("greedy", "sample"),
        tables(page(tmp_path, results), "tuned − base, paired"),
        strict=True,
    ):
        assert rows[0][1:] == ["base → tuned1", "base → tuned2", "base → tuned3"]
        assert len(rows) == 1 + 8
        for row in rows[1:]:
            lacks = strategy == "sample" or row[0] == "TTR"
            for i, cell in enumerate(row[1:]):
                if i == missing and lacks:
                    assert cell == "n/a"
                else:
                    assert float(cell.split()[0]) == pytest.approx(0.3 * (i + 1))
                    assert cell.endswith("p = 0.001")


def test_a_mark_of_the_chart_is_one_models(tmp_path: Path) -> None:
    first, second = (of(behaviour(), "base", f"runs/{name}/tuned") for name in "ab")
    for results, names in (
        # One base with the same numbers is drawn once ...
        ([first, second], {"base", "a/tuned", "b/tuned"}),
        # ... with others for each pair, and so is what was measured twice.
        (
            [first, scaled(second, 2)],
            {"base of base → a/tuned", "base of base → b/tuned", "a/tuned", "b/tuned"},
        ),
        (
            [first, scaled(first, 2)],
            {
                f"{side} of base → tuned{number}"
                for side in ("base", "tuned")
                for number in ("", " (2)")
            },
        ),
        # Two models in memory have the name of their class.
        (
            [named(behaviour(), "Llama", "Llama")],
            {"base of Llama → Llama", "tuned of Llama → Llama"},
        ),
        # Who did not sample takes nothing from who did.
        ([first, without(second, strategy="sample")], {"base", "a/tuned", "b/tuned"}),
    ):
        drawn = [rows for rows in charts(page(tmp_path, results)) if "measure" in rows[0]]
        assert len(drawn) == 2
        assert {row["model"] for row in drawn[0]} == names
        for rows in drawn:
            marks = Counter((row["model"], row["measure"]) for row in rows)
            assert set(marks.values()) == {1}
            assert {row["measure"] for row in rows if "base" in row["kind"]} == {
                row["measure"] for row in rows
            }


def test_prompts_are_counted_for_each_pair(tmp_path: Path) -> None:
    first = behaviour(3, 40)
    assert "Each model continued 3 prompts of 17 tokens by 40 tokens. TTR" in page(
        tmp_path, [first, named(first, "base", "other")]
    )
    html = page(tmp_path, [first, named(behaviour(5, 9), "base", "other")])
    assert "3 prompts of 17 tokens by 40 tokens (base → tuned)" in html
    assert "5 prompts of 17 tokens by 9 tokens (base → other)" in html


def test_sampled_texts_are_not_called_greedy(tmp_path: Path) -> None:
    found = without(behaviour(1), strategy="greedy")
    examples = [{**one, "strategy": "sample"} for one in found.extras["examples"]]
    html = page(tmp_path, [replace(found, extras={"examples": examples})])
    assert "base → tuned: Sampling at temperature 1" in html
    section = html[html.index('<section id="behaviour"') :]
    assert "greedy" not in section[: section.index("</section>")].lower()
    assert "base → tuned: Greedy decoding" in page(tmp_path, [behaviour(1)])


def test_a_pair_without_counts_over_all_prompts_leaves_the_others_theirs(tmp_path: Path) -> None:
    shares = [
        {"strategy": "greedy", "model": model, "n": n, "value": 0.25}
        for model in ("base", "tuned")
        for n in (1, 2, 3)
    ]
    old, new = behaviour(1), named(behaviour(1), "base", "new")
    new = replace(new, extras={**new.extras, "distinct": shares})
    (rows,) = tables(page(tmp_path, [old, new]), "distinct n-grams")
    assert rows[1:] == [[f"base → new, {side}", *["0.250"] * 3] for side in ("base", "tuned")]


# --- notes


def test_every_kind_of_result_has_its_notes_on_the_page() -> None:
    kinds = {module.READS for module in section_modules()}
    assert {module.READS for module in section_modules() if hasattr(module, "notes")} == kinds


def test_notes_stand_on_the_page_once(tmp_path: Path) -> None:
    for result in (make_comparison(4), behaviour(1), null_test()):
        noted = replace(result, meta={**result.meta, "notes": ["3 texts <are> twice there"]})
        html = page(tmp_path, [noted, of(noted, "base", "other")])
        shown = html.count("<p>Note: 3 texts &lt;are&gt; twice there</p>")
        assert shown == (2 if result.name == "null_test" else 1), result.name


# --- results that somebody else wrote


@pytest.mark.parametrize("name", sorted(finding_classes()))
def test_a_result_that_says_nothing_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    empty = {"format": 1, "name": name, "table": [], "meta": {}, "extras": {}}
    (tmp_path / "in" / f"{name}.json").write_text(json.dumps(empty))
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "in"), "--out", str(out)]) == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hyperlens: error: a result of {name} cannot be shown")
    assert not out.exists()


class Unknown(Result):
    """An experiment of somebody else, without a section."""

    name = "unknown"
    columns = ("value",)

    def summary(self) -> str:
        return f"read from {self.meta['file']}"

    def plot(self) -> Figure:
        return Figure()


def test_so_is_one_without_a_section(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="a result of unknown cannot be shown"):
        page(tmp_path, [Unknown(())])


def test_halves_of_characters_lose_nothing(tmp_path: Path) -> None:
    odd = "a name \udcff of no encoding"
    folder = Unknown((), meta={"file": odd}).save(tmp_path / "out")
    assert Unknown.load(folder).meta["file"] == odd
    for name in ("summary.txt", "report.html"):
        assert "a name ? of no encoding" in (folder / name).read_text(encoding="utf-8"), name


def test_a_page_goes_where_people_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_report("~/page.html", [make_comparison(4)]) == tmp_path / "page.html"
    null_test().save(tmp_path / "in")
    assert cli.main(["report", "~/in", "--out=~/other.html"]) == cli.OK
    assert (tmp_path / "other.html").exists()


# --- numbers in words


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (0.5, 0.25, 0.75, "50.0% [25.0%, 75.0%]"),
        (0.01, -0.02, 0.04, "1.0% [0.0%, 4.0%]"),
        (0.99, 0.96, 1.02, "99.0% [96.0%, 100.0%]"),
        (0.5, NAN, NAN, "50.0%"),
        (NAN, NAN, NAN, "n/a"),
    ],
)
def test_shares_read_well(value: float, low: float, high: float, expected: str) -> None:
    assert share({"value": value, "low": low, "high": high}) == expected


def test_p_values_read_well() -> None:
    assert [p_in_words(p) for p in (NAN, 0.0, 0.0009, 0.001, 0.25, 1.0)] == [
        *("", "p < 0.001", "p < 0.001"),
        *("p = 0.001", "p = 0.250", "p = 1.000"),
    ]
