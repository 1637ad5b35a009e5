"""Options that leave a setting to the model where they are not given."""

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
