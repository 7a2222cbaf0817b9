"""The page in a real browser: it draws, it answers, it fetches nothing, it escapes everything.

HYPERLENS_SCREENSHOTS names a folder for screenshots to look at.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import short
from test_results import make_comparison

from hyperlens.experiments.behaviour import WORDS, BehaviourResult
from hyperlens.render.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUND = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDTHS = (375, 1280)
NASTY = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' &amp; </script>"

pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium here (apt install chromium)")


def behaviour(n_examples: int = 3, length: int = 40, text: str = "once upon a time") -> Any:
    """A result as measure_behaviour makes it."""
    rows = [
        {
            "strategy": strategy, "model": model, "metric": metric, "value": value,
            "low": value - 0.1, "high": value + 0.1, "se": 0.05, "n": n_examples, "p": p,
        }
        for strategy in ("greedy", "sample")
        for metric in WORDS
        for model, value, p in (
            ("base", 0.3, float("nan")), ("tuned", 0.6, float("nan")), ("difference", 0.3, 0.001),
        )
    ]  # fmt: skip
    side = {
        "text": f"{text} {NASTY}",
        "tokens": [*([NASTY, '"', "\n", "é", "\ud800"] * length)][:length],
        "base_rank": [1 + (7 * i * i) % 900 for i in range(length)],
    }
    examples = [
        {"strategy": "greedy", "prompt": f"{i} {NASTY}", "base": side, "tuned": side}
        for i in range(n_examples)
    ]
    options = {"n_prompts": n_examples, "prompt_tokens": 17, "max_new_tokens": length}
    meta = make_comparison(4).meta | {"options": options, "notes": [NASTY]}
    return BehaviourResult(tuple(rows), {"examples": examples}, meta)


def named(result: Any, base: str, tuned: str) -> Any:
    """The same result of models with other names."""
    sides = {side: {**result.meta[side], "name": name} for side, name in
             (("base", base), ("tuned", tuned))}  # fmt: skip
    return replace(result, meta={**result.meta, **sides})


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / 'it\'s a "folder"'
    folder.mkdir()
    results = [make_comparison(4), behaviour()]
    others = [named(result, NASTY, f"tuned {NASTY}") for result in results]
    return write_report(folder / "<script>report.html", [*results, *others], NASTY)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=FOUND, args=list(FLAGS))
        yield browser
        browser.close()


class Opened:
    """A page, and all that it has said, asked for and fetched."""

    def __init__(
        self,
        chromium: Any,
        file: Path,
        width: int = 1280,
        scheme: str = "light",
        drawn: str = "html[data-drawn]",
    ) -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", self._asked)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector(drawn)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _asked(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()


# Each width and each scheme once; all four in the long form.
@pytest.mark.parametrize(
    ("width", "scheme"),
    short(
        [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")],
        (WIDTHS[0], "dark"),
        (WIDTHS[1], "light"),
    ),
)
def test_it_opens_draws_and_fetches_nothing(
    chromium: Any, page_file: Path, width: int, scheme: str
) -> None:
    opened = Opened(chromium, page_file, width, scheme)
    page = opened.page
    assert opened.complaints == []
    assert opened.dialogs == []
    assert {url.split(":")[0] for url in opened.requests} <= {"file", "data", "blob"}
    assert len([url for url in opened.requests if url.startswith("file")]) == 1
    # The page itself never scrolls sideways; wide tables do, inside their own boxes.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.query_selector_all("main .chart")
    assert len(charts) > 8
    for chart in charts:
        if chart.is_visible():
            assert chart.query_selector_all("svg .mark-symbol path, svg .mark-rect path")
            assert chart.get_attribute("aria-label")
    tokens = [token for token in page.query_selector_all(".t") if token.is_visible()]
    assert len(tokens) > 100
    _keep(page, f"report-{width}-{scheme}.png")
    page.close()


def test_every_section_is_there_in_order(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file)
    shown = opened.page.eval_on_selector_all("section", "all => all.map(e => e.id)")
    assert shown == ["findings", "comparison", "behaviour"]
    for link in opened.page.query_selector_all("nav a, #findings a"):
        assert opened.page.query_selector(link.get_attribute("href")) is not None
    opened.page.close()


def test_the_contents_stay_at_the_side_where_there_is_room(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file, width=1280)
    opened.page.evaluate("window.scrollTo(0, 1500)")
    box = opened.page.locator("nav").bounding_box()
    assert 0 <= box["y"] < 100
    assert box["width"] < 300
    opened.page.close()


def test_values_show_when_hovered_over(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file)
    page = opened.page
    page.locator("#comparison .chart svg .mark-symbol path").nth(2).hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "95%" in page.locator("#vg-tooltip-element").inner_text()
    title = page.locator("#behaviour .texts .t.r4").first.get_attribute("title")
    assert title.startswith("base rank ")
    assert opened.complaints == []
    page.close()


def test_folded_charts_are_drawn_when_opened(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file)
    page = opened.page
    assert page.locator("#comparison > details .chart[data-drawn]").count() == 0
    page.locator("#comparison > details", has=page.locator(".chart")).first.locator(
        "summary"
    ).first.click()
    page.wait_for_selector("#comparison > details[open] .chart[data-drawn] svg")
    assert opened.complaints == opened.dialogs == []
    page.close()


def test_it_changes_with_the_readers_colours(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file)
    colour = "getComputedStyle(document.querySelector('#comparison .chart text')).fill"
    light = opened.page.evaluate(colour)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function(f"({colour}) !== {light!r}")
    background = "getComputedStyle(document.body).backgroundColor"
    assert opened.page.evaluate(background) != "rgb(255, 255, 255)"
    opened.page.close()


def test_it_prints(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file)
    assert len(opened.page.pdf(format="A4")) > 20_000
    opened.page.close()


def test_markup_in_names_texts_and_tokens_shows_as_text(chromium: Any, page_file: Path) -> None:
    opened = Opened(chromium, page_file)
    page = opened.page
    assert NASTY in page.title()
    assert page.locator("h1").inner_text() == NASTY
    assert page.locator("main img[src='x']").count() == 0
    text = page.locator("main").inner_text()
    assert NASTY in text
    assert NASTY in page.locator(".texts p").nth(1).inner_text()
    assert opened.dialogs == []
    page.close()


def test_tokens_in_circuitsvis_fetch_nothing(chromium: Any, tmp_path: Path) -> None:
    file = behaviour(n_examples=1).show_tokens().save(tmp_path / "tokens.html")
    opened = Opened(chromium, file, drawn="[id^=circuits-vis] >> text=onerror")
    assert opened.dialogs == []
    assert [url.split(":")[0] for url in opened.requests] == ["file"]
    assert opened.page.locator("[id^=circuits-vis]").count() == 2  # base and tuned
    _keep(opened.page, "tokens.png")
    opened.page.close()


def test_a_large_report_is_small_and_opens_at_once(chromium: Any, tmp_path: Path) -> None:
    results = [make_comparison(32), behaviour(n_examples=40, length=256)]
    file = write_report(tmp_path / "large.html", results)
    assert file.stat().st_size < 8e6
    Opened(chromium, file).page.close()  # the browser itself is warm
    # The least of three: other tests run on the same two cores, and are not what is measured.
    drawn = min(_milliseconds_to_charts(chromium, file) for _ in range(3))
    assert drawn < 4000 * float(os.environ.get("HYPERLENS_SLOWER", "1")), f"{drawn:.0f} ms"


def _milliseconds_to_charts(chromium: Any, file: Path) -> float:
    page = chromium.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("#comparison .chart svg .mark-symbol path")
    drawn = float(page.evaluate("performance.now()"))
    page.close()
    return drawn


def _keep(page: Any, name: str) -> None:
    folder = os.environ.get("HYPERLENS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / name, full_page=True)
