"""The command line, one file per command."""

from llamafactory_adaptive.cli.app import main


__all__ = ["main"]
