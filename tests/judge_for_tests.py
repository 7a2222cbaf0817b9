"""A chat-completions server on loopback that misbehaves as it is told, and scripted judges."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hyperlens.judging import read_prompt

KEY = "sk-test-0123456789abcdefghij"
Act = Callable[[BaseHTTPRequestHandler], None]


def verdict(
    winner: str = "tie",
    coherence: tuple[Any, Any] = (5, 5),
    diversity: tuple[Any, Any] = (5, 5),
    reason: str = "because",
) -> str:
    """An answer of the form asked for."""
    places = ("first", "second")
    return json.dumps(
        {
            "reason": reason,
            "coherence": dict(zip(places, coherence, strict=True)),
            "diversity": dict(zip(places, diversity, strict=True)),
            "winner": winner,
        }
    )


def always_first(prompt: str) -> str:
    """A judge that looks at the place only."""
    return verdict("first", (9, 2), (9, 2))


def longer(prompt: str) -> str:
    """A judge that likes length."""
    _, first, second = read_prompt(prompt)
    if len(first) == len(second):
        return verdict()
    scores = (8, 3) if len(first) > len(second) else (3, 8)
    return verdict("first" if scores[0] == 8 else "second", scores, scores)


def completion(text: str | None) -> bytes:
    """A chat completion around an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def reply(body: bytes, status: int = 200, **headers: str) -> Act:
    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return act


def says(text: str | None) -> Act:
    return reply(completion(text))


def fails(status: int, message: str = "no", **headers: str) -> Act:
    return reply(json.dumps({"error": {"message": message}}).encode(), status, **headers)


def after(seconds: float, act: Act) -> Act:
    def wait(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        act(handler)

    return wait


class Busy:
    """The most requests that waited for an answer at the same moment."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0

    def during(self, seconds: float, act: Act) -> Act:
        def wait(handler: BaseHTTPRequestHandler) -> None:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            # Counted out before the reply leaves: who has it may ask again at once.
            with self.lock:
                self.now -= 1
            act(handler)

        return wait


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    """Promise twice as much as is sent, though what is sent could be read."""
    body = completion(verdict())
    handler.send_response(200)
    handler.send_header("Content-Length", str(2 * len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def says_nothing(handler: BaseHTTPRequestHandler) -> None:
    """Close without a word."""


def drips(handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then, never slow enough for a time-out of the socket."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.05)


class Server:
    """What the server was asked; `script(n, prompt)` says what it does with request n."""

    def __init__(self, script: Callable[[int, str], Act]) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.url = ""

    @property
    def prompts(self) -> list[str]:
        return [request["body"]["messages"][0]["content"] for request in self.requests]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.requests)
            self.requests.append(
                {"path": handler.path, "headers": dict(handler.headers), "body": body}
            )
        with suppress(BrokenPipeError, ConnectionResetError):  # the other side has given up
            self.script(number, body["messages"][0]["content"])(handler)


@contextmanager
def serving(script: Callable[[int, str], Act]) -> Iterator[Server]:
    """A server on a free port of this machine."""
    server = Server(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
