"""A judge behind an OpenAI-compatible HTTP endpoint: chat completions, several at a time, retried.

Three layers: `Endpoint` decides what to ask and what a reply means; `in_threads` asks several
prompts at a time; `post` makes one request.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, IncompleteRead
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from .. import __version__
from ..checks import check_field_types
from ..errors import JudgeError

DEFAULT_KEY = "OPENAI_API_KEY"
PATH = "/chat/completions"
TRY_LATER = {408, 409, 425, 429}
# Parameters that this module sets itself.
RESERVED = {"model", "messages", "stream", "n"}
SECRET = {"api_key", "apikey", "api-key", "authorization"}
# Dummy keys such as "EMPTY", which local servers are given, are not secrets.
SHORTEST_SECRET = 8
# A day: sockets take no infinite number, and nobody waits that long for an answer.
LONGEST_TIMEOUT = 86_400
# If a server asks for a longer pause, it is better to stop and resume in another run.
LONGEST_WAIT = 300.0
LARGEST_REPLY = 16 * 2**20
CHUNK = 2**16
# What `post` raises when a request fails; OSError covers refusals, resets and time-outs.
FAILURES = (OSError, HTTPException)

Item = TypeVar("Item")
Output = TypeVar("Output")


class _TryAgain(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, problem: str, retry_after: str | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind any server that offers OpenAI's chat completions.

    The key is read from the environment for each run, sent in the Authorization header, and stored
    nowhere: not in this object, in results, in cached answers or in messages.

    Attributes:
        url: the base URL, usually ending in /v1.
        model: its name there.
        key_env: NAME of the environment variable that holds the key. None takes OPENAI_API_KEY if
            it is set, and sends it over https or to this machine only.
        parameters: of the request besides model and messages; part of the judge's identity.
        workers: requests at a time; results do not depend on it.
        timeout: seconds to wait for one answer, a day at most.
        retries: attempts after the first, where a failure may pass: no connection, an incomplete
            reply, a time-out, 408, 409, 425, 429, 5xx, a reply that is not a chat completion.
        pause: seconds before the first retry; doubled each time, or what the server asks for.
        seed: of the random part of the pauses.

    Raises:
        JudgeError: if an attribute is invalid.

    >>> Endpoint("http://localhost:8000/v1", "some-model").identity["model"]
    'some-model'
    """

    url: str
    model: str
    key_env: str | None = field(default=None, repr=False)
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 800}
    )
    workers: int = 4
    timeout: float = 60.0
    retries: int = 5
    pause: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_field_types(self)
        url = self.url.rstrip("/").removesuffix(PATH)
        object.__setattr__(self, "url", url)
        _check_url(url)
        if not self.model.strip():
            raise JudgeError("the judge's model has no name: give its name at the server")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise JudgeError(
                "key_env is not the name of an environment variable: put the key into a variable "
                "and give the variable's name"
            )
        self._check_parameters()
        for name, least in (("workers", 1), ("retries", 0), ("pause", 0), ("timeout", 1e-3)):
            if not getattr(self, name) >= least:
                raise JudgeError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.timeout <= LONGEST_TIMEOUT:
            raise JudgeError(f"timeout must be at most {LONGEST_TIMEOUT} s, got {self.timeout}")
        self.key()

    def _check_parameters(self) -> None:
        for name in self.parameters:
            if name in RESERVED or name.lower() in SECRET:
                raise JudgeError(f"{name} cannot be a parameter of a judge: leave it out")
        try:
            json.dumps(self.identity, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise JudgeError(f"the judge's parameters are not JSON values: {error}") from None

    @property
    def identity(self) -> dict[str, Any]:
        """Server, model and parameters: what answers depend on."""
        about = {"kind": "endpoint", "url": self.url, "model": self.model}
        return {**about, "parameters": dict(self.parameters)}

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """Yield (index, answer) for every prompt, as answers arrive.

        Raises:
            JudgeError: if the server refuses, or fails too often.
        """
        key = self.key()
        return in_threads(lambda prompt, stop: self._ask(prompt, key, stop), prompts, self.workers)

    def key(self) -> str | None:
        """The key as the environment has it now.

        Raises:
            JudgeError: if the variable named by `key_env` is not set, or holds no key.
        """
        key = os.environ.get(self.key_env or DEFAULT_KEY, "").strip()
        if not key:
            if self.key_env is None:
                return None
            raise JudgeError("the environment variable that key_env names is not set: export it")
        if self.key_env is None and not (self.url.startswith("https:") or is_loopback(self.url)):
            return None
        if not re.fullmatch(r"[!-~]+", key):
            raise JudgeError(
                f"the environment variable {self.key_env or DEFAULT_KEY} holds no key: expected "
                "ASCII without spaces"
            )
        if len(key) >= SHORTEST_SECRET and key in json.dumps(self.identity):
            raise JudgeError("the judge's URL, model or parameters contain the key: remove it")
        return key

    def _ask(self, prompt: str, key: str | None, stop: threading.Event) -> str:
        # A generator per prompt, so that pauses do not depend on how threads are scheduled.
        generator = random.Random(f"{self.seed} {prompt!a}")
        for attempt in range(self.retries + 1):
            try:
                return self._request(prompt, key)
            except _TryAgain as failure:
                problem = str(failure)
                seconds = wait(attempt, self.pause, generator, failure.retry_after)
            if seconds > LONGEST_WAIT:
                raise JudgeError(
                    f"the judge at {self.url} asks to wait {seconds:,.0f} s ({problem}): run the "
                    "same again then"
                )
            if attempt < self.retries and stop.wait(seconds):
                break
        raise JudgeError(
            f"the judge at {self.url} gave no answer after {self.retries} retries ({problem}): "
            "check that it runs, or allow more time or retries"
        )

    def _request(self, prompt: str, key: str | None) -> str:
        message = {"role": "user", "content": prompt}
        body = json.dumps({**self.parameters, "model": self.model, "messages": [message]})
        headers = {"User-Agent": f"hyperlens/{__version__}"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            reply = post(self.url + PATH, body.encode(), headers, self.timeout)
        except FAILURES as error:
            reason = getattr(error, "reason", None) or error
            raise _TryAgain(_line(str(reason) or type(error).__name__, key)) from None
        text = reply.body.decode("utf-8", "replace")
        if reply.status == HTTPStatus.OK:
            return _without(key, _content(text, key))
        problem = f"HTTP {reply.status}: {_message(text, key)}"
        if reply.status in TRY_LATER or reply.status >= 500:
            raise _TryAgain(problem, reply.retry_after)
        advice = self._advice(reply.status)
        raise JudgeError(f"the judge at {self.url} refuses ({problem}): {advice}")

    def _advice(self, status: int) -> str:
        if status < 400:
            return "it redirects, and a key is not sent along; give the address it redirects to"
        if status in (401, 403):
            return f"check the key in the environment variable {self.key_env or DEFAULT_KEY}"
        if status == HTTPStatus.NOT_FOUND:
            return "check the model's name, and the base URL, which usually ends in /v1"
        return "check the judge's model and parameters"


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch(r"[!-~]+", url):
        raise JudgeError(
            "the judge's URL is not an http or https address: give one such as http://host:8000/v1"
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise JudgeError(
            "the judge's URL holds a user, a query or a fragment: give the address alone, and a "
            "key through the environment"
        )


def _content(text: str, key: str | None) -> str:
    """What the model answered; no content counts as an empty answer."""
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _TryAgain(f"not a chat completion: {_message(text, key)}") from None
    if content is not None and not isinstance(content, str):
        raise _TryAgain("not a chat completion: its content is not text")
    return content or ""


def _message(text: str, key: str | None) -> str:
    """The server's error message, or the beginning of what it sent."""
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    return _line(text, key) or "an empty reply"


def _line(text: str, key: str | None) -> str:
    """One short line of a text."""
    printable = "".join(c if c.isprintable() else " " for c in _without(key, text))
    return " ".join(printable.split())[:160]


def _without(key: str | None, text: str) -> str:
    """The text with the key blanked out: a server may echo it, in errors or in answers."""
    if key is None or len(key) < SHORTEST_SECRET:
        return text
    return text.replace(key, "[key]")


def wait(attempt: int, pause: float, generator: random.Random, retry_after: str | None) -> float:
    """Seconds to wait after a failed attempt.

    `pause` doubled with every attempt, times a random factor from 0.5 to 1.5 so that several
    workers do not return at once; at least what the server asked for.

    Args:
        attempt: 0 for the first.
        pause: seconds after the first.
        generator: where the factor is drawn from.
        retry_after: the header of this name: seconds, or a date.

    >>> wait(0, 1.0, random.Random(0), "7")
    7.0
    """
    backoff = min(pause * 2.0**attempt * generator.uniform(0.5, 1.5), LONGEST_WAIT)
    return max(backoff, _asked_for(retry_after))


def _asked_for(retry_after: str | None) -> float:
    if not retry_after:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def in_threads(
    work: Callable[[Item, threading.Event], Output], items: Sequence[Item], workers: int
) -> Generator[tuple[int, Output], None, None]:
    """Yield (index, result) for every item, as results arrive.

    The threads are daemons, unlike those of concurrent.futures: Ctrl-C waits for none of them.

    Args:
        work: called with an item and an event that is set once nobody waits for its result.
        items: begun in this order.
        workers: how many at a time.

    Raises:
        BaseException: the first one that `work` raised; what is still running is abandoned.
    """
    todo: SimpleQueue[tuple[int, Item]] = SimpleQueue()
    for numbered in enumerate(items):
        todo.put(numbered)
    done: SimpleQueue[tuple[int, Output] | BaseException] = SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                index, item = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((index, work(item, stop)))
            except BaseException as error:
                done.put(error)
                return

    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            output = done.get()
            if isinstance(output, BaseException):
                raise output
            yield output
    finally:
        stop.set()


class Reply(NamedTuple):
    """A server's reply.

    Attributes:
        status: the HTTP status.
        retry_after: the header of this name, if there is one.
        body: the content.
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
        OSError, HTTPException: if no complete reply came in time (see `FAILURES`).
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"} | headers
    request = urllib.request.Request(url, body, headers, method="POST")
    opener = _opener(url)
    with opener.open(request, timeout=timeout) as reply:
        # The timeout above is per packet: a server that sends slowly could go on for ever.
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
    """Whether an address is on this very machine.

    >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("http://host.example/v1")
    (True, False)
    """
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
