"""Options that commands with a sampler share: which one it is, and which timesteps it visits."""

from __future__ import annotations

from typing import Any

import typer

from stepfuse.engine.cli.usual import usual
from stepfuse.engine.sampling.methods import names


def method_option(panel: str) -> Any:
    """--method."""
    return usual("The sampler.", panel, "|".join(names()))


def order_option(panel: str) -> Any:
    """--order."""
    return typer.Option(
        help="1, 2 or 3, of dpmpp, dpmpp_sde and unipc. Default: 2.",
        rich_help_panel=panel,
        show_default=False,
    )


def solver_type_option(panel: str) -> Any:
    """--solver-type."""
    return typer.Option(
        metavar="midpoint|heun|bh1|bh2",
        help="Of second order: midpoint or heun, of dpmpp; bh2 or bh1, of unipc.",
        rich_help_panel=panel,
        show_default=False,
    )


def spacing_option(panel: str) -> Any:
    """--spacing."""
    return usual("Which timesteps.", panel, "leading|trailing|linspace|quadratic")


def grid_option(panel: str) -> Any:
    """--grid."""
    return typer.Option(
        metavar="karras|exponential|logsnr|beta|SIGMA,...",
        help="Noise levels instead of timesteps, for solvers from euler to plms.",
        rich_help_panel=panel,
        show_default=False,
    )
