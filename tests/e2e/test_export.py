"""`llamafactory-adaptive export` in a process of its own: done, refused, killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from lora import save_adapter
from tiny import save_tiny

from llamafactory_adaptive import cli


pytestmark = pytest.mark.slow


def start(*words, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "llamafactory_adaptive.cli", "export", *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_as_typed_and_a_second_time(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    words = (save_adapter(base, tmp_path / "adapter"), "--for", "llamacpp", "--out", tmp_path / "out")
    done = start(*words, LLAMAFACTORY_ADAPTIVE="0")  # it needs no plugin
    said, complaints = done.communicate(timeout=120)
    assert done.returncode == 0, complaints
    assert "parity    passed" in said
    assert "llama-server --host 127.0.0.1" in said
    assert json.loads((tmp_path / "out" / "parity_certificate.json").read_text())["passed"]
    assert cli.main(["export", *map(str, words)]) == 2
    assert "llamafactory-adaptive: error: out: " in capsys.readouterr().err


def test_a_killed_export_takes_no_name(tmp_path):
    base = save_tiny(tmp_path / "base", num_hidden_layers=8)
    adapter = save_adapter(base, tmp_path / "adapter")
    process = start(adapter, "--for", "merged", "--quantization-aware", "--out", tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.tmp/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
