"""``python -m llamafactory_adaptive.cli``: the command line without its script."""

import sys

from llamafactory_adaptive.cli.app import main


if __name__ == "__main__":
    sys.exit(main())
