"""Program that runs one command of this package for the board, and ends when the board does, however that ends.

Run: ``python -m llamafactory_adaptive.bridge.board.command_process FOLDER WORDS ...`` with a pipe for standard input,
whose other end the board alone has. ``FOLDER`` is that of the output: removed here once the board cannot do so.
"""

import sys
from pathlib import Path

from llamafactory_adaptive.bridge.child import end_with_parent


END_SECONDS = 10.0  # that a command has to end in order, before it is killed


def main() -> int:
    """Run the command whose words this process was given, and return its exit code."""
    end_with_parent(Path(sys.argv[1]), END_SECONDS)
    sys.argv = ["llamafactory-adaptive", *sys.argv[2:]]
    from llamafactory_adaptive.cli.app import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
