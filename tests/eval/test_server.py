"""Servers start, are waited for, and are gone in every case. A small script stands in for vLLM."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval.errors import EvalError
from eval.models import Job, Serving
from eval.protocols import load_tasks
from eval.redaction import redacted
from eval.server import Server, ServerOptions, check_port, environment, reason
from eval.serving import _describe, _probe
from eval.transport import Patience, Site, fetch
from tests.helpers.processes import FAKE_SERVER, ROOT, alive, processes_naming


FAKE = str(FAKE_SERVER)


def server(port, tmp_path, *words, seconds=30.0, said=None):
    command = [sys.executable, FAKE, str(port), "base", *words]
    return Server(command, f"http://127.0.0.1:{port}", tmp_path / "log", seconds,
                  say=(said if said is not None else []).append)  # fmt: skip


def test_a_server_is_waited_for_and_gone_afterwards(port, tmp_path):
    with server(port, tmp_path, "--wait", "1") as running:
        assert fetch(Site(running.url), "/version") == {"version": "0.0.fake"}
        assert processes_naming(f"{FAKE}\0{port}")
    assert not processes_naming(f"{FAKE}\0{port}")
    running.stop()  # twice is as good as once
    check_port(port)


def test_a_process_that_ignores_sigterm_is_killed_with_its_server(port, tmp_path):
    """vLLM's engine is a process of its own."""
    running = server(port, tmp_path, "--child", str(tmp_path / "pids"))
    running.grace_seconds = 1.0
    with running:
        pids = (tmp_path / "pids").read_text().split()
        assert all(alive(pid) for pid in pids)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_happens_inside_ends_the_server(port, tmp_path, error):
    with pytest.raises(error), server(port, tmp_path):
        raise error
    assert not processes_naming(f"{FAKE}\0{port}")


def test_a_server_that_dies_at_start_says_why(port, tmp_path):
    said = "ERROR 01-01 10:00:00 [engine.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried 20 GiB"
    with pytest.raises(EvalError) as caught, server(port, tmp_path, "--say", said, "--exit", "1"):
        pass
    assert str(caught.value) == (
        "the server did not start: exit code 1; torch.OutOfMemoryError: CUDA out of memory. Tried 20 GiB; whole log: "
        f"{tmp_path / 'log'}"
    )


def test_a_server_that_never_answers_is_given_up_and_ended(port, tmp_path):
    with pytest.raises(EvalError, match=r"did not answer within 1 s \(--startup-timeout\)"), \
            server(port, tmp_path, "--wait", "60", seconds=1.0):  # fmt: skip
        pass
    assert not processes_naming(f"{FAKE}\0{port}")


def test_a_server_killed_in_the_middle_is_told_from_a_running_one(port, tmp_path):
    with server(port, tmp_path) as running:
        assert running.died() is None
        for pid in processes_naming(f"{FAKE}\0{port}"):
            if "keeper" not in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
        assert "killed by signal 9; it said nothing" in running.died(patience=10)
    assert not processes_naming(f"{FAKE}\0{port}")


