"""Program that runs one command of this package for LLaMA Board, and ends when the board does, however that ends.

Run: ``python -m llamafactory_adaptive.cli.board_command FOLDER SECONDS WORDS ...`` with a pipe for standard input,
whose other end the board alone has. ``FOLDER`` is that of the output: removed here once the board cannot do so. The
command has ``SECONDS`` to end in order then.
"""

import sys
from pathlib import Path

from llamafactory_adaptive.bridge.child import end_with_parent
from llamafactory_adaptive.cli.app import main


if __name__ == "__main__":
    _, folder, seconds, *words = sys.argv
    end_with_parent(Path(folder), float(seconds))
    sys.argv = ["llamafactory-adaptive", *words]
    sys.exit(main())
