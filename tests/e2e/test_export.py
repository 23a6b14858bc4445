"""`llamafactory-adaptive export` in a process of its own: done, refused, killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llamafactory_adaptive import cli
from tests.helpers.lora import save_adapter
from tests.helpers.processes import wait_until_ended
from tests.helpers.tiny import save_tiny


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


def wait_for(condition, process=None):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.01)


@pytest.mark.repeats  # make faults kills exports at drawn moments
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_export_takes_no_name_and_cleans_up_where_it_can(number, tmp_path):
    base = save_tiny(tmp_path / "base", num_hidden_layers=8)
    adapter = save_adapter(base, tmp_path / "adapter")
    process = start(adapter, "--for", "merged", "--quantization-aware", "--out", tmp_path / "out")
    wait_for(lambda: list(tmp_path.glob(".out.*.tmp/*.safetensors")), process)
    process.send_signal(number)
    _, complaints = process.communicate(timeout=60)
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in complaints
    if number == signal.SIGKILL:  # nothing can be cleaned up; the next export to that name does it
        words = ("export", str(adapter), "--for", "vllm", "--out", str(tmp_path / "out"))
        assert cli.main([*words]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}
    else:
        assert process.returncode == 128 + number
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


FAKE_VLLM = """
import os, runpy, sys, time, types
class LLM:
    def __init__(self, **settings):
        child = os.fork()
        open(os.path.join({pids!r}, str(os.getpid())), "w")
        time.sleep(120)
if sys.argv[1] == "-c":
    print("0.32.0")
    sys.exit()
platform = types.SimpleNamespace(is_cpu=lambda: True)
parts = {{"": dict(LLM=LLM), ".lora": {{}}, ".lora.request": dict(LoRARequest=None),
         ".platforms": dict(current_platform=platform)}}
for name, content in parts.items():
    sys.modules["vllm" + name] = module = types.ModuleType("vllm" + name)
    module.__dict__.update(content)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_vllm_outlives_a_killed_export(tmp_path):
    (tmp_path / "pids").mkdir()
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n" + FAKE_VLLM.format(pids=str(tmp_path / "pids")))
    python.chmod(0o755)
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    process = start(adapter, "--for", "vllm", "--out", tmp_path / "out", "--vllm-python", python)
    wait_for(lambda: len(list((tmp_path / "pids").iterdir())) == 2, process)
    process.kill()
    process.communicate(timeout=60)
    wait_until_ended(int(path.name) for path in (tmp_path / "pids").iterdir())
