"""Every wait on a server has a limit, only what can be mended is asked again, and a key goes to its server alone."""

import contextlib
import json
import socket
import threading
import time

import pytest

from eval import completions
from eval.errors import EvalError
from eval.server import ServerOptions, environment
from eval.transport import Patience, ServerFailedError, Site, fetch, healthy, seconds_of
from tests.eval.asking import OK, asked, logprobs
from tests.helpers.replies import replying


@pytest.mark.parametrize(
    ("wished", "pause"), [("7", 7.0), ("0", 0.0), ("999999", 300.0), ("soon", 1.0), (None, 1.0), ("-5", 1.0)]
)
def test_a_busy_server_is_asked_again_when_it_says_within_bounds(wished, pause):
    headers = {} if wished is None else {"Retry-After": wished}
    with replying((429, headers, b""), OK) as (url, seen):
        assert asked(url) == ([{"fine": 1}], [pause], {"HTTP 429": 1})
    assert len(seen) == 2


def test_a_date_to_come_back_is_understood(monkeypatch):
    monkeypatch.setattr("eval.transport.time.time", lambda: 784111777.0)  # Sun, 06 Nov 1994 08:49:37 GMT
    assert seconds_of("Sun, 06 Nov 1994 08:50:07 GMT") == 30
    assert seconds_of("Sun, 99 Nov 1994") is None
    assert Patience().pause(0, -3600.0) == 0  # a date in the past


def test_pauses_grow_to_a_bound_and_end():
    with replying((503, {}, b"later")) as (url, seen), pytest.raises(ServerFailedError) as caught:
        asked(url, Patience(seconds=20, retries=8))
    assert str(caught.value) == "HTTP 503: later (tried 9 times)"
    assert len(seen) == 9
    assert [Patience().pause(n, None) for n in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_asking_again_cannot_mend_is_asked_once(status):
    with replying((status, {}, b"no")) as (url, seen), pytest.raises(ServerFailedError, match=f"HTTP {status}: no"):
        asked(url)
    assert len(seen) == 1


def test_an_ended_server_is_not_waited_for():
    with replying((500, {}, b"")) as (url, seen), pytest.raises(ServerFailedError, match="it was killed"):
        asked(url, ended=lambda: "it was killed")
    assert len(seen) == 1


def test_a_server_that_takes_a_question_and_never_answers():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerFailedError) as caught:
            asked(url, Patience(seconds=0.5))
        assert str(caught.value) == "it did not answer within 0.5 s (--request-timeout)"
        with pytest.raises(ServerFailedError, match=r"did not answer within 0\.5 s$"):
            fetch(Site(url), "/v1/models", patience=Patience(seconds=0.5, option=""))


@pytest.fixture
def dropping():
    """An address whose host answers no attempt to connect: its queue is full, and Linux drops what comes then."""
    with socket.socket() as deaf, contextlib.ExitStack() as waiting:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        yield f"http://127.0.0.1:{deaf.getsockname()[1]}"


def test_a_host_that_lets_nobody_connect_is_tried_again_and_told_by_its_own_limit(dropping, monkeypatch):
    monkeypatch.setattr("eval.transport._CONNECT_SECONDS", 0.2)
    with pytest.raises(ServerFailedError) as caught:
        asked(dropping, Patience(seconds=20, retries=1))
    assert str(caught.value) == "ClientConnectionError: no connection within 0.2 s (tried 2 times)"


def test_the_limit_of_an_answer_holds_while_connecting_too(dropping):
    with pytest.raises(ServerFailedError, match=r"it did not answer within 0\.2 s \(--request-timeout\)"):
        asked(dropping, Patience(seconds=0.2))


def test_an_answer_that_drips_for_ever_ends_with_the_limit():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def drip():
            peer, _ = listening.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    while True:
                        peer.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        with pytest.raises(ServerFailedError, match="did not answer within 1 s"):
            asked(f"http://127.0.0.1:{listening.getsockname()[1]}", Patience(seconds=1))


@pytest.mark.parametrize(
    "body", [b"{", b"<html>", b"\xff\xfe", b"", b"[" * 100_000, b'{"a": 1e999999999'], ids=lambda b: repr(b[:8])
)
def test_what_is_no_json_is_one_sentence(body):
    with replying((200, {}, body)) as (url, _), pytest.raises(ServerFailedError, match="its answer is no JSON"):
        asked(url)


