"""Runs that are killed, refused, out of disk or beside a hostile server: nothing is lost, leaked or asked twice."""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

from tests.eval.harness import needs_environment
from tests.helpers.processes import FAKE_SERVER, ROOT
from tests.helpers.replies import replying


pytestmark = needs_environment
SECRET = "sk-THIS-IS-THE-SECRET"
TASKS = "gsm8k,arc_easy"


@pytest.fixture
def served(port):
    """Start the fake server as somebody else's; yields its address."""
    started = []

    def start(*words, names="base"):
        started.append(subprocess.Popen([sys.executable, str(FAKE_SERVER), str(port), names, *words]))
        time.sleep(1)
        return f"http://127.0.0.1:{port}"

    yield start
    for server in started:
        server.kill()
        server.wait()


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def questions_kept(folder):
    """Answers in the folder, the line about the server aside."""
    path = folder / "answers.jsonl"
    complete_lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return sum("max_length" not in str(json.loads(line)["answer"]) for line in complete_lines)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(harness, model, tmp_path):
    """kill -9 at three moments; no answer that was kept is asked again; a full disk in between is a message."""
    log, plain, folder = tmp_path / "asked", tmp_path / "asked_plain", tmp_path / "out"
    more = ["--merged", f"tuned={model}", "--log-samples", "--concurrency", "2"]
    settings = {"protocol": "lm_eval", "tasks": TASKS}
    harness.run(*more, fake=f"--log {plain}", out="plain", **settings)
    total = len(lines(plain))
    for answered in (1, total // 4, total // 2 + 1):  # the last one while the second model is asked
        process = harness.start(*more, fake=f"--log {log} --delay 0.05", **settings)
        deadline = time.monotonic() + 120
        while questions_kept(folder) < answered and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not (folder / "eval_results.json").exists()
    kept = questions_kept(folder)
    assert total // 2 < kept < total
    (folder / "answers.jsonl").open("a").write('{"key": "half of a li')
    process = subprocess.Popen(
        harness.words(*more, fake=f"--log {log}", **settings), text=True, stdout=subprocess.PIPE, cwd=ROOT,
        stderr=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, ((folder / "answers.jsonl").stat().st_size + 300,) * 2)
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert "cannot be written (File too large)" in err
    before, kept = len(lines(log)), questions_kept(folder)
    out, _ = harness.run(*more, fake=f"--log {log}", **settings)
    assert "going on with the run in" in out
    assert len(lines(log)) - before == total - kept
    assert set(lines(log)) == set(lines(plain))
    one, other = harness.results("plain"), harness.results()
    assert [one[key] for key in ("scores", "means", "comparisons")] == [
        other[key] for key in ("scores", "means", "comparisons")]  # fmt: skip
    assert harness.samples("plain") == harness.samples()
    _, err = harness.run(*more, expect=2, **settings)
    assert "holds results already, nothing was overwritten" in err


@pytest.mark.parametrize("status", [429, 400])
def test_a_key_is_written_nowhere(status, harness, served, tmp_path, monkeypatch):
    """The server repeats the header that holds the key; asking again mends 429 and cannot mend 400."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    url = served("--refuse", str(status), "--log", str(tmp_path / "asked"))
    process = harness.start("--base-url", url, tasks="gsm8k")
    out, err = harness.finished(process, 0 if status == 429 else 2)
    assert SECRET not in out + err
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    if status == 400:
        assert "Bearer ***" in err  # it was sent, and is hidden


def test_a_server_that_never_answers_ends_the_run_with_a_message(harness):
    _, err = harness.run("--request-timeout", 2, fake="--hang", tasks="gsm8k", expect=2)
    (line,) = [line for line in err.splitlines() if line.startswith("eval: error:")]
    assert "it did not answer within 2 s (--request-timeout)" in line


def test_a_proxy_of_the_environment_is_not_asked_for_our_own_server(harness, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with replying((502, {}, b"")) as (proxy, through):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        harness.run("--limit", 2, "--startup-timeout", 60, tasks="gsm8k")
    assert through == []


def test_sampled_answers_are_asked_each_with_its_own_seed(harness, tmp_path):
    log = tmp_path / "asked"
    harness.run("--temperature", 0.8, "--repeats", 4, "--log-samples", fake=f"--log {log}", tasks="gsm8k,boolq")
    asked = [json.loads(line) for line in lines(log)]
    assert len({body["seed"] for body in asked}) == len(asked) == 2 * 5 * 4
    assert {body["temperature"] for body in asked} == {0.8}
    samples = harness.samples()
    assert {s["repeat"] for s in samples} == {0, 1, 2, 3}
    scores = {s["metric"]: s for s in harness.results()["scores"] if s["task"] == "gsm8k"}
    assert {"pass@2", "pass@4", "maj@4"} <= scores.keys()
    rows = [[s["metrics"]["acc"] for s in samples if (s["task"], s["row"]) == ("gsm8k", row)] for row in range(5)]
    assert scores["acc"]["value"] == pytest.approx(sum(map(sum, rows)) / 20)
    assert scores["pass@4"]["value"] == sum(max(row) for row in rows) / 5
    assert (scores["acc"]["n"], scores["acc"]["repeats"]) == (5, 4)


@pytest.fixture
def adapter_with_template(adapter, tiny_llama):
    """An adapter that brings a tokenizer with a template; its config names another base."""
    for file in tiny_llama.glob("*token*"):
        (adapter / file.name).symlink_to(file)
    (adapter / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[{{ mood }}]"
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen2.5-7B-Instruct"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


def test_template_and_settings_of_an_adapter_reach_every_prompt(harness, adapter_with_template):
    """Its tokenizer stands in for the base's, which has no template; the base it names is another one."""
    out, _ = harness.run(
        "--adapter", f"mine={adapter_with_template}", "--base-tokenizer", "mine", "--template", "training",
        "--num-fewshot", 2, "--system-prompt", "Be brief.", "--chat-template-kwargs", '{"mood": "calm"}',
        "--strip-thinking", "--max-gen-toks", 99, "--log-samples", fake=f"--think --log {harness.out / 'asked'}",
        tasks="gsm8k")  # fmt: skip
    samples = harness.samples()
    assert {s["model"] for s in samples} == {"base", "mine"}
    for sample in samples:
        assert sample["prompt"].startswith("[system]Be brief.[user]What is")
        assert sample["prompt"].count("[user]") == 3
        assert sample["prompt"].endswith(f"[user]{sample['question']}[calm]")
        assert sample["response"].startswith("<think>")
        assert all("77" not in left for left in sample["extracted"].values())
    assert {json.loads(line)["max_tokens"] for line in lines(harness.out / "asked")} == {99}
    warning = "mine was trained on Qwen/Qwen2.5-7B-Instruct"
    assert any(warning in said for said in harness.results()["warnings"])
    assert f"WARNING: {warning}" in out
    assert warning in (harness.out / "out" / "eval_results.txt").read_text()


def test_the_base_need_not_be_a_row(harness, adapter_with_template):
    harness.run("--adapter", f"mine={adapter_with_template}", "--no-base-row", "--template", "training", tasks="gsm8k")
    assert {s["model"] for s in harness.results()["scores"]} == {"mine"}


def test_two_runs_at_once_do_not_mix(harness):
    first = harness.start(fake="--hang", tasks="gsm8k")
    try:
        while "vLLM is up" not in first.stdout.readline():
            assert first.poll() is None
        second = harness.start(tasks="boolq")
        _, err = second.communicate(timeout=120)
        assert second.returncode == 2, err
        assert f"is in use by process {first.pid}" in err
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert "boolq" not in "".join(path.read_text() for path in (harness.out / "out").glob("*.json*"))


def test_figures_of_answers_that_are_none_are_never_made(harness, served):
    """A model list that is wrong, in place of a length: one line, before a question is asked."""
    with replying((200, {}, b'{"data": [{"id": "base", "max_model_len": "abc"}]}')) as (url, _):
        _, err = harness.run("--base-url", url, tasks="gsm8k", expect=2)
    assert "says it takes abc tokens (max_model_len)" in err
