"""Functions of the user's, by "module:function"."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from stepfuse.engine.generate.failures import describe


def find(option: str, name: str) -> Callable[..., Any]:
    """The function ``name``; the working directory is looked through last.

    Raises ValueError that names ``option`` where there is none, or its module cannot be imported.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # last, so that it shadows nothing
    with blaming(f"{option} {name}: cannot import {module!r}"):
        found: Any = importlib.import_module(module)
    for word in function.split("."):
        found = getattr(found, word, None)
    if not callable(found):
        raise ValueError(f"{option} {name}: {module!r} has no function {function!r}")
    result: Callable[..., Any] = found
    return result


@contextlib.contextmanager
def blaming(whom: str) -> Iterator[None]:
    """What the user's code raises inside, SystemExit too, is an error of what was given.

    What it prints goes to stderr, as in workers: stdout may be a log of JSON.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except MemoryError:
        raise
    except SystemExit as error:
        raise ValueError(f"{whom}: it ended the process, with status {error.code}") from error
    except ImportError as error:
        raise ValueError(f"{whom}: {error}") from error
    except Exception as error:
        raise ValueError(f"{whom}: {describe(error)}") from error
