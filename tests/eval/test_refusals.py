"""What would undo the harness's settings, hold a secret or break a reader is refused before anything starts."""

import html
import json
import re
from urllib.parse import quote, quote_plus

import pytest

from eval import reading, run
from eval.arguments import parse
from eval.errors import EvalError, UsageError
from eval.models import Model, base_warnings
from eval.redaction import clean, guarded, redacted


SECRET = "S3CR3T-value"


@pytest.fixture
def words(model, rows, tmp_path):
    def make(*more):
        folders = ["--base", str(model), "--data-dir", str(rows), "--out", str(tmp_path / "out")]
        return [*folders, "--protocol", "llm_adapters", *more]

    return make


def refused(words):
    with pytest.raises(UsageError) as caught:
        parse(words)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "because"),
    [
        ("--config x.yaml", "name the options themselves"),
        ("--conf=x.yaml", "name the options themselves"),
        ("--generation-config auto", "it would change how answers are generated"),
        ("--generation_config=auto", "it would change how answers are generated"),
        ("--override-generation-config '{}'", "it would change how answers are generated"),
        ("--override-generation-config.top_k 5", "it would change how answers are generated"),
        ("--logprobs-mode raw_logits", "likelihoods are those of the model itself"),
        ("--uds /tmp/x", "the harness asks on a port"),
        ("--ud=/tmp/x", "the harness asks on a port"),
        ("--headless", "the harness asks over HTTP"),
        ("--ssl-keyfile x", "without TLS"),
        ("--trust-remote-code", "code that comes with a model is never run"),
        ("--trust_remote", "code that comes with a model is never run"),
        ("--hf-overrides '{\"trust_remote_code\": true}'", "code that comes with a model is never run"),
        ("--tokenizer x", "use --base-tokenizer"),
        ("--lora-modules a=b", "use --adapter"),
        (f"--api-key {SECRET}", "our own server is asked without a key"),
        (f"--api-ke {SECRET}", "our own server is asked without a key"),
        (f"--hf-token={SECRET}", "put it into the environment variable HF_TOKEN"),
        (f"--x-password {SECRET}", "takes a secret"),
        ("host 0.0.0.0", "its first word must be an option"),
    ],
)
def test_words_for_the_server_that_would_undo_a_setting(given, because, words):
    said = refused(words(f"--server-args={given}"))
    assert because in said
    assert SECRET not in said


def test_other_words_for_the_server_pass(words):
    given = (
        "--tensor-parallel-size 2 --max-model-len=4096 --gpu-memory-utilization 0.5 -O3 --hf-overrides '{\"a\": 1}'"
    )
    assert parse(words(f"--server-args={given}")).server.extra[:2] == ("--tensor-parallel-size", "2")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--repeats", "4"], "--repeats: 4 greedy answers to a question are 4 times the same one"),
        (["--repeats", "0", "--temperature", "1"], "--repeats: 0 is invalid: must be between 1 and 1024"),
        (["--top-p", "0.9"], "--top-p: greedy decoding takes the likeliest token"),
        (["--top-p", "0", "--temperature", "1"], "--top-p: 0.0 is invalid"),
        (["--temperature", "nan"], "--temperature: nan is invalid: must be between 0 (greedy) and 2"),
        (["--temperature", "1", "--num-beams", "2"], "--num-beams: beam search does not sample"),
        (["--system-prompt", "x"], "--system-prompt: raw text has no place for it; give --template training too"),
        (["--chat-template-kwargs", "[1]", "--template", "training"], "-kwargs: it must be a JSON object; try"),
        (["--chat-template-kwargs", "[" * 9999, "--template", "training"], "it must be a JSON object"),
        (["--chat-template-kwargs", '{"tokenize": true}', "--template", "training"], "tokenize is set by the harness"),
        (["--no-base-row"], "--no-base-row: nothing is left to ask"),
        (["--max-retries", "-1"], "--max-retries: -1 is invalid: must be between 0 and 100"),
        (["--request-timeout", "inf"], "--request-timeout: inf is invalid: must be above 0"),
        (["--request-timeout", "nan"], "--request-timeout: nan is invalid"),
        (["--num-fewshot", "-1"], "--num-fewshot: -1 is invalid: must be between 0 and 64"),
        (["--max-gen-toks", "0"], "--max-gen-toks: 0 is invalid"),
    ],
)  # fmt: skip
def test_settings_that_say_nothing_sensible(more, message, words):
    assert message in refused(words(*more))


GENERATING = {
    "--temperature": ["0.8"], "--top-p": ["0.9"], "--repeats": ["4"], "--num-beams": ["2"], "--max-gen-toks": ["99"],
    "--strip-thinking": []}  # fmt: skip


