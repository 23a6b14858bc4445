"""``llamafactory-adaptive train``: LLaMA-Factory's training, with the start-up hook in place."""

import argparse
import sys
from pathlib import Path

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.reports.plaintext import tell


def train(arguments: argparse.Namespace) -> int:
    """Run LLaMA-Factory's launcher, with the hook in place here and in every torchrun worker."""
    require_enabled()
    from llamafactory_adaptive.bridge.arguments import check_config_file

    check_config_file(arguments.config)
    tell(f"training {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    sys.argv = ["llamafactory-cli", "train", str(arguments.config), *arguments.overrides]
    from llamafactory import launcher

    launcher.__file__ = str(Path(_bootstrap.__file__).resolve())  # the file torchrun is told to run
    launcher.launch()
    return 0
