"""Blocks: the same numbers in terminal, notebook and page, and several results on one page."""

import json
import math
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hyperlens.errors import ResultsError
from hyperlens.render import charts
from hyperlens.render.blocks import (
    Axis,
    Block,
    Chart,
    Details,
    Grid,
    Heading,
    Reference,
    Sample,
    Samples,
    Table,
    Text,
    Verdict,
    flat,
    joined,
)
from hyperlens.render.html import to_html
from hyperlens.render.terminal import to_text
from hyperlens.render.tokens import token_view

LAYER, VALUE = Axis("layer", "layer"), Axis("value", "dimensions", "zero")


def lines(name: str, by: float = 1.0, base: float = 1.0) -> Chart:
    rows = [
        {"series": series, "layer": layer, "value": layer * k, "low": layer * k - 1, "high": 9.0}
        for series, k in ((name, by), ("base", base))
        for layer in range(3)
    ]
    return Chart("lines", "a title", f"alt {name}", rows, LAYER, VALUE, {"base": "base"})


def every_kind() -> list[Block]:
    """A block of every kind."""
    return [
        Verdict("output", "The answer is 24.9% [23.9%, 25.9%]."),
        Verdict("quality", "Not to be concluded: quality.", caution=True),
        Heading("A heading"),
        Text("A text."),
        Text("A note.", role="note"),
        Table(["measure", "base", "tuned"], [["TTR", "0.316", ">0.999"]], "a caption"),
        lines("tuned"),
        Grid([lines("tuned"), lines("tuned")]),
        Samples("once", [Sample("base", " upon a time", [" upon", " a"], [1, 447], ["", " the"])]),
        Details("more", [Table(["n", "x"], [["1", "0.25"]])]),
    ]


def text_of(block: Block) -> list[str]:
    """All text of a block that a reader sees."""
    match block:
        case Verdict():
            return [block.answer]
        case Heading() | Text():
            return [block.text]
        case Table():
            return [block.caption, *block.head, *(cell for row in block.rows for cell in row)]
    return []


def test_terminal_notebook_and_page_show_the_same_numbers() -> None:
    blocks = every_kind()
    colours = charts.colours(blocks)
    page = unescape(to_html(blocks, colours))
    notebook = unescape(to_html(blocks, colours, static=True))
    terminal = to_text("title", blocks)
    for block in blocks:
        for text in filter(None, text_of(block)):
            assert text in page
            assert text in notebook
            assert text in " ".join(terminal.split())
    for block in flat(blocks):
        assert all(text in page for text in text_of(block))
    assert "0.25" not in terminal, "details are not for the terminal"


def test_tokens_say_their_rank_and_what_the_base_wanted() -> None:
    html = unescape(to_html(every_kind(), {"tuned": "#000", "base": "#000"}))
    assert "base rank 447; the base's top-1 token is ' the'" in html
    assert 'class="t r1"' in html
    assert 'class="t r4"' in html


@pytest.mark.parametrize("kind", ["lines", "dots", "bars", "points", "heatmap"])
def test_every_kind_of_chart_is_drawn(kind: str) -> None:
    rows = [
        {"series": s, "x": x, "value": v, "low": v - 0.1, "high": math.nan, "y": f"name {x}"}
        for s in ("base", "tuned", "controls")
        for x, v in ((1.0, 0.25), (2.0, 0.75))
    ]
    x = Axis("x", "x", is_category=kind == "bars")
    y = Axis("value", "value", "share")
    if kind == "dots":
        x, y = y, Axis("y", "", is_category=True)
    if kind == "heatmap":
        y = Axis("y", "y")
    references = [Reference("zero", 0.5, 0.4, 0.6)] if kind == "lines" else []
    roles = {"base": "base", "controls": "control"}
    chart = Chart(kind, "title", "alt", rows, x, y, roles, references)
    assert charts.svg(charts.draw(chart)).startswith("<svg")


def test_colours_go_by_role() -> None:
    found = charts.colours([lines("tuned 1"), Grid([lines("tuned 2")]), lines("tuned 1")])
    assert found["base"] == charts.GREY
    assert len(set(found.values())) == 3
    assert charts.GREY not in (found["tuned 1"], found["tuned 2"])


# --- several results


def join(*results: Sequence[Block]) -> list[Block]:
    return joined([(f"pair {i}", blocks) for i, blocks in enumerate(results)])


def test_one_result_is_left_as_it_is() -> None:
    assert join(every_kind()) == every_kind()


def test_what_is_equal_stands_once() -> None:
    assert join(every_kind(), every_kind()) == every_kind()


