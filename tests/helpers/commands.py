"""The commands as users type them, each in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


BIN = Path(sys.executable).parent
EXAMPLES = ROOT / "examples"


def run(*words, expect=0, **environment):
    return ended(begin(*words, **environment), expect)


def begin(*words, **environment):
    """A command in a session of its own, so that what it starts ends with it if it takes too long."""
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in words], env=env, start_new_session=True, **pipes)


def ended(process, expect=0):
    try:
        out, err = process.communicate(timeout=300)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expect, out[-3000:] + err[-6000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
