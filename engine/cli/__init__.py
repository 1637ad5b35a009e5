"""The command line, ``stepfuse``: one file per command, torch imported only inside them."""

from stepfuse.engine.cli.commands import app, main, run

__all__ = ["app", "main", "run"]
