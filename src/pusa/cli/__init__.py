"""The command line, `pusa`: one file per command group."""

from pusa.cli.root import main

__all__ = ["main"]
