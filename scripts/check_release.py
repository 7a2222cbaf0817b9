"""Does a release say one version everywhere? `make release` runs this on the folder it built into.

The package, the changelog and CITATION.cff have to agree, and the files in the folder have to be of
that version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """The package's."""
    return _found(r'__version__ = "(.+)"', ROOT / "hyperlens/__init__.py")


def problems() -> list[str]:
    """What does not agree with the package's version."""
    now = version()
    cited = _found(r"(?m)^version: (.+)$", ROOT / "CITATION.cff")
    changed = _found(r"(?m)^## \[(\d.*?)\] - \d{4}-\d{2}-\d{2}$", ROOT / "CHANGELOG.md")
    found = {"CITATION.cff": cited, "CHANGELOG.md": changed}
    return [
        f"{name} is of {one}, the package of {now}" for name, one in found.items() if one != now
    ]


def _found(pattern: str, path: Path) -> str:
    match = re.search(pattern, path.read_text(encoding="utf-8"))
    return match[1] if match else "no version"


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    dist = Path(sys.argv[1])
    now = version()
    expected = {f"hyperlens-{now}-py3-none-any.whl", f"hyperlens-{now}.tar.gz"}
    built = {path.name for path in dist.iterdir()}
    wrong = problems()
    if built != expected:
        wrong.append(f"built {', '.join(sorted(built))}, expected {', '.join(sorted(expected))}")
    for one in wrong:
        sys.stderr.write(f"release: {one}\n")
    if not wrong:
        sys.stdout.write(f"hyperlens {now} is in {dist}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