def test_an_answer_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("eval.transport._LARGEST", 2**20)
    with replying((200, {}, b" " * 2**21)) as (url, _), pytest.raises(ServerFailedError, match="longer than 1 MiB"):
        asked(url)


def test_a_server_that_sends_elsewhere_gets_no_second_question():
    with replying(OK) as (other, seen), replying((307, {"Location": other}, b"")) as (url, _):
        with pytest.raises(ServerFailedError, match=f"it sends on to {other}"):
            asked(url, key="sk-1234567")
        assert not seen


def test_loopback_is_asked_without_the_proxy(monkeypatch):
    with replying(OK) as (proxy, through), replying(OK) as (url, seen):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        asked(url)
        assert healthy(Site(url))
        assert fetch(Site(url), "/v1/models") == {"fine": 1}
        assert (len(seen), through) == (3, [])
        asked("http://eval.example")  # another machine's server is asked through it
        assert [request["path"] for request in through] == ["http://eval.example/x"]


def test_our_own_server_gets_no_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    with replying(OK) as (url, seen):
        fetch(Site(url), "/v1/models")
        fetch(Site(url, "sk-of-another-server"), "/v1/models")
    assert [request.get("Authorization") for request in seen] == [None, "Bearer sk-of-another-server"]
    assert "OPENAI_API_KEY" not in environment(ServerOptions())
    assert "sk-of" not in repr(Site(url, "sk-of-another-server"))


NO_COMPLETION = [None, [], {}, 3, "text", {"choices": None}, {"choices": []}, {"choices": {}}, {"choices": [None]},
                 {"choices": [{"text": "a"}, {"text": "b"}]}, {"object": "error", "message": "broken"},
                 {"error": {"message": "broken"}}, {"choices": [{"text": "a", "index": 5}]},
                 {"choices": [{"text": "a", "index": "x"}]}]  # fmt: skip


@pytest.mark.parametrize("document", [*NO_COMPLETION, {"choices": [{}]}, {"choices": [{"text": None}]},
                                      {"choices": [{"text": ["a"]}]}], ids=str)  # fmt: skip
def test_what_is_no_completion_is_refused(document):
    with pytest.raises(EvalError) as caught:
        completions.texts(document, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        *NO_COMPLETION,
        {"choices": [{"text": "", "logprobs": None}]},
        {"choices": [{"text": "", "logprobs": [1]}]},
        {"choices": [{"text": "", "logprobs": {}}]},
        logprobs((None, -1)),  # two values for three tokens and the generated one
        logprobs((None, -1, -2), (None, {"a": -1}, {"a": -2})),  # the generated token is missing
        logprobs((None, -1, -2, -3, -4)),
        logprobs((None, float("nan"), float("nan"), -1)),
        logprobs((None, -1, float("-inf"), -1)),
        logprobs((None, -1, 0.5, -1)),
        logprobs((None, -1, None, -1)),
        logprobs((None, -1, "-2", -1)),
        logprobs((None, -1, True, -1)),
        logprobs(tops=None),
        logprobs(tops=(None, {"a": -1}, None, {"a": -1})),
        logprobs(tops=(None, {"a": -1}, {}, {"a": -1})),
        logprobs(tops=(None, {"a": -1}, {"a": float("nan")}, {"a": -1})),
    ],
    ids=str,
)
def test_likelihoods_that_are_none_are_refused(document):
    with pytest.raises(EvalError) as caught:
        completions.likelihood(document, 3, 1)
    assert "\n" not in str(caught.value)


def test_answers_that_are_right_are_read():
    tops = (None, {"a": -1}, {"b": -0.5, "a": -2}, {"a": -3})
    assert completions.likelihood(logprobs(tops=tops), 3, 1) == (-3.0, False)
    assert completions.likelihood(logprobs(tops=tops), 3, 2) == (-2.0, False)
    assert completions.likelihood(logprobs(), 3, 1) == (-3.0, True)
    shuffled = {"choices": [{"text": "b", "index": 1}, {"text": "a", "index": 0}]}
    assert completions.texts(shuffled, 2) == ["a", "b"]


def test_half_of_a_surrogate_pair_becomes_a_character_that_can_be_written():
    document = json.loads('{"choices": [{"text": "a\\ud800b \\ud83d\\ude00"}]}')
    assert completions.texts(document, 1) == ["a\ufffdb \U0001f600"]