def test_kill_9_of_the_harness_leaves_no_server(port, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from eval.server import Server\n"
        f"log = Path({str(tmp_path / 'log')!r})\n"
        f"with Server([sys.executable, {FAKE!r}, '{port}', 'base'], 'http://127.0.0.1:{port}', log):\n"
        "    print('up', flush=True)\n    time.sleep(60)\n"
    )
    harness = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert harness.stdout.readline() == b"up\n"
    harness.kill()
    harness.wait()
    deadline = time.monotonic() + 15
    while processes_naming(f"{FAKE}\0{port}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_naming(f"{FAKE}\0{port}")


def test_a_taken_port_is_refused_before_anything_starts(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(EvalError, match=rf"--port: {port} on 127.0.0.1 cannot be used \(Address already in use\)"):
            check_port(port)


def test_a_key_of_other_servers_is_not_given_to_ours(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert "VLLM_API_KEY" not in environment(ServerOptions())


def test_keys_are_in_no_log(port, tmp_path):
    with server(port, tmp_path, "--say", "x"):
        pass
    with pytest.raises(EvalError), Server(["false", "--api-key", "s1", "s2", "--x"], "http://127.0.0.1:9",
                                          tmp_path / "log"):  # fmt: skip
        pass
    assert (tmp_path / "log").read_text().splitlines()[0] == "$ false --api-key '***' '***' --x"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--base-url", "https://me:pw@host/v1", "--limit", "4"], "--base-url 'https://***@host/v1' --limit 4"),
        (["--base-url=https://me:p@s/s@host/v1"], "'--base-url=https://***@host/v1'"),
        (["--server-args", "--api-key=s --seed 1"], "--server-args ''\"'\"'--api-key=***'\"'\"' --seed 1'"),
        (["--server-args=--hf-token s"], "'--server-args=--hf-token '\"'\"'***'\"'\"''"),
    ],
)
def test_command_lines_are_written_down_without_secrets(words, shown):
    assert redacted(words) == shown


@pytest.fixture
def ctrl_c():
    """Python's own way with Ctrl-C: workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_waits_until_the_server_is_gone(port, tmp_path, ctrl_c):
    said = []
    running = server(port, tmp_path, "--child", str(tmp_path / "pids"), said=said)
    running.grace_seconds = 2.0
    with pytest.raises(KeyboardInterrupt), running:  # noqa: PT012
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()
        pids = (tmp_path / "pids").read_text().split()
        running.stop()
    assert said[-1] == "  ending the server, at most 2 s more"
    assert not any(alive(pid) for pid in pids)


def serving_of(*tasks):
    job = Job("base", "base", "base", "/b", tuple(load_tasks("lm_eval", tasks)))
    return Serving("/b", "base", (), (job,), "/b")


def test_another_server_on_our_port_is_not_taken_for_ours(port, tmp_path):
    """Two vLLM servers can share a port; the other one serves a model called base too."""
    with server(port, tmp_path) as running, pytest.raises(EvalError, match=r"another server answers .* serves base"):
        _describe(Site(running.url), serving_of("gsm8k"), running, ServerOptions(token="7f").served_name)


@pytest.mark.parametrize(
    ("answers", "tasks", "beams", "message"),
    [
        ({}, ["gsm8k"], 1, "/v1/models lists no models; give an OpenAI-compatible server's address"),
        ({"choices": [{"text": "x", "logprobs": None}]}, ["arc_easy"], 1, "cannot score the tokens of a prompt"),
        ({"choices": []}, ["gsm8k"], 1, r"cannot generate \(its answer has 0 choices where 1 must be\)"),
        ({"choices": []}, ["gsm8k"], 11, "with --num-beams 11; vLLM needs --max-logprobs 22"),
    ],
)
def test_a_foreign_server_is_tried_before_the_run(answers, tasks, beams, message, monkeypatch):
    models = {"data": [{"id": "base"}]} if answers else {}
    replies = {"/v1/models": models, "/v1/completions": answers, "/version": {}}
    monkeypatch.setattr("eval.serving.fetch", lambda site, path, body=None, patience=None: replies[path])
    serving, site = serving_of(*tasks), Site("http://x")
    with pytest.raises(EvalError, match=message):
        _probe(site, _describe(site, serving, None, str), serving, beams, Patience())


def test_an_unreachable_server_is_one_sentence(port):
    with pytest.raises(EvalError) as caught:
        fetch(Site(f"http://127.0.0.1:{port}"), "/v1/models")
    address = f"http://127.0.0.1:{port}/v1/models"
    assert str(caught.value).startswith(f"no OpenAI-compatible server answers at {address}: [Errno")
    assert "refused" in str(caught.value)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("$ x\n(EngineCore pid=5) ERROR 11-22 13:40:44 [core.py:9] ValueError: no KV cache\n"
         "RuntimeError: Engine core initialization failed. See root cause above.\n", "ValueError: no KV cache"),
        ("$ x\nValueError: too long\n(APIServer pid=1) WARNING 11-22 15:15:03 [x.py:2] as in `OSError: [Errno 24]`\n",
         "ValueError: too long"),
        ("$ x\nRuntimeError: Engine core initialization failed. See root cause above.\nwarn('leaked')\n",
         "RuntimeError: Engine core initialization failed. See root cause above."),
        ("$ x\nINFO loading\nloading weights\n", "loading weights"),
        ("$ x\n", "it said nothing (killed from outside?)"),
    ],
)  # fmt: skip
def test_the_reason_is_the_root_cause(log, expected, tmp_path):
    (tmp_path / "log").write_text(log)
    assert reason(tmp_path / "log") == expected