def test_charts_share_their_axes_and_a_shared_base() -> None:
    (chart,) = join([lines("one")], [lines("two", 2.0)])
    assert isinstance(chart, Chart)
    assert chart.series == ["one", "base", "two"]
    assert len(chart.rows) == 9
    assert chart.alt == "alt one; alt two"


def test_a_base_with_other_numbers_is_told_apart() -> None:
    (chart,) = join([lines("one")], [lines("two", 2.0, base=7.0)])
    assert isinstance(chart, Chart)
    assert set(chart.series) == {"one", "two", "base of pair 0", "base of pair 1"}
    assert chart.roles == {"base of pair 0": "base", "base of pair 1": "base"}


def test_tables_stand_side_by_side() -> None:
    head = ["measure", "base", "tuned"]
    first = Table(head, [["a", "1", "2"], ["b", "3", "4"]], joins=True)
    second = Table([*head[:2], "other"], [["a", "1", "9"], ["b", "3", "8"]], joins=True)
    (table,) = join([first], [second])
    assert isinstance(table, Table)
    assert list(table.head) == ["measure", "base", "tuned", "other"]
    assert [list(row) for row in table.rows] == [["a", "1", "2", "9"], ["b", "3", "4", "8"]]


def test_a_measure_that_one_pair_lacks_is_not_taken_from_the_other() -> None:
    first = Table(["measure", "tuned"], [["a", "1"], ["b", "2"]], joins=True)
    second = Table(["measure", "tuned"], [["b", "3"]], joins=True)
    (table,) = join([first], [second])
    assert isinstance(table, Table)
    assert list(table.head) == ["measure", "tuned (pair 0)", "tuned (pair 1)"]
    assert [list(row) for row in table.rows] == [["a", "1", "n/a"], ["b", "2", "3"]]


def test_results_with_other_blocks_follow_one_another() -> None:
    found = join([Text("a")], [Text("b"), Heading("c")])
    assert found == [Heading("pair 0"), Text("a"), Heading("pair 1"), Text("b"), Heading("c")]


def test_texts_and_verdicts_say_whose_they_are() -> None:
    first, second = ([Verdict("output", a), Text(b)] for a, b in (("x", "m"), ("y", "n")))
    assert join(first, second) == [
        Verdict("output, pair 0", "x"),
        Verdict("output, pair 1", "y"),
        Text("pair 0: m"),
        Text("pair 1: n"),
    ]


def test_a_pointer_that_rests_on_a_mark_is_told_its_values() -> None:
    drawn = charts.svg(charts.draw(lines("<b>tuned</b>")))
    titles = [unescape(title) for title in re.findall(r"<title>(.*?)</title></path>", drawn)]
    assert len(titles) == 6  # of points; neither of lines nor of bands
    assert sum("of: <b>tuned</b>" in title for title in titles) == 3
    assert any("layer: 2; dimensions: 2" in t and "95% from: 1; to: 9" in t for t in titles)
    ElementTree.fromstring(drawn)


class TestTokens:
    """Texts with ranks, as circuitsvis shows them."""

    def test_what_circuitsvis_draws(self, tmp_path: Path) -> None:
        nasty = "</script><script>alert(1)</script>"
        blocks = [
            Samples("x", [Sample("judged", "without ranks")]),
            Details(
                "more", [Samples("<once>", [Sample("base", " upon", [" upon", nasty], [1, 100])])]
            ),
        ]
        view = token_view(blocks)
        assert "&lt;once&gt;" in view.html
        assert view._repr_html_() == view.html
        props = re.search(
            r"CircuitsVis.ColoredTokensMulti,\s*(\{.*?\})\s*\)\s*</script>", view.html
        )
        assert props is not None
        drawn = json.loads(props[1])
        assert [unescape(token) for token in drawn["tokens"]] == [" upon", nasty]
        assert drawn["values"] == [[0, 1], [2, 100]]
        assert view.html.count("</script>") == 1  # ours
        assert "unpkg.com" not in view.html
        page = view.save(tmp_path / "tokens.html").read_text(encoding="utf-8")
        assert page.endswith(view.html)

    def test_which_example(self) -> None:
        blocks = [Samples(str(i), [Sample("base", "a", ["a"], [1])]) for i in range(2)]
        assert token_view(blocks, 1).prompt == "1"
        with pytest.raises(ResultsError, match=r"2 examples.*give example=0 to 1"):
            token_view(blocks, 2)
        with pytest.raises(ResultsError, match=r"no examples.*measure_behaviour"):
            token_view([])
        with pytest.raises(ResultsError, match="example"):
            token_view(blocks, -1)
