"""Options that many commands have."""

from __future__ import annotations

from typing import Any

import typer


def usual(text: str, panel: str, metavar: str | None = None) -> Any:
    """An option whose default, None, is the model's own way."""
    return typer.Option(
        help=f"{text} Default: the model's own way.",
        rich_help_panel=panel,
        metavar=metavar,
        show_default=False,
    )


def model_option(panel: str) -> Any:
    """--model."""
    return typer.Option(
        "--model",
        "-m",
        help="Embedded checkpoint, or the path of a .safetensors file.",
        rich_help_panel=panel,
    )


def backend_option(panel: str, what: str) -> Any:
    """--backend, of ``what``."""
    return typer.Option(
        metavar="auto|reference|cpp|triton",
        help=f"Of {what}; stepfuse doctor lists what runs here.",
        rich_help_panel=panel,
    )


def device_option(panel: str) -> Any:
    """--device."""
    return typer.Option(
        metavar="auto|cpu|cuda", help="auto is cuda where there is one.", rich_help_panel=panel
    )


def threads_option(panel: str) -> Any:
    """--threads."""
    return typer.Option(
        help="CPU threads. Default: PyTorch's choice.", rich_help_panel=panel, show_default=False
    )
