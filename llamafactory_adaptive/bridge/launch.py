"""Wrappers around the host's launcher and its run_exp, with clean errors and exit codes."""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from llamafactory_adaptive.bridge.arguments import adapter_to_go_on_with, asks_for_adaptive, command_line_settings
from llamafactory_adaptive.bridge.checked_run import CheckedRun, checked_run, launched_run
from llamafactory_adaptive.bridge.resuming import checkpoint_to_resume, refuse_finished_run
from llamafactory_adaptive.bridge.training_run import no_accelerator
from llamafactory_adaptive.errors import (
    AdaptiveConfigError,
    AdaptiveError,
    InfeasibleBudgetError,
    OtherProcessError,
    OutputError,
    PlanError,
)
from llamafactory_adaptive.launcher import decides, is_worker, local_rank
from llamafactory_adaptive.planning.start_message import start_message
from llamafactory_adaptive.reports.plaintext import tell


def with_clean_exit(run_exp: Callable[..., None]) -> Callable[..., None]:
    """Wrap the host's ``run_exp``: user errors on a command line end in one message and exit code 2, no traceback.

    A program that passes ``args`` itself gets the exception.
    """

    @wraps(run_exp)
    def run(args: Any = None, callbacks: Any = None) -> None:
        if args is not None:
            return run_exp(args, callbacks)
        from llamafactory.hparams import read_args

        launched = launched_run.get()
        given = read_args() if launched is None else launched.given
        try:
            run_exp(given, callbacks)
        except AdaptiveError as error:
            exit_with(_as_it_was_raised(error))
        if is_worker() and no_accelerator() and asks_for_adaptive(given):
            _leave_without_finalizing()

    return run


def _as_it_was_raised(error: AdaptiveError) -> AdaptiveError:
    """Return the error of a worker of Ray, which Ray wraps in one of the same class that quotes a traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, AdaptiveError) else error


def _leave_without_finalizing() -> NoReturn:
    """End a finished worker of a CPU job without tearing its interpreter down.

    Threads of gloo may still hold Python objects when the interpreter is torn down, which now and then aborts the
    process (pytorch/pytorch#179291); torchrun then kills the others, perhaps while rank 0 still writes, and reports a
    failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_with(error: AdaptiveError) -> NoReturn:
    """Print a user error, once per node where all its workers have the same, and exit with code 2."""
    # Configuration and plan are the same in every worker of a node: one of them says what is wrong.
    everywhere = isinstance(error, (AdaptiveConfigError, PlanError, InfeasibleBudgetError, OutputError,
                                   OtherProcessError))  # fmt: skip
    if not everywhere or local_rank() == 0:
        tell(f"error: {error}")
    if is_worker() and (folder := os.environ.get(_LAUNCH_ENV)) and os.path.isdir(folder):
        (Path(folder) / _USER_ERROR).touch()
    raise SystemExit(2) from error


# The launcher's empty folder in which its workers note a user error: torchrun ends with 1 whatever they end with.
_LAUNCH_ENV = "LLAMAFACTORY_ADAPTIVE_LAUNCH"
_USER_ERROR = "user_error"


@contextmanager
def _exit_code_of_workers() -> Iterator[None]:
    """End this process as the workers ended that torchrun starts in the context: 2 for a user error, which they told.

    Raises:
        SystemExit: torchrun failed.
    """
    with TemporaryDirectory(prefix="adaptive-") as folder:
        os.environ[_LAUNCH_ENV] = folder
        if "RDZV_ID" in os.environ:
            # Workers that are started again would find the addresses of those before them in the store that torchrun
            # shares with them by default (torch 2.11), and now and then connect to processes that are gone.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        try:
            yield
        except subprocess.CalledProcessError as error:
            raise SystemExit(2 if (Path(folder) / _USER_ERROR).exists() else error.returncode) from error
        finally:
            del os.environ[_LAUNCH_ENV]


def checked_launch(original: Callable[[], None], require_seams: Callable[[], None]) -> Callable[[], None]:
    """Wrap the host's launcher: check an adaptive run, and plan it, before torchrun starts its workers."""

    @wraps(original)
    def launch() -> None:
        if len(sys.argv) < 3 or sys.argv[1] != "train" or {"-h", "--help"} & set(sys.argv):
            return original()
        try:
            checked = prepare_launch(sys.argv[2:], require_seams)
        except AdaptiveError as error:
            exit_with(error)
        except KeyboardInterrupt:
            print("\nllamafactory-adaptive: interrupted before training began", file=sys.stderr)
            raise SystemExit(130) from None
        token = launched_run.set(checked)
        try:
            with nullcontext() if checked is None else _exit_code_of_workers():
                return original()
        finally:
            launched_run.reset(token)

    return launch


def prepare_launch(words: list[str], require_seams: Callable[[], None]) -> CheckedRun | None:
    """Validate ``X.yaml key=value ...`` of an adaptive run; return None for a plain run, which the host reads.

    Where torchrun is about to start on this node alone, the plan is made here, in one process: what a user can mend
    ends in one message and exit code 2, and rank 0 finds the plan in its cache. Of several nodes none plans here: the
    others' torchrun would give up waiting for one that scores for long. Workers are processes of their own, to which
    torchrun gives nothing but the command line: each of them reads the settings once.
    """
    saved, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        if not _mentions_adaptive(words):
            return None
        given = command_line_settings()
    finally:
        sys.argv = saved
    if not asks_for_adaptive(given):
        return None
    require_seams()
    tell(f"checking {words[0]} before anything is loaded")
    checked = checked_run(given, host_too=True)
    args = checked.args
    tell(start_message(checked.config, adapter_to_go_on_with(checked.args)))
    if args.get("do_train") and _starts_torchrun() and _is_only_node():
        from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
        from llamafactory_adaptive.bridge.plans import lock_output_folder
        from llamafactory_adaptive.planning.sources import obtain_plan

        with lock_output_folder(Path(str(args["output_dir"]))):
            checkpoint = checkpoint_to_resume(args)
            refuse_finished_run(args, checkpoint)
            obtain_plan(checked.config, LlamaFactoryRun(checked, checkpoint))
    return checked


def _starts_torchrun() -> bool:
    from llamafactory.extras.misc import get_device_count, is_env_enabled, use_kt, use_ray

    return is_env_enabled("FORCE_TORCHRUN") or (get_device_count() > 1 and not use_ray() and not use_kt())


def _is_only_node() -> bool:
    """Tell whether torchrun starts no processes on other nodes, by the variables that the host gives to it."""
    return decides() and all(os.environ.get(name, "1") == "1" for name in ("NNODES", "MAX_NNODES"))


def _mentions_adaptive(words: list[str]) -> bool:
    """Look for the word adaptive in file and overrides, before anything heavy is imported for a plain run."""
    try:
        # A pipe is the host's to read; it gives what it holds only once.
        text = Path(words[0]).read_bytes() if os.path.isfile(words[0]) else b""
    except OSError:
        return False
    # Without its zero bytes the text of UTF-16, which the host cannot read, is found, too.
    return b"adaptive" in text.replace(b"\0", b"") or any("adaptive" in word for word in words)
