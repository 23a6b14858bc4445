"""The commands as users type them, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


BIN = Path(sys.executable).parent
EXAMPLES = ROOT / "examples"


def run(*words, expect=0, **environment):
    return ended(begin(*words, **environment), expect)


def begin(*words, **environment):
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [str(word) for word in words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process, expect=0, seconds=300):
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == expect, out[-3000:] + err[-6000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
