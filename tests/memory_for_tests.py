"""The peak of this process's memory, as Linux keeps it.

Not `ru_maxrss`: a new process inherits that from the one that started it.
"""

import re
from pathlib import Path

PROC = Path("/proc/self")


def forget_peak() -> int:
    """Let the peak start again from what is held now, and return that."""
    (PROC / "clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most bytes held at once since then."""
    status = (PROC / "status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
