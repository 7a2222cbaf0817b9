"""The page itself: one HTML file with everything inside it and nothing fetched."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from markupsafe import Markup

from .. import __version__
from ..errors import ResultsError
from ..files import write_text
from ..findings import Finding
from . import plain, sections
from .contents import Shown, answers, contents
from .footer import footer
from .pairs import Result, told_apart
from .parts import join, note, pair_name, tag
from .scripts import elements, policy, scripts

HERE = Path(__file__).resolve().parent

# Below this width of the stream a result says little about the models people use.
SMALL_WIDTH = 1024
SMALL = (
    "These are small models: a demonstration of the measurements, and no evidence about large ones."
)
DOCUMENT = Markup(
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="generator" content="hyperlens {version}">\n'
    "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    "{body}\n{scripts}\n</body>\n</html>\n"
)


def write_report(path: str | Path, results: Sequence[Result], title: str | None = None) -> Path:
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
    pairs = list(dict.fromkeys(pair_name(result) for result in results))
    shown = list(_shown(results))
    heading = title or ("; ".join(pairs) if len(pairs) < 4 else f"{len(pairs)} pairs of models")
    top = [tag("h1", heading)]
    if title:
        top.append(tag("p", "; ".join(pairs), class_="pairs"))
    if any(result.meta.get("d_model", SMALL_WIDTH) < SMALL_WIDTH for result in results):
        top.append(note(SMALL))
    bodies = (
        tag("section", tag("h2", one.title), one.body, id=one.id, data_section=one.id)
        for one in shown
    )
    body = join(
        [tag("header", *top, contents(shown, pairs)), tag("main", *bodies), footer(results)]
    )
    codes = scripts(body)
    page = DOCUMENT.format(
        policy=policy(codes),
        version=__version__,
        title=f"hyperlens: {heading}",
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        body=body,
        scripts=elements(codes),
    )
    # Model output may hold halves of characters, which no file can.
    clean = str(page).encode("utf-8", "replace").decode("utf-8")
    write_text(Path(path), clean)
    return Path(path)


def section_modules() -> list[ModuleType]:
    """Every section there is, in the order of the page."""
    names = (found.name for found in pkgutil.iter_modules(sections.__path__))
    modules = [import_module(f"{sections.__name__}.{name}") for name in names]
    return sorted(modules, key=lambda module: module.ORDER)


def _shown(results: Sequence[Result]) -> Iterator[Shown]:
    """Every section that has something to show."""
    modules = section_modules()
    for module in modules:
        found = [result for result in results if result.name == module.READS]
        body = module.body(found) if found else None
        if body:
            name = module.__name__.rsplit(".", 1)[-1]
            yield Shown(_id(name), module.TITLE, body, answers(module, found))
    known = {module.READS for module in modules}
    others: dict[str, list[Finding]] = {}
    for result in results:
        if isinstance(result, Finding) and result.name not in known:
            others.setdefault(result.name, []).append(result)
    for name, findings in others.items():
        yield Shown(_id(name), name.replace("_", " ").capitalize(), plain.body(findings), [])


def _id(name: str) -> str:
    return name.replace("_", "-")
