"""What a server or its surroundings can do to a message: leak a key, steer a terminal, end in a traceback."""

import pytest

from eval import completions
from eval.arguments import parse
from eval.completions import BadAnswerError
from eval.errors import UsageError
from eval.redaction import clean, excerpt
from eval.serving import _served, _version
from eval.transport import Patience, ServerFailedError, Site
from tests.eval.asking import OK, asked, logprobs
from tests.helpers.replies import replying


KEY = "sk-THIS/IS+THE=SECRET"
ONCE = Patience(seconds=20, retries=0)


def refusal(url, key=None):
    with pytest.raises(ServerFailedError) as caught:
        asked(url, ONCE, key)
    return str(caught.value)


@pytest.mark.parametrize("before", [0, 250, 285, 295, 299])
def test_no_part_of_a_key_is_left_where_a_message_is_cut(before, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    body = b"x" * before + KEY.encode()
    for reply in ((400, {}, body), (307, {"Location": body.decode()[-199:]}, b"")):
        with replying(reply) as (url, _):
            assert "sk-" not in clean(refusal(url))
    for document in ({"error": body.decode()}, {"choices": [{"index": "x" * (before % 60) + KEY}]}):
        with pytest.raises(BadAnswerError) as caught:
            completions.texts(document, 1)
        assert "sk-" not in clean(str(caught.value))
    with pytest.raises(BadAnswerError) as caught:
        completions.likelihood(logprobs((None, -1, "x" * (before % 40) + KEY, -1)), 3, 1)
    assert "sk-" not in clean(str(caught.value))
    with replying((200, {}, b'{"version": "%s"}' % (b"v" * 70 + KEY.encode()))) as (url, _):
        assert "sk-" not in clean(_version(Site(url)))


@pytest.mark.parametrize("written", [KEY.replace("/", "\\/"), "sk-THIS%2fIS%2bTHE%3dSECRET"])
def test_a_key_is_known_as_other_languages_escape_it(written, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert clean(f"your key {written} is unknown") == "your key *** is unknown"


def test_words_of_a_server_are_one_line_that_steers_no_terminal():
    hostile = "\x1b]0;title\x07\x1b[2J\r\nsecond line \u202eright to left\x9b1m"
    with replying((400, {}, hostile.encode())) as (url, _):
        assert refusal(url).isprintable()
    with pytest.raises(BadAnswerError) as caught:
        completions.texts({"error": {"message": hostile}, "more": 1}, 1)
    assert str(caught.value).isprintable()
    assert excerpt("a\n b\ud800", 10) == "a b?"
    assert len(_served([{"id": hostile * 9}] * 999)) == 300
    assert _served([{"id": hostile}]).isprintable()


@pytest.mark.parametrize("value", [-(10**400), 10**400])
def test_a_whole_number_beyond_floats_is_no_log_probability(value):
    with pytest.raises(BadAnswerError, match="it must be finite and at most 0"):
        completions.likelihood(logprobs((None, -1, value, -1)), 3, 1)
    with pytest.raises(BadAnswerError, match="it must be finite and at most 0"):
        completions.likelihood(logprobs(tops=(None, {"a": -1}, {"a": value}, {"a": -1})), 3, 1)


def test_a_text_longer_than_any_that_can_be_asked_for_is_refused(monkeypatch):
    monkeypatch.setattr(completions, "_LONGEST", 100)
    assert completions.texts({"choices": [{"text": "a" * 100}]}, 1) == ["a" * 100]
    with pytest.raises(BadAnswerError, match="has 101 characters, more than any --max-gen-toks allows"):
        completions.texts({"choices": [{"text": "a" * 101}]}, 1)


def test_passwords_of_a_netrc_file_go_nowhere(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine eval.example login me password other\ndefault login me password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with replying(OK) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy)
        asked("http://eval.example", ONCE)
        asked("http://eval.example", ONCE, "sk-1234567")
    assert [request.get("Authorization") for request in seen] == [None, "Bearer sk-1234567"]


@pytest.mark.parametrize("proxy", ["http://[", "http://127.0.0.1:99999", "::bad", "127.0.0.1:8080",
                                   "http://me:hidden-word@127.0.0.1:99999"])  # fmt: skip
def test_a_proxy_that_is_no_address_is_one_sentence(proxy, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    said = refusal("http://eval.example")
    assert said == "its address, or a proxy of the environment (http_proxy, https_proxy), is none"


def test_a_proxy_that_refuses_is_told_without_its_password(monkeypatch):
    with replying((407, {}, b"")) as (proxy, seen):
        monkeypatch.setenv("https_proxy", proxy.replace("://", "://me:hidden-word@"))
        monkeypatch.setenv("http_proxy", proxy.replace("://", "://me:hidden-word@"))
        for url in ("http://eval.example", "https://eval.example"):
            said = refusal(url)
            assert "407" in said
            assert "hidden-word" not in said
    assert all("Proxy-Authorization" in request for request in seen)


def test_a_server_without_tls_is_not_called_a_lack_of_permission():
    with replying(OK) as (url, _):
        said = refusal(url.replace("http://", "https://"))
    assert said.startswith("no TLS can be spoken with it (")
    assert said.endswith("try http:// in place of https://")


@pytest.fixture
def words(model, tmp_path):
    return ["--base", str(model), "--out", str(tmp_path / "out"), "--protocol", "llm_adapters"]


@pytest.mark.parametrize(
    "url", ["http://a..b", f"http://{'a' * 70}.com", "http://xn--a", "http://.", "http://exa mple", "http://h/\x1b[2J"]
)
def test_an_address_that_can_be_none_is_told_before_the_run(url, words):
    with pytest.raises(UsageError, match=r"is no URL; try http://127"):
        parse([*words, "--base-url", url])


@pytest.mark.parametrize("key", ["sk-a\r\nX-Evil: 1", "sk-\u00fcmlaut-a", "sk-a\udcff", "sk-a\x7fb"])
def test_a_key_that_fits_no_header_is_told_before_the_run_and_not_shown(key, words, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match=r"^OPENAI_API_KEY: a key is one line") as caught:
        parse([*words, "--base-url", "http://127.0.0.1:8000"])
    assert "sk-" not in str(caught.value)


def test_a_line_end_after_a_key_is_no_part_of_it(words, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234567\r\n")
    assert parse([*words, "--base-url", "http://127.0.0.1:8000/v1"]).url == "http://127.0.0.1:8000"
