"""Packages that only export needs, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from stepfuse.kernels.backends import BackendUnavailable


def library(name: str, purpose: str) -> Any:
    """The module ``name``. Raises `BackendUnavailable`, saying what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(
            f"{purpose} needs {name}, which is not there ({error}); `pip install 'stepfuse[onnx]'`"
        ) from None
