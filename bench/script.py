"""What the scripts share: options, the console they print to, and the file they leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stepfuse.engine.files.writing import check_file, write_file
from stepfuse.kernels.limits import check_threads


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A command line with --json, --rounds and --threads; ``rounds`` is the default."""
    result = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    result.add_argument("--json", type=Path, help="write every sample, and on what, to this file")
    result.add_argument(
        "--rounds", type=int, default=rounds, help=f"that are counted (default {rounds})"
    )
    result.add_argument("--threads", type=int, help="threads of torch, of ours and of the peers")
    return result


def parsed(
    options: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line, checked, and its threads set; whatever cannot be meant ends the program."""
    found = options.parse_args(arguments)
    try:
        check_threads("--threads", found.threads)
        if found.rounds < 1:
            raise ValueError(f"--rounds must be at least 1; got {found.rounds}")
        if found.json:
            check_file(found.json)
    except (ValueError, OSError) as error:
        options.error(str(error))
    if found.threads:
        torch.set_num_threads(found.threads)
    return found


def console(width: int = 120) -> Console:
    """The terminal; ``width`` is that of a file, which has none of its own."""
    found = Console()
    if not found.is_terminal:
        found.width = width
    return found


def save(path: Path | None, document: dict[str, Any]) -> None:
    """Write the document as JSON where a path was given."""
    if path:
        write_file(path, json.dumps(document, indent=1).encode())