@pytest.mark.parametrize("option", GENERATING)
def test_settings_of_generated_answers_where_none_is_generated(option, words):
    more = [option, *GENERATING[option]]
    if option in ("--top-p", "--repeats"):
        more += ["--temperature", "0.8"]
    said = refused(words("--protocol", "lm_eval", "--tasks", "arc_easy,boolq", *more))
    assert f"{option}: no task of these generates text; leave it out, or add --tasks gsm8k" in said
    assert parse(words("--protocol", "lm_eval", "--tasks", "arc_easy,gsm8k", *more))


@pytest.mark.parametrize("url", [f"http://h/?api_key={SECRET}", f"http://me:{SECRET}@h", f"http://h/#{SECRET}"])
def test_an_address_with_a_key_is_refused_and_not_repeated(url, words):
    said = refused(words("--base-url", url))
    assert "put a key into OPENAI_API_KEY" in said
    assert SECRET not in said


def test_options_are_not_abbreviated(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(words("--base-u", "http://x"))
    assert caught.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        ["--base-url", f"http://h/?api_key={SECRET}&x=1"],
        [f"--base-url=https://me:{SECRET}@h/v1"],
        ["--server-args", f"--api-ke {SECRET} --seed 1"],
        ["--server-args", f"--api-key {SECRET}-1 {SECRET}-2 --seed 1"],
        ["--server-args", f"--hf_token={SECRET}"],
        [f'--server-args=--hf-overrides \'{{"api_key": "{SECRET}"}}\''],
        ["--chat-template-kwargs", f'{{"access_token": "{SECRET}"}}'],
        ["--api-key", SECRET, "-x"],
    ],
)
def test_no_secret_of_a_command_line_is_shown(given, capsys):
    assert SECRET not in redacted(given)
    with guarded(given):
        print(redacted(given))
    assert SECRET not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"]
)
def test_values_of_the_environment_are_hidden_in_every_form(name, monkeypatch):
    value = 'k"ey+/<1>é'
    monkeypatch.setenv(name, value)
    for text in (value, json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value), f"a{value}b"):
        assert "ey+" not in clean(text)
    assert "k%22ey" not in clean("http://x/k%22ey%2B%2F%3C1%3E%C3%A9")


def test_a_base_that_an_adapter_names_is_one_line_that_steers_no_terminal(adapter):
    config = {"r": 8, "base_model_name_or_path": "a\x1b[2J\nWARNING: all is well\u202e\ud800"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (warning,) = base_warnings([Model("base", "base", "/b"), Model("x", "adapter", str(adapter))])
    assert warning.isprintable()


LONG = "x" * 300


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base", f"/{LONG}"], "there is no config.json in that folder"),
        (["--base", "~nobody-of-this-name/m"], "there is no config.json in that folder"),
        (["--base=-m"], "--base '-m': it must be a folder or a hub name; try ./FOLDER"),
        (["--base", ""], "--base '': it must be a folder or a hub name"),
        (["--adapter", f"x={LONG}"], "there is no adapter_config.json in that folder"),
        (["--adapter", "x=~nobody-of-this-name/m"], "there is no adapter_config.json in that folder"),
        (["--train-file", LONG], "does not exist"),
        (["--data-dir", LONG], "which does not exist"),
        (["--split", LONG], "which does not exist"),
        (["--out", LONG], "File name too long"),
        (["--plan", LONG], "File name too long"),
        (["--adapter=-x=DIR"], "a letter, digit or '_' first"),
        (["--merged=..=DIR"], "a letter, digit or '_' first"),
        ([f"--merged={LONG}=DIR"], "than 200 bytes"),
        (["--merged=" + "\u00e4" * 101 + "=DIR"], "than 200 bytes"),
    ],
)  # fmt: skip
def test_paths_and_names_that_no_file_can_have(more, message, words, model):
    assert message in refused(words(*(word.replace("DIR", str(model)) for word in more)))
    assert parse(words("--base", "x" * 300, "--base-url", "http://127.0.0.1:8000")).server.offline is False


def test_words_about_tokens_are_no_secrets(words, capsys):
    server = "--max-num-batched-tokens 131072 --return-tokens-as-token-ids --tokenizer-mode deepseek"
    given = ["--base-tokenizer", "tuned-by-us", f"--server-args={server}"]
    assert parse(words(*given)).base_tokenizer == "tuned-by-us"
    assert "***" not in redacted(given)
    with guarded([*given, "--speculative-config", '{"tokenizer": "of-the-draft"}']):
        print("tuned-by-us 131072 deepseek of-the-draft")
    assert capsys.readouterr().out == "tuned-by-us 131072 deepseek of-the-draft\n"


