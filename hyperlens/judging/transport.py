"""One HTTP request with a JSON body: no redirects, a limit on time and on size."""

from __future__ import annotations

import ipaddress
import time
import urllib.request
from http.client import HTTPException, IncompleteRead
from typing import NamedTuple
from urllib.parse import urlsplit

LARGEST_REPLY = 16 * 2**20
CHUNK = 2**16

# What goes wrong on the way; OSError covers refusals, resets and time-outs.
FAILURES = (OSError, HTTPException)


class Reply(NamedTuple):
    """What a server said.

    Attributes:
        status: the HTTP status.
        retry_after: the header of this name, if there is one.
        body: what came.
    """

    status: int
    retry_after: str | None
    body: bytes


def post(url: str, body: bytes, headers: dict[str, str], timeout: float) -> Reply:
    """Send one request and read the whole reply, whatever its status.

    Args:
        url: an http or https address.
        body: JSON.
        headers: besides those of the content.
        timeout: seconds, for the connection and again for the reply as a whole.

    Raises:
        OSError, HTTPException: if no whole reply came in time (see `FAILURES`).
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"} | headers
    request = urllib.request.Request(url, body, headers, method="POST")
    opener = _opener(url)
    with opener.open(request, timeout=timeout) as reply:
        # The timeout above is per packet: a server that drips could go on for ever.
        deadline = time.monotonic() + timeout
        pieces, size = [], 0
        while piece := reply.read1(CHUNK):
            size += len(piece)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the reply took longer than {timeout:g} s")
            if size > LARGEST_REPLY:
                raise HTTPException(f"the reply was larger than {LARGEST_REPLY:,} bytes")
            pieces.append(piece)
        if reply.length:
            raise IncompleteRead(b"", reply.length)
        return Reply(reply.status, reply.headers.get("Retry-After"), b"".join(pieces))


def is_loopback(url: str) -> bool:
    """Whether an address is on this very machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Follows no redirect, which would take the key along, and raises for no status."""
    opener = urllib.request.OpenerDirector()
    # The system's proxies, but not for this machine.
    proxies = urllib.request.ProxyHandler({} if is_loopback(url) else None)
    for handler in (proxies, urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    return opener
