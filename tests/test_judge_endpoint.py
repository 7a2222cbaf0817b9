"""Asking a real server on this machine that misbehaves; and where the key does not go."""

import os
import re
import threading
import time

import pytest
from judge_for_tests import (
    KEY,
    Act,
    Busy,
    after,
    completion,
    drips,
    fails,
    hangs_up,
    reply,
    says,
    says_nothing,
    serving,
)

from hyperlens.errors import JudgeError
from hyperlens.judging import Endpoint
from hyperlens.judging.endpoint import LARGEST_REPLY, in_threads, is_loopback

QUICK = {"pause": 0.001, "timeout": 5.0, "retries": 2}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


def answers(endpoint: Endpoint, *prompts: str) -> list[str]:
    found = dict(endpoint.answers(prompts))
    return [found[i] for i in range(len(prompts))]


def test_a_request_is_a_chat_completion() -> None:
    with serving(lambda n, prompt: says(f"re: {prompt} é")) as server:
        judge = Endpoint(server.url + "/", "m-1", parameters={"temperature": 0.5, "top_p": 1})
        assert answers(judge, "one", "two \ud800") == ["re: one é", "re: two \ud800 é"]
    one = min(server.requests, key=lambda request: request["body"]["messages"][0]["content"])
    assert one["path"] == "/v1/chat/completions"
    assert one["body"] == {
        "model": "m-1",
        "messages": [{"role": "user", "content": "one"}],
        "temperature": 0.5,
        "top_p": 1,
    }
    assert one["headers"]["Content-Type"] == "application/json"
    assert "Authorization" not in one["headers"]
    assert Endpoint(server.url + "/chat/completions", "m").url == server.url


@pytest.mark.parametrize(
    "first",
    [
        fails(500),
        fails(503, "busy"),
        fails(429, "slow down"),
        fails(429, "slow down", Retry_After="0.01"),
        fails(408),
        reply(b"{"),
        reply(b""),
        reply(b"<html>\xff</html>"),
        reply(b'{"choices": []}'),
        reply(b'{"choices": [{"message": {"content": [1]}}]}'),
        reply(b'{"error": {"message": "overloaded"}}'),
        hangs_up,
        says_nothing,
        after(2.5, says("late")),
    ],
    ids=range(14),
)
def test_what_may_pass_is_tried_again(first: Act) -> None:
    with serving(lambda n, prompt: says("good") if n else first) as server:
        judge = Endpoint(server.url, "m", pause=0.001, timeout=2.0, retries=1)
        assert answers(judge, "p") == ["good"]
        assert len(server.requests) == 2
        server.script = lambda n, prompt: first
        with pytest.raises(JudgeError, match=r"no answer after 1 retries \(.+\): check"):
            answers(judge, "p")
        assert len(server.requests) == 4


def test_a_reply_that_drips_does_not_last_for_ever() -> None:
    with serving(lambda n, prompt: drips) as server:
        start = time.monotonic()
        with pytest.raises(JudgeError, match=r"took longer than 0\.25 s"):
            answers(Endpoint(server.url, "m", timeout=0.25, retries=0), "p")
        assert time.monotonic() - start < 3


def test_slow_is_not_wrong() -> None:
    with serving(lambda n, prompt: after(0.3, says("good"))) as server:
        assert answers(Endpoint(server.url, "m", **QUICK), "p") == ["good"]
        assert len(server.requests) == 1


def test_nothing_at_all_is_an_answer() -> None:
    with serving(lambda n, prompt: says(None)) as server:
        assert answers(Endpoint(server.url, "m", **QUICK), "p") == [""]
        assert len(server.requests) == 1


def test_a_reply_has_a_largest_size() -> None:
    endless = reply(b" " * (LARGEST_REPLY + 1))
    with serving(lambda n, prompt: endless) as server:
        judge = Endpoint(server.url, "m", pause=0.001, retries=0, timeout=30.0)
        with pytest.raises(JudgeError, match="larger than"):
            answers(judge, "p")


