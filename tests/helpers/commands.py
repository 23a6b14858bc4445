"""The commands as users type them, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


BIN = Path(sys.executable).parent
EXAMPLES = ROOT / "examples"


def run(*words, expect=0, **environment):
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([str(w) for w in words], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
    return done
