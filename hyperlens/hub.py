"""What a name on a model hub looks like, and the gist of what libraries say when reading fails."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's kind if it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()[:300]