def test_the_server_is_given_the_time_it_asks_for() -> None:
    limited = fails(429, "slow down", Retry_After="0.4")
    with serving(lambda n, prompt: says("good") if n else limited) as server:
        start = time.monotonic()
        assert answers(Endpoint(server.url, "m", **QUICK), "p") == ["good"]
        assert time.monotonic() - start >= 0.4
        server.script = lambda n, prompt: fails(429, "enough for today", Retry_After="86400")
        start = time.monotonic()
        with pytest.raises(JudgeError, match=r"asks to wait 86,400 s \(HTTP 429: enough"):
            answers(Endpoint(server.url, "m", **QUICK), "p")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (fails(401, "bad key"), r"HTTP 401: bad key\): check the key in .* OPENAI_API_KEY"),
        (fails(403), "check the key"),
        (fails(404, "no such model"), r"no such model\): check the model's name, and the base URL"),
        (fails(400, "max_tokens\nis\tnot known"), "HTTP 400: max_tokens is not known"),
        (reply(b"", 302, Location="http://127.0.0.1:1/elsewhere"), "it redirects"),
        (reply(b"", 308, Location="/v2"), "it redirects"),
    ],
)
def test_a_refusal_is_final_and_one_line(act: Act, said: str) -> None:
    with serving(lambda n, prompt: act) as server:
        with pytest.raises(JudgeError, match=said) as caught:
            answers(Endpoint(server.url, "m", workers=1, **QUICK), *"pqrs")
        assert len(server.requests) == 1
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_nobody_there() -> None:
    with serving(lambda n, prompt: says("good")) as server:
        pass
    with pytest.raises(JudgeError, match=r"after 2 retries .*refused"):
        answers(Endpoint(server.url, "m", **QUICK), "p")


# several at a time


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_results_do_not_depend_on_the_workers(workers: int) -> None:
    prompts = [f"p{i}" for i in range(12)]
    busy = Busy()

    def script(n: int, prompt: str) -> Act:
        act = fails(500) if n % 4 == 3 else says(prompt.upper())
        return busy.during(0.02 * (1 + n % 3), act)

    with serving(script) as server:
        judge = Endpoint(server.url, "m", workers=workers, pause=0.001, retries=20)
        assert answers(judge, *prompts) == [prompt.upper() for prompt in prompts]
    assert busy.most <= workers
    if workers > 1:
        assert busy.most > 1


def test_after_an_error_or_an_interruption_nothing_more_is_asked() -> None:
    def script(n: int, prompt: str) -> Act:
        return fails(401) if prompt == "p3" else after(0.02, says("good"))

    with serving(script) as server:
        judge = Endpoint(server.url, "m", workers=2, **QUICK)
        with pytest.raises(JudgeError, match="401"):
            answers(judge, *(f"p{i}" for i in range(200)))
        coming = judge.answers([f"q{i}" for i in range(200)])
        next(coming)
        coming.close()
        time.sleep(0.2)
        asked = len(server.requests)
        assert asked < 100
        time.sleep(0.2)
        assert len(server.requests) == asked


def test_the_pool_gives_each_result_once_and_passes_errors_on() -> None:
    assert dict(in_threads(lambda x, stop: x * x, range(50), 4)) == {x: x * x for x in range(50)}
    assert list(in_threads(lambda x, stop: x, [], 4)) == []

    def work(x: int, stop: threading.Event) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError):
        list(in_threads(work, [1, 0, 2], 1))


# the key


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MY_KEY", f"  {KEY}\n")
    return KEY


def test_the_key_goes_into_one_header_and_nowhere_else(key: str) -> None:
    with serving(lambda n, prompt: says("good")) as server:
        judge = Endpoint(server.url, "m", key_env="MY_KEY", **QUICK)
        answers(judge, "p")
    (request,) = server.requests
    assert request["headers"].pop("Authorization") == f"Bearer {key}"
    assert key not in str(request)
    assert key not in f"{judge!r} {judge} {judge.identity} {vars(judge)}"


