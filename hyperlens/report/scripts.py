"""The JavaScript a page carries inside, each library once, and the policy that keeps it alone."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from ..errors import ResultsError

HERE = Path(__file__).resolve().parent


def scripts(body: Markup) -> list[str]:
    """The code that what is on the page needs, in the order it must run."""
    needed = []
    if 'class="chart"' in body:
        needed.append(_vega())
    if 'class="tokens"' in body:
        needed.append(_circuitsvis())
    needed.append((HERE / "page.js").read_text(encoding="utf-8"))
    return [_inline(code) for code in needed]


def elements(codes: Sequence[str]) -> Markup:
    """The code as script elements."""
    return Markup("\n").join(Markup("<script>{}</script>").format(Markup(code)) for code in codes)


def policy(codes: Sequence[str]) -> str:
    """A Content-Security-Policy: only exactly this code runs, and nothing is loaded."""
    hashes = (hashlib.sha256(code.encode("utf-8")).digest() for code in codes)
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode('ascii')}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )


def _inline(code: str) -> str:
    """Code that may stand inside a script element, byte for byte what a browser will hash."""
    # A comment that names a source map makes developer tools look for a file.
    code = re.sub(r"(?m)^//# sourceMappingURL=.*$", "", code)
    # Parsers turn every line end into \n before they hash.
    code = code.replace("\r\n", "\n").replace("\r", "\n")
    # A closing tag inside a string of a library would end the element, an opening comment and
    # script would hide the closing one.
    return re.sub(r"<(?=/?script[\s/>]|!--)", r"\\x3c", code, flags=re.IGNORECASE)


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
