"""The demo as the folder of a static Hugging Face Space: `make space`.

A Space of this kind shows a page and runs nothing. Everything is made here, by `hyperlens demo`;
put the folder into the Space's repository to publish it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from hyperlens import __version__
from hyperlens.demo import run_demo

CARD = f"""\
---
title: hyperlens
emoji: 🔍
colorFrom: gray
colorTo: blue
sdk: static
app_file: index.html
pinned: false
license: mit
---

# hyperlens {__version__}: what did fine-tuning change?

The page that `hyperlens demo` writes: the small model that ships with the package, hyperfitted with
all weights and with LoRA on its last five blocks, and beside random changes of the same rank. It
has 3.8 million parameters: a demonstration of the tool, not evidence about large models.
"""


def main() -> None:
    """Run the demo and lay out the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("space", type=Path, help="the folder to make")
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="the demo's own folder"
    )
    args = parser.parse_args()
    demo = run_demo(args.out, progress=sys.stderr.isatty())
    args.space.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(demo.report, args.space / "index.html")
    (args.space / "README.md").write_text(CARD, encoding="utf-8")
    sys.stdout.write(f"{args.space}: README.md, index.html\n")


if __name__ == "__main__":
    main()
