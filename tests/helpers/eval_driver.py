"""``python -m eval.run`` with the fake server in vLLM's place: ``python eval_driver.py 'WORDS FOR THE FAKE' ...``."""

import shlex
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import run


def fake_command(serving, port, options):
    names = ",".join(options.served_name(name) for name in (serving.name, *(a.name for a in serving.adapters)))
    fake = str(Path(__file__).with_name("fake_server.py"))
    return [sys.executable, fake, str(port), names, *shlex.split(sys.argv[1])]


if __name__ == "__main__":
    sys.exit(run.main(sys.argv[2:], fake_command))
