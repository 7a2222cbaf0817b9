"""What is on the page, without a browser: every number under its own model, every note once."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_browser import behaviour, named
from test_results import make_comparison

from hyperlens import cli
from hyperlens.errors import ResultsError
from hyperlens.questions import QUESTIONS
from hyperlens.render.blocks import Block, Text, Verdict
from hyperlens.render.labels import label_of, told_apart
from hyperlens.render.page import write_report
from hyperlens.results.result import Result

NAN = math.nan


class Small(Result):
    """A result of somebody else's."""

    name: ClassVar[str] = "small"
    title: ClassVar[str] = "Is it small?"
    columns: ClassVar[tuple[str, ...]] = ("value",)

    def verdicts(self) -> list[Verdict]:
        """As it was told."""
        return [Verdict("size", f"It is {self.table[0]['value']}, as {self.meta['file']} says.")]

    def evidence(self) -> list[Block]:
        """None but a sentence."""
        return [Text("There is no more to it.")]


def small(file: str = "a file") -> Small:
    return Small(({"value": 1.5},), {}, make_comparison(4).meta | {"file": file})


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


# --- names


def test_models_called_alike_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    pairs = [("base", "runs/a/tuned"), ("base", "runs/b/tuned")]
    results = [of(make_comparison(4), *pair) for pair in pairs]
    drawn = charts(page(tmp_path, results))
    assert len(drawn) > 6
    for rows in drawn:
        names = {row["series"].removesuffix(", as scripts read it") for row in rows}
        assert names == {"a/tuned", "b/tuned"}
        places = Counter((row["series"], row.get("layer", row.get("rank"))) for row in rows)
        assert set(places.values()) == {1}
    shares = [rows for rows in drawn if "rank" in rows[0]]
    assert len(shares) == 1
    for name in ("a/tuned", "b/tuned"):
        assert sum(r["value"] for r in shares[0] if r["series"] == name) == pytest.approx(100)


def test_a_pair_measured_twice_gets_a_number(tmp_path: Path) -> None:
    once = make_comparison(4)
    texts = once.meta["corpus"] | {"sha256": "d" * 64}
    again = replace(once, meta={**once.meta, "corpus": texts})
    html = page(tmp_path, [once, again, behaviour()])
    for rows in charts(html):
        if "layer" in rows[0]:
            names = {row["series"].removesuffix(", as scripts read it") for row in rows}
            assert names == {"tuned", "tuned (2)"}
    # The same two models measured in another way are no other pair.
    assert "<h1>base → tuned; base → tuned (2)</h1>" in html


SOURCES = st.sampled_from(["a/m", "b/m", "./b/m", "x/b/m", "m", ".", "org/m", "a/m (2)", "M"])


@given(st.lists(st.tuples(SOURCES, SOURCES, st.sampled_from("kl")), min_size=1, max_size=6))
def test_no_two_results_of_a_kind_have_one_name(given_: list[tuple[str, str, str]]) -> None:
    kinds = {"k": small(), "l": behaviour(1, 2)}
    results = [of(kinds[kind], base, tuned) for base, tuned, kind in given_]
    labelled = told_apart(results)
    assert [type(result) for result in labelled] == [type(result) for result in results]
    names = [(result.name, label_of(result)) for result in labelled]
    assert len(set(names)) == len(names)
    # Every name still holds the one it had.
    for before, after in zip(results, labelled, strict=True):
        for side in ("base", "tuned"):
            assert before.meta[side]["name"] in after.meta[side]["name"]
    assert label_of(told_apart(results[:1])[0]).count("(2)") == "".join(given_[0][:2]).count("(2)")


def test_names_that_nobody_shares_stay() -> None:
    results = [of(make_comparison(4), "runs/base", "runs/one"), behaviour(1), small()]
    assert [label_of(result) for result in told_apart(results)] == [
        "runs/base → one",
        "base → tuned",
        "base → tuned",
    ]
    for result in (behaviour(1), replace(behaviour(1), meta={})):
        assert told_apart([result]) == [result]


