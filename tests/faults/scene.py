"""Command lines in processes that can be killed, on tiny models, and the uninterrupted runs they are held against.

Commands are forked from a server that has imported everything: a run takes seconds, and a kill hits work, not imports.
"""

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback

import yaml

from tests.helpers.lora import save_adapter
from tests.helpers.processes import ROOT, alive, processes_naming
from tests.helpers.tiny import pruning_settings, save_tiny, settings, tsq_settings, write_datasets


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "peft", "datasets", "deepspeed", "llamafactory_adaptive.cli",
     "llamafactory_adaptive.training.callback", "llamafactory_adaptive.export.exporter",
     "llamafactory.train.tuner", "llamafactory.train.sft.workflow",
     "llamafactory.launcher"]
)  # fmt: skip
METHODS = ("igu", "tsq", "sensitivity")
LIMIT = 180.0  # seconds for one command; nothing here takes a quarter of it


class Command:
    """A command line as a user types it, in a process of its own.

    Args:
        words: ``llamafactory-cli train ...`` or ``llamafactory-adaptive ...``.
        log: file that takes what it prints.
        environment: on top of this process's.
        file_limit: bytes beyond which no file can grow, as on a disk that is full.
    """

    def __init__(self, words, log, environment=None, file_limit=None):
        self.words, self.log = list(map(str, words)), log
        self.process = _context.Process(
            target=_work, args=(self.words, str(log), {**os.environ, **(environment or {})}, file_limit)
        )
        self.started = time.monotonic()
        self.process.start()

    def kill(self):
        """End it as ``kill -9`` does; whether it still ran."""
        ran = self.process.is_alive()
        self.process.kill()
        self.process.join(30)
        return ran and self.process.exitcode == -signal.SIGKILL

    def wait(self):
        """Its exit code; fails where it hangs."""
        self.process.join(LIMIT)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"{' '.join(self.words)} hangs:\n{self.said()[-3000:]}")
        return self.process.exitcode

    def said(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def finish(self, code=0):
        """Wait for it and require its exit code; returns what it printed."""
        exit_code = self.wait()
        said = self.said()
        assert exit_code == code, f"exit code {exit_code}, not {code}:\n{said[-6000:]}"
        if code == 2:
            assert "Traceback" not in said, said[-6000:]
        return said


def _work(words, log, environment, file_limit):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        code = _run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _run(words):
    if words[0] == "llamafactory-cli":
        from llamafactory.launcher import launch

        sys.argv = words
        launch()
        return 0
    from llamafactory_adaptive import cli

    return cli.main(words[1:])


def digests(folder, pattern="*"):
    """SHA-256 of the files that match, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


class Scene:
    """Models, data and settings in one folder, and uninterrupted runs, each made once."""

    def __init__(self, root):
        self.root = root
        self.base = save_tiny(root / "base")
        self.data = write_datasets(root / "data")
        self.adapter = save_adapter(self.base, root / "adapter")
        self._references = {}

    def yaml(self, method, output, **more):
        """A training YAML of twelve steps with a checkpoint every second one; running it again goes on."""
        make = {"igu": pruning_settings, "tsq": tsq_settings, "sensitivity": settings}[method]
        kept = {"max_steps": 12, "seed": 3, "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
        path = output.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(make(self.base, self.data, output, **{**kept, **more})))
        return path

    def train(self, config, log, **how):
        return Command(["llamafactory-cli", "train", config], log, **how)

    def reference(self, method):
        """An uninterrupted run: its folder, and the seconds it took."""
        if method not in self._references:
            output = self.root / f"reference-{method}"
            command = self.train(self.yaml(method, output), self.root / f"{method}.log")
            command.finish()
            # The first one waits for the server's imports: the time of another is what moments are drawn from.
            again = self.root / f"timed-{method}"
            timed = self.train(self.yaml(method, again), self.root / f"{method}.log")
            timed.finish()
            self._references[method] = output, time.monotonic() - timed.started
        return self._references[method]

    def half_trained(self, method, folder):
        """A copy of the reference as a kill after the checkpoint of step 8 would have left it."""
        reference, _ = self.reference(method)
        folder.mkdir(parents=True)
        for step in (2, 4, 6, 8):
            shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        lines = (reference / "adaptive_log.jsonl").read_text().splitlines(keepends=True)
        (folder / "adaptive_log.jsonl").write_text("".join(lines[:4]))
        return self.yaml(method, folder)


def wait_for(condition, command, seconds=60.0):
    """Until ``condition`` holds or the command has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and command.process.is_alive():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def kill_at(command, moment, seconds):
    """Kill after a random share of ``seconds``, drawn from ``moment``; returns the words for the table."""
    time.sleep(random.Random(moment).uniform(0.0, seconds))
    ran = command.kill()
    return f"kill -9 after {time.monotonic() - command.started:.2f} s" + ("" if ran else " (it had just ended)")


def nothing_left_running(text, seconds=20.0):
    """Fail if a process that names ``text`` outlives its parent by more than ``seconds``."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in processes_naming(text) if alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} still run"
        time.sleep(0.1)


__all__ = ["METHODS", "ROOT", "Command", "Scene", "digests", "kill_at", "nothing_left_running", "wait_for"]
