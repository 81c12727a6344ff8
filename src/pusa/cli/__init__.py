"""Define the command line, `pusa`: one file per group of commands."""

from pusa.cli.root import main

__all__ = ["main"]
