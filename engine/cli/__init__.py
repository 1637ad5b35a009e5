"""The command line, ``stepfuse``: a file for each command, torch imported only where one runs.

Nothing else in ``engine`` imports from here.
"""

from stepfuse.engine.cli.commands import app, main, run

__all__ = ["app", "main", "run"]