def test_a_server_that_echoes_the_key_is_not_quoted(key: str) -> None:
    escaped = "".join(f"\\u{ord(c):04x}" for c in key)  # JSON can hide it
    with serving(lambda n, prompt: fails(401, f"unknown key {key}!")) as server:
        judge = Endpoint(server.url, "m", key_env="MY_KEY", **QUICK)
        for act in (
            fails(401, f"unknown key {key}!"),
            fails(500, "x" * 150 + key),
            reply(f"{key} is no JSON".encode()),
            reply(f'{{"error": "{escaped}"}}'.encode(), 400),
        ):
            server.script = lambda n, prompt, act=act: act
            with pytest.raises(JudgeError) as caught:
                answers(judge, "p")
            chain = caught.value.__context__
            assert not any(part in f"{caught.value} {chain}" for part in (key, key[:10]))
        for body in (completion(f"so: {key}"), completion("KEY").replace(b"KEY", escaped.encode())):
            server.script = lambda n, prompt, body=body: reply(body)
            assert answers(judge, "p")[0].endswith("[key]")


def test_keys_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    url = "http://127.0.0.1:1/v1"
    for value in ("two words of secret", "sécret-secret", "a\nb-secret"):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(JudgeError, match="MY_KEY holds no key") as caught:
            Endpoint(url, "m", key_env="MY_KEY")
        assert "ret" not in str(caught.value).replace("variable", "")
    with pytest.raises(JudgeError, match="is not set") as caught:
        Endpoint(url, "m", key_env="hunter2hunter2")  # perhaps the key itself
    assert "hunter2" not in str(caught.value)
    with pytest.raises(JudgeError, match="not the name of an environment variable") as caught:
        Endpoint(url, "m", key_env=key)
    assert key not in str(caught.value)


def test_the_usual_key_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Endpoint("http://127.0.0.1:1/v1", "m").key() == KEY
    assert Endpoint("https://host.example/v1", "m").key() == KEY
    assert Endpoint("http://host.example/v1", "m").key() is None
    assert Endpoint("http://host.example/v1", "m", key_env="OPENAI_API_KEY").key() == KEY
    for url, local in (("http://[::1]:1", True), ("http://localhost", True), ("http://8.8.8.8", 0)):
        assert is_loopback(url) == bool(local)


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("host:8000/v1", {}, "not an http or https address"),
        ("ftp://host", {}, "not an http or https address"),
        ("http://", {}, "not an http or https address"),
        ("http://host:port/v1", {}, "not an http or https address"),
        ("http://host/v 1", {}, "not an http or https address"),
        (f"https://me:{KEY}@host/v1", {}, "holds a user"),
        (f"https://host/v1?key={KEY}", {}, "holds a user, a query"),
        (f"https://host/{KEY}", {}, "the judge's URL, model or parameters contain the key"),
        (
            "https://host/v1",
            {"parameters": {"x": KEY}},
            "the judge's URL, model or parameters contain the key",
        ),
        ("https://host/v1", {"parameters": {"api_key": "k"}}, "api_key cannot be"),
        ("https://host/v1", {"parameters": {"stream": True}}, "stream cannot be"),
        ("https://host/v1", {"parameters": {"x": object()}}, "not JSON"),
        ("https://host/v1", {"workers": 0}, "workers must be at least 1"),
        ("https://host/v1", {"retries": -1}, "retries must be at least 0"),
        ("https://host/v1", {"timeout": 0.0}, "timeout must be at least"),
        ("https://host/v1", {"timeout": float("inf")}, "timeout must be at most 86400 s, got inf"),
        ("https://host/v1", {"timeout": 1e300}, "timeout must be at most 86400 s"),
        ("https://host/v1", {"model": " "}, "no name"),
    ],
)
def test_endpoints_that_make_no_sense(
    url: str, options: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(JudgeError, match=re.escape(said)) as caught:
        Endpoint(url, **{"model": "m"} | options)
    assert KEY not in str(caught.value)
