"""Memory that comes and goes in chunks is not paged in anew each time."""

import ctypes
import platform
import subprocess
import sys

import pytest

# The number of blocks that glibc maps one by one, outside the heap that it keeps.
MAPPED = """
import ctypes
import torch
from hyperlens.passes.memory import keep_freed_memory

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = MallInfo

def mapped():
    before = mallinfo().hblks
    chunk = torch.empty(31 * 2**20, dtype=torch.uint8)
    return mallinfo().hblks - before

keep_freed_memory()
print(mapped())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="only glibc returns memory so soon; mallinfo2 came with 2.33",
)
@pytest.mark.parametrize(("lesson", "blocks"), [("keep_freed_memory()", 0), ("", 1)])
def test_chunks_come_from_memory_that_is_kept(lesson, blocks):
    """In a process of its own: what was freed earlier decides what the C library has learnt."""
    code = MAPPED.replace("keep_freed_memory()\nprint", f"{lesson}\nprint")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == blocks
