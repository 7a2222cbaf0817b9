"""The page itself: one HTML file with everything inside it and nothing fetched."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..errors import ResultsError
from ..files import expand_user, write_text
from ..results.comparison import Comparison
from ..results.result import Result
from . import plain, sections
from .labels import told_apart
from .parts import join, pair_name, paragraph, tag

HERE = Path(__file__).resolve().parent
AnyResult = Comparison | Result

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


def write_report(path: str | Path, results: Sequence[AnyResult], title: str | None = None) -> Path:
    """Write one self-contained page about any number of results; atomic.

    Args:
        path: of the HTML file, which is replaced if it exists.
        results: comparisons and findings, of one pair of models or of several.
        title: of the page; None names the models.

    Returns:
        The path.

    Raises:
        ResultsError: if there is nothing to show, or the file cannot be written.
    """
    if not results:
        raise ResultsError("expected at least one result to report on, got none")
    results = told_apart(results)
    by_name: dict[str, list[AnyResult]] = defaultdict(list)
    for result in results:
        by_name[result.name].append(result)
    pairs = list(dict.fromkeys(pair_name(result) for result in results))
    shown = list(_shown(by_name))
    heading = title or ("; ".join(pairs) if len(pairs) < 4 else f"{len(pairs)} pairs of models")
    top = [tag("h1", heading)]
    if title:
        top.append(tag("p", "; ".join(pairs), class_="pairs"))
    contents = tag(
        "nav",
        tag("ol", *(tag("li", tag("a", text, href=f"#{name}")) for name, text, _ in shown)),
        aria_label="contents",
    )
    bodies = (
        tag("section", tag("h2", text), body, id=name, data_section=name)
        for name, text, body in shown
    )
    body = join([tag("header", *top, contents), tag("main", *bodies), _footer(results)])
    page = DOCUMENT.format(
        policy=POLICY,
        version=__version__,
        title=f"hyperlens: {heading}",
        style=Markup(_own("page.css")),
        body=body,
        scripts=_scripts(body),
    )
    path = expand_user(path)
    write_text(path, str(page))
    return path


def section_modules() -> list[ModuleType]:
    """Every section there is, in the order of the page."""
    names = (found.name for found in pkgutil.iter_modules(sections.__path__))
    modules = [import_module(f"{sections.__name__}.{name}") for name in names]
    return sorted(modules, key=lambda module: module.ORDER)


def _shown(by_name: Mapping[str, list[AnyResult]]) -> Iterator[tuple[str, str, Markup]]:
    """(id, title, body) of every section that has something to show."""
    modules = section_modules()
    for module in modules:
        if results := by_name.get(module.READS):
            body = _whole(module.READS, module.body, results)
            if body:
                yield module.__name__.rsplit(".", 1)[-1].replace("_", "-"), module.TITLE, body
    with_section = {module.READS for module in modules}
    for name, results in by_name.items():
        if name not in with_section:
            findings = [result for result in results if isinstance(result, Result)]
            if body := _whole(name, plain.body, findings):
                yield name.replace("_", "-"), name.replace("_", " ").capitalize(), body


def _whole(
    name: str, body: Callable[[Any], Markup | None], results: Sequence[AnyResult]
) -> Markup | None:
    """A section's body; what a result lacks, because somebody else wrote it, is one error."""
    try:
        return body(results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(
            f"a result of {name} cannot be shown, it lacks something or has it in another form "
            f"({type(error).__name__}: {error}): expected it as save() wrote it"
        ) from error


def _footer(results: Sequence[AnyResult]) -> Markup:
    meta: dict[str, Any] = dict(results[0].meta)
    versions = ", ".join(f"{name} {version}" for name, version in meta.get("versions", {}).items())
    return tag(
        "footer",
        paragraph(
            f"Made by hyperlens {__version__}. Intervals are 95%, over whole sequences or prompts. "
            "Every number, with options, seeds and hashes, is in the results' JSON files."
        ),
        paragraph(versions) if versions else "",
        paragraph(
            "Measures of arXiv 2605.22579, “Beyond Temperature: Hyperfitting as a Late-Stage "
            "Geometric Expansion”."
        ),
    )


def _scripts(body: Markup) -> Markup:
    """The JavaScript that what is on the page needs, each once."""
    needed = []
    if 'class="chart"' in body:
        needed.append(_vega())
    if 'class="tokens"' in body:
        needed.append(_circuitsvis())
    needed.append(_own("page.js"))
    # A closing tag inside a string of a library would end the element.
    return Markup("\n").join(
        Markup("<script>{}</script>").format(Markup(code.replace("</script", "<\\/script")))
        for code in needed
    )


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _vega() -> str:
    import vl_convert

    # A module's top-level names would collide with those of the page's other scripts.
    # Its stub asks for a snippet; without one, the bundle gives vegaEmbed to the window.
    bundle = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return f"(() => {{{bundle}}})();"


def _circuitsvis() -> str:
    """Read, not imported: the package's import pulls in torch and tries the network."""
    found = importlib.util.find_spec("circuitsvis")
    if found is None or not found.submodule_search_locations:
        raise ResultsError("circuitsvis is not installed: pip install circuitsvis")
    folder = Path(next(iter(found.submodule_search_locations)))
    return (folder / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
