"""Servers start, are waited for, and are gone in every case. A small script stands in for vLLM."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, alive, processes_naming

from eval.errors import EvalError
from eval.server import Server, ask, check_port, reason


FAKE = str(Path(__file__).with_name("fake_server.py"))


def server(port, tmp_path, *words, seconds=30.0, said=None):
    command = [sys.executable, FAKE, str(port), "base", *words]
    return Server(command, f"http://127.0.0.1:{port}", tmp_path / "log", seconds,
                  say=(said if said is not None else []).append)  # fmt: skip


def test_a_server_is_waited_for_and_gone_afterwards(port, tmp_path):
    with server(port, tmp_path, "--wait", "1") as running:
        assert ask(running.url, "/version") == {"version": "0.0.fake"}
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


def test_an_unreachable_server_is_one_sentence(port):
    with pytest.raises(EvalError) as caught:
        ask(f"http://127.0.0.1:{port}", "/v1/models")
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
