"""A judge behind an OpenAI-compatible HTTP endpoint: chat completions, with patience."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..errors import JudgeError
from .backoff import LONGEST_WAIT, wait
from .pool import in_threads
from .transport import FAILURES, is_loopback, post

DEFAULT_KEY = "OPENAI_API_KEY"
PATH = "/chat/completions"
TRY_LATER = {408, 409, 425, 429}
OURS = {"model", "messages", "stream", "n"}
SECRET = {"api_key", "apikey", "api-key", "authorization"}
# Placeholders such as "EMPTY", which local servers are given, are no secrets.
SHORTEST_SECRET = 8
# A day: sockets take no infinite number, and nobody waits that long for an answer.
LONGEST_TIMEOUT = 86_400


class _TryAgain(Exception):
    """An attempt that failed in a way that may pass."""

    def __init__(self, problem: str, retry_after: str | None = None) -> None:
        super().__init__(problem)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind any server that speaks OpenAI's chat completions.

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
        retries: attempts after the first, where a failure may pass: no connection, no whole reply,
            a time-out, 408, 409, 425, 429, 5xx, a reply that is no chat completion.
        pause: seconds before the first of them; doubled each time, or what the server asks for.
        seed: of the random part of the pauses.

    Raises:
        JudgeError: if an attribute makes no sense.
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
        url = self.url.rstrip("/").removesuffix(PATH)
        object.__setattr__(self, "url", url)
        _check_url(url)
        if not self.model.strip():
            raise JudgeError("the judge's model has no name: give the one its server knows it by")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise JudgeError(
                "key_env is no name of an environment variable: put the key into a variable and "
                "give the variable's name"
            )
        for name in self.parameters:
            if name in OURS or name.lower() in SECRET:
                raise JudgeError(f"{name} cannot be a parameter of a judge: leave it out")
        try:
            json.dumps(self.identity, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise JudgeError(f"the judge's parameters are no JSON values: {error}") from None
        for name, least in (("workers", 1), ("retries", 0), ("pause", 0), ("timeout", 1e-3)):
            if not getattr(self, name) >= least:
                raise JudgeError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.timeout <= LONGEST_TIMEOUT:
            raise JudgeError(f"timeout must be at most {LONGEST_TIMEOUT} s, got {self.timeout}")
        self.key()

    @property
    def identity(self) -> dict[str, Any]:
        """Server, model and parameters: what answers depend on."""
        about = {"kind": "endpoint", "url": self.url, "model": self.model}
        return {**about, "parameters": dict(self.parameters)}

    def answers(self, prompts: Sequence[str]) -> Generator[tuple[int, str], None, None]:
        """(index, answer) of every prompt, as they come.

        Raises:
            JudgeError: if the server refuses, or fails too often.
        """
        key = self.key()
        return in_threads(lambda prompt, stop: self._ask(prompt, key, stop), prompts, self.workers)

    def key(self) -> str | None:
        """The key as the environment has it now.

        Raises:
            JudgeError: if the variable that was named is not set, or holds no key.
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
            raise JudgeError("the key stands in the judge's URL, model or parameters: remove it")
        return key

    def _ask(self, prompt: str, key: str | None, stop: threading.Event) -> str:
        # Of its own per prompt, so that pauses do not depend on the threads.
        dice = random.Random(f"{self.seed} {prompt!a}")
        for attempt in range(self.retries + 1):
            try:
                return self._once(prompt, key)
            except _TryAgain as failure:
                problem = str(failure)
                seconds = wait(attempt, self.pause, dice, failure.retry_after)
            if seconds > LONGEST_WAIT:
                raise JudgeError(
                    f"the judge at {self.url} asks to wait {seconds:,.0f} s ({problem}): go on then"
                )
            if attempt < self.retries and stop.wait(seconds):
                break
        raise JudgeError(
            f"the judge at {self.url} gave no answer after {self.retries} retries ({problem}): "
            "check that it runs, or allow more time or retries"
        )

    def _once(self, prompt: str, key: str | None) -> str:
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
            return "it points elsewhere, and a key is not sent there; give the address it points to"
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
        raise JudgeError("the judge's URL is no http or https address, as in http://host:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise JudgeError(
            "the judge's URL holds a user, a query or a fragment: give the address alone, and a "
            "key through the environment"
        )


def _content(text: str, key: str | None) -> str:
    """What the model said; nothing at all is an answer too."""
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _TryAgain(f"no chat completion: {_message(text, key)}") from None
    if content is not None and not isinstance(content, str):
        raise _TryAgain("no chat completion: its content is no text")
    return content or ""


def _message(text: str, key: str | None) -> str:
    """The server's own words."""
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
    """A server may echo the key, in errors or in answers: it goes no further."""
    if key is None or len(key) < SHORTEST_SECRET:
        return text
    return text.replace(key, "[key]")