def escaped(value):
    """The same value as writers of URLs, JSON, HTML and Python write it."""
    url = quote(value, safe="")
    yield from (url, re.sub("%..", lambda match: match.group().lower(), url), quote_plus(value, safe="/"))
    yield "".join(f"%{byte:02x}" for byte in value.encode())
    units = value.encode("utf-16-be")
    for form in ("{:04x}", "{:04X}"):
        codes = [form.format(int.from_bytes(units[at : at + 2])) for at in range(0, len(units), 2)]
        yield "".join(f"\\u{code}" for code in codes)
        yield json.dumps({"in": "".join(f"\\u{code}" for code in codes)})
    text = json.dumps(value)
    yield from (text, json.dumps(text), json.dumps(json.dumps(text)), text.replace("/", "\\/"))
    yield text.replace("<", "\\u003C").replace(">", "\\u003e").replace("&", "\\u0026")
    yield from (html.escape(value), "".join(f"&#{ord(c)};" for c in value), "".join(f"&#X{ord(c):X};" for c in value))
    yield html.escape(value).replace("/", "&sol;")
    yield from (repr(value), ascii(value))
    yield "".join(f"\\x{ord(c):02x}" if ord(c) < 256 else ascii(c)[1:-1] for c in value)


@pytest.mark.parametrize("value", ["Key-4/f", "kEy+\"<1>'&\u00e9/ 2\\\\x\U0001f600\n;"])
def test_a_secret_is_hidden_however_its_characters_are_escaped(value, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", value)
    for text in escaped(value):
        hidden = clean(text)
        assert hidden in ("***", '{"in": "***"}') or (set(hidden) <= set("\\\"'*") and "***" in hidden), text
    for other in ("Key-4", "%4bey-4%2", "\\u004bey", "100 % of it & more\\n", "\\" * 100):
        assert clean(other) == other


def test_headers_are_hidden_and_words_are_not():
    assert clean("{'Authorization': 'Bearer abc-1.x_y'}") == "{'Authorization': 'Bearer ***'}"
    assert clean("the Bearer of news, in 2020") == "the Bearer of news, in 2020"
    assert json.loads(clean(json.dumps({"a": '"Bearer tok-1" x'}))) == {"a": '"Bearer ***" x'}


@pytest.mark.parametrize(
    "config",
    [
        '{"r": 8, "rank_pattern": [1]}',
        '{"r": 8, "rank_pattern": {"a": "x"}}',
        '{"r": -3}',
        '{"r": true}',
        '{"r": 8.5}',
        '{"r": null}',
        "[1]",
        "null",
        "{",
        '{"a": ' * 50_000,
        '{"r": 8, "a": ' + "[" * 200 + "]" * 200 + "}",
        '{"r": 8, "a": "' + "x" * 2**20 + '"}',
    ],
    ids=lambda text: text[:40],
)
def test_a_damaged_adapter_is_one_sentence(config, words, adapter, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RESULTS", 2**20)
    (adapter / "adapter_config.json").write_text(config)
    said = refused(words("--adapter", f"a={adapter}"))
    assert "its adapter_config.json cannot be read (" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("base", "named", "warned"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-7B-Instruct", True),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", True),
        ("Qwen/Qwen2.5-7B", "models/Qwen2.5-7B/", False),
        ("hub/models--Qwen--Qwen2.5-7B/snapshots/abc", "Qwen/Qwen2.5-7B", False),
        ("Qwen/Qwen2.5-7B", None, False),
        ("Qwen/Qwen2.5-7B", 5, False),
    ],
)
def test_an_adapter_of_another_base_is_warned_of(base, named, warned, adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": named}))
    said = list(base_warnings([Model("base", "base", base), Model("mine", "adapter", str(adapter))]))
    assert bool(said) == warned
    assert not warned or said[0].startswith(f"mine was trained on {named}")


def test_the_base_that_an_adapter_names_steers_no_terminal(adapter):
    named = "some\x1b[2J\x1b]0;mine\x07/mo\ndel\u202e"
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": named}))
    (said,) = base_warnings([Model("base", "base", "b"), Model("mine", "adapter", str(adapter))])
    assert said.startswith("mine was trained on some?[2J?]0;mine?/mo del?, as its adapter_config.json says")
    assert said.isprintable()


def test_what_others_wrote_into_a_message_steers_no_terminal(words, monkeypatch, capsys):
    def fail(*_):
        raise EvalError("it said \x1b[2J")

    monkeypatch.setattr(run, "run", fail)
    assert run.main(words()) == 2
    assert capsys.readouterr().err == "eval: error: it said ?[2J\n"
