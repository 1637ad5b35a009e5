"""pyarrow, which only jobs with Parquet files need."""

from __future__ import annotations

import importlib
from typing import Any

from stepfuse.kernels.backends import BackendUnavailable


def arrow(purpose: str, module: str = "pyarrow") -> Any:
    """The module; `BackendUnavailable` that begins with ``purpose`` where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"{purpose} needs pyarrow, which is not there ({error}); "
            "`pip install 'stepfuse[parquet]'`"
        ) from None