# --- findings, notes, sections


def test_the_page_begins_with_the_answers(tmp_path: Path) -> None:
    results = [make_comparison(4), behaviour(1), small()]
    html = page(tmp_path, results)
    box = html[html.index('id="findings"') : html.index('id="comparison"')]
    assert box.count("<li>") >= 3
    for result in results:
        assert f'href="#{result.name}"' in box
    assert "It is 1.5, as a file says." in box
    assert "quality" not in box, "cautions are no findings"


def test_notes_are_on_the_page_once(tmp_path: Path) -> None:
    for result in (make_comparison(4), behaviour(1), small()):
        noted = replace(result, meta={**result.meta, "notes": ["3 texts <are> twice there"]})
        html = page(tmp_path, [noted, of(noted, "base", "other")])
        assert html.count("Note: 3 texts &lt;are&gt; twice there</p>") == 1, result.name


def test_prompts_are_counted_for_each_pair(tmp_path: Path) -> None:
    first = behaviour(3, 40)
    assert "<p>Each model continued 3 prompts of 17 tokens by 40 tokens. TTR" in page(
        tmp_path, [first, named(first, "base", "other")]
    )
    html = page(tmp_path, [first, named(behaviour(3, 9), "base", "other")])
    assert "base → tuned: Each model continued 3 prompts of 17 tokens by 40 tokens" in html
    assert "base → other: Each model continued 3 prompts of 17 tokens by 9 tokens" in html


def test_sampled_texts_are_not_called_greedy(tmp_path: Path) -> None:
    found = behaviour(1)
    sampled = tuple(row for row in found.table if row["strategy"] == "sample")
    examples = [{**one, "strategy": "sample"} for one in found.extras["examples"]]
    html = page(tmp_path, [replace(found, table=sampled, extras={"examples": examples})])
    section = html[html.index('<section id="behaviour"') :]
    assert "tuned, sample" in section
    assert "greedy<" not in section[: section.index("</section>")].lower()


def test_a_single_result_needs_no_list(tmp_path: Path) -> None:
    assert page(tmp_path, make_comparison(2)) == page(tmp_path, [make_comparison(2)])


@pytest.mark.parametrize(
    ("path", "results", "message"),
    [
        ([make_comparison(2)], "page.html", r"expected write_report\(path, results\)"),
        ("page.html", [], "at least one result"),
        ("page.html", ["a"], "got a str"),
        ("page.html", "results", "got str"),
        ("page.html", 3, "got int"),
    ],
)
def test_wrong_arguments_are_one_error(path: Any, results: Any, message: str) -> None:
    with pytest.raises(ResultsError, match=message):
        write_report(path, results)


# --- results that somebody else wrote


@pytest.mark.parametrize("name", [question.name for question in QUESTIONS])
def test_a_result_that_says_nothing_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    empty = {"format": 2, "name": name, "table": [], "meta": {}, "extras": {}}
    (tmp_path / "in" / f"{name}.json").write_text(json.dumps(empty))
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "in"), "--out", str(out)]) == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hyperlens: error: a result of {name} cannot be shown")
    assert not out.exists()


def test_so_is_one_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="a result of small cannot be shown"):
        page(tmp_path, [Small(())])


def test_halves_of_characters_lose_nothing(tmp_path: Path) -> None:
    odd = "a name \udcff of no encoding"
    folder = small(odd).save(tmp_path / "out")
    assert Small.load(folder).meta["file"] == odd
    for name in ("summary.txt", "report.html"):
        assert "a name ? of no encoding" in (folder / name).read_text(encoding="utf-8"), name


def test_a_page_goes_where_people_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_report("~/page.html", [make_comparison(4)]) == tmp_path / "page.html"
    behaviour(1).save(tmp_path / "in")
    assert cli.main(["report", "~/in", "--out=~/other.html"]) == cli.OK
    assert (tmp_path / "other.html").exists()
