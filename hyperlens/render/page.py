"""One self-contained page: HTML with everything inside it and nothing fetched."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from markupsafe import Markup

from .. import __version__
from ..checks import check_types
from ..errors import ResultsError
from ..files import expand_user, write_text
from . import charts
from .blocks import Block, Verdict, joined
from .format import one_line
from .html import Content, join, tag, to_html
from .labels import label_of, told_apart

HERE = Path(__file__).resolve().parent
# So many sentences stand in the box at the top of a page.
MAX_FINDINGS = 6

# Nothing may be loaded from anywhere; the charts' expressions are compiled by the page itself.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data:; font-src data:; base-uri 'none'; form-action 'none'"
)
DOCUMENT = Markup(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="generator" content="hyperlens {version}">\n'
    "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    "{body}\n{scripts}\n</body>\n</html>\n"
)


@runtime_checkable
class Presented(Protocol):
    """What a page asks of a result."""

    name: ClassVar[str]
    title: ClassVar[str]

    @property
    def meta(self) -> Mapping[str, Any]:
        """Models, options, seeds, versions and notes."""

    def blocks(self) -> list[Block]:
        """Verdicts first, then what they rest on."""


@check_types
def write_report(path: Any, results: Any, title: str | None = None) -> Path:
    """Write one self-contained page about any number of results; atomic.

    Args:
        path: of the HTML file (str or Path), which is replaced if it exists.
        results: a result or a list of results, of one pair of models or of several. Sections are
            in their order; results of one kind share a section.
        title: of the page; None names the models.

    Returns:
        The path.

    Raises:
        ResultsError: if there is nothing to show, or the file cannot be written.
    """
    shown = told_apart(_checked(path, results))
    by_name: dict[str, list[Any]] = defaultdict(list)
    for result in shown:
        by_name[result.name].append(result)
    sections = {name: _blocks(same) for name, same in by_name.items()}
    colours = charts.colours([block for blocks in sections.values() for block in blocks])
    pairs = list(dict.fromkeys(map(label_of, shown)))
    heading = title or ("; ".join(pairs) if len(pairs) < 4 else f"{len(pairs)} pairs of models")
    titles = {name: same[0].title for name, same in by_name.items()}
    body = join(
        [
            tag(
                "header",
                tag("h1", heading),
                tag("p", "; ".join(pairs), class_="pairs") if title else "",
            ),
            _contents(titles),
            tag(
                "main",
                _findings(by_name),
                *(
                    tag(
                        "section",
                        tag("h2", titles[name]),
                        to_html(blocks, colours),
                        id=name.replace("_", "-"),
                        data_section=name,
                    )
                    for name, blocks in sections.items()
                ),
            ),
            _footer(shown),
        ]
    )
    page = DOCUMENT.format(
        policy=POLICY,
        version=__version__,
        title=f"hyperlens: {heading}",
        style=Markup(_own("page.css")),
        body=body,
        scripts=_scripts(body),
    )
    file = expand_user(path)
    write_text(file, str(page))
    return file


def notebook_html(result: Presented) -> str:
    """A result as HTML for notebooks: no script, charts as pictures, pure ASCII."""
    blocks = result.blocks()
    body = join(
        [
            tag("style", Markup(_own("notebook.css"))),
            tag("h3", f"{result.title} {label_of(result)}"),
            to_html(blocks, charts.colours(blocks), static=True),
        ]
    )
    text = str(tag("div", body, class_="hyperlens"))
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _checked(path: Any, results: Any) -> list[Any]:
    if not isinstance(path, str | Path):
        raise ResultsError(
            f"expected write_report(path, results), got a {type(path).__name__} as the path"
        )
    several = [results] if isinstance(results, Presented) else results
    if not isinstance(several, Sequence) or isinstance(several, str):
        raise ResultsError(f"expected a result or a list of results, got {type(results).__name__}")
    for one in several:
        if not isinstance(one, Presented):
            raise ResultsError(f"expected results of hyperlens, got a {type(one).__name__}")
    if not several:
        raise ResultsError("expected at least one result to report on, got none")
    return list(several)


def _blocks(results: Sequence[Any]) -> list[Block]:
    """The blocks of all results of one kind; what a result lacks is one error."""
    try:
        return joined([(label_of(result), result.blocks()) for result in results])
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        ResultsError,
        TypeError,
        ValueError,
    ) as error:
        raise ResultsError(
            f"a result of {results[0].name} cannot be shown, it lacks something or has it in "
            f"another form ({type(error).__name__}: {error}): expected it as save() wrote it"
        ) from error


def _contents(titles: Mapping[str, str]) -> Markup:
    links = (
        tag("li", tag("a", title, href=f"#{name.replace('_', '-')}"))
        for name, title in titles.items()
    )
    return tag("nav", tag("ol", *links), aria_label="contents")


def _findings(by_name: Mapping[str, Sequence[Any]]) -> Markup:
    """The first answers of every section, each with a link to what it rests on."""
    items = list(_answers(by_name))
    return (
        tag("section", tag("h2", "Findings"), tag("ul", *items), id="findings")
        if items
        else join([])
    )


def _answers(by_name: Mapping[str, Sequence[Any]]) -> Iterator[Content]:
    results = [result for same in by_name.values() for result in same]
    # One that sums up the others speaks for all of them, with every answer.
    overviews = [result for result in results if getattr(result, "is_overview", False)]
    results = overviews or results
    several = len({label_of(result) for result in results}) > 1
    each = MAX_FINDINGS if overviews else max(1, MAX_FINDINGS // max(1, len(results)))
    for result in results:
        answers = [
            block for block in result.blocks() if isinstance(block, Verdict) and not block.caution
        ]
        for verdict in answers[:each]:
            of = f" ({label_of(result)})" if several else ""
            link = tag("a", "evidence", href=f"#{result.name.replace('_', '-')}")
            yield tag("li", tag("b", f"{verdict.topic}{of}: "), f"{verdict.answer} ", link)


def _footer(results: Sequence[Any]) -> Markup:
    versions = results[0].meta.get("versions", {})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return tag(
        "footer",
        tag(
            "p",
            f"Made by hyperlens {__version__}. Intervals are 95%, over whole sequences or prompts. "
            "Every number, with options, seeds and hashes, is in the results' JSON files.",
        ),
        tag("p", one_line(listed)) if listed else "",
        tag(
            "p",
            "Measures of arXiv 2605.22579, “Beyond Temperature: Hyperfitting as a Late-Stage "
            "Geometric Expansion”.",
        ),
    )


def _scripts(body: Markup) -> Markup:
    """The page's own script, and the charts' JavaScript where there are any."""
    needed = [_vega()] if 'class="chart"' in body else []
    # A closing tag inside a string of a library would end the element.
    return Markup("\n").join(
        Markup("<script>{}</script>").format(Markup(code.replace("</script", "<\\/script")))
        for code in (*needed, _own("page.js"))
    )


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@functools.cache  # a second to make
def _vega() -> str:
    import vl_convert

    # A module's top-level names would collide with those of the page's other scripts.
    # Its stub asks for a snippet; without one, the bundle gives vegaEmbed to the window.
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return f"(() => {{{bundle}}})();"
