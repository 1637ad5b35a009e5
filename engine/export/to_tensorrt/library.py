"""TensorRT and TensorRT-RTX as one library: which is here, what it says, and how far it has come.

The two have one Python interface. They differ where this module decides:

    ``tensorrt``      builds for the GPU it runs on, and times kernels on it
    ``tensorrt_rtx``  builds without a GPU, for compute capabilities that are named; compiles the
                      rest on the machine that runs the engine
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.checks import check_word, received

# name of the library -> the modules it may be installed as
MODULES = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL = "`pip install 'stepfuse[tensorrt]'` installs TensorRT-RTX, which builds without a GPU"


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx".
        module: what was imported.
    """

    name: str
    module: Any

    @property
    def version(self) -> str:
        """Such as "1.7.1.116"; an engine runs with the version that built it."""
        return str(self.module.__version__)

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The ones that can be named when building, as "sm_89"; none where the GPU decides."""
        if not hasattr(self.module.IBuilderConfig, "set_compute_capability"):
            return ()
        names = self.module.ComputeCapability.__members__
        return tuple(f"sm_{name[2:]}" for name in names if name.startswith("SM"))

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_library(name: str | None = None) -> Library:
    """The library of that name; for None the first that is installed, `tensorrt_rtx` before
    `tensorrt` where PyTorch sees no GPU to build on.

    Raises ValueError for a name that does not exist, `BackendUnavailable` where there is none.
    """
    if name is not None:
        check_word("library", name, MODULES, "None")
    names = [name] if name is not None else _order()
    reasons = []
    for candidate in names:
        module, reason = _import(candidate)
        if module is not None:
            return Library(candidate, module)
        reasons.append(reason)
    raise BackendUnavailable(f"{'; '.join(reasons)}; {INSTALL}")


def _order() -> list[str]:
    import torch

    return sorted(MODULES, reverse=not torch.cuda.is_available())


@functools.cache
def _import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    reasons = []
    for module in MODULES[name]:
        try:
            return importlib.import_module(module), ""
        except ModuleNotFoundError as error:
            if error.name != module:
                reasons.append(str(error))
        except (ImportError, OSError) as error:
            # installed, but a shared library is missing or does not fit
            reasons.append(f"{module}: {' '.join(str(error).split())}")
    return None, f"{name} is not there ({'; '.join(reasons) or 'not installed'})"


class Messages:
    """Collects what the library says; hand ``logger`` to its objects.

    Args:
        library: whose logger it is.
        on_error: called with each error as it comes.
    """

    def __init__(self, library: Library) -> None:
        base: Any = library.module.ILogger
        severity = base.Severity
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers: list[str] = []
        collected = self

        class Logger(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, level: Any, text: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    collected.errors.append(" ".join(text.split()))
                elif level == severity.WARNING:
                    collected.warnings.append(" ".join(text.split()))
                elif text.startswith("Layers:\n"):
                    collected.layers.extend(text.splitlines()[1:])

        self.logger = Logger()

    def reason(self) -> str:
        """The errors in one line, without those that only say that there is no GPU."""
        told = [error for error in self.errors if "cudaError 35" not in error] or self.errors
        return "; ".join(dict.fromkeys(told)) or "the library gave no reason"


def progress_monitor(library: Library, advance: Callable[[str, int], bool]) -> Any | None:
    """An object for ``IBuilderConfig.progress_monitor``, or None where the library has no such.

    ``advance(phase, steps)`` is called when a phase starts, with its number of steps, and with -1
    steps whenever one of them is done. Where it returns False the build ends early.
    """
    base: Any = getattr(library.module, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            advance(phase, steps)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return advance(phase, -1)

    return Monitor()


def parse_compute_capabilities(
    library: Library, asked: Sequence[str] | str | None
) -> tuple[str, ...]:
    """The names as "sm_89", checked against what the library can build for.

    None leaves the choice to the library: the GPU of this machine, or all that it knows. Raises
    ValueError with the accepted ones.
    """
    if asked is None:
        return ()
    words = asked.split(",") if isinstance(asked, str) else asked
    listed = isinstance(words, (list, tuple)) and len(words) > 0
    if not listed or not all(isinstance(word, str) for word in words):
        raise TypeError(
            f"compute_capability must be 'sm_89', a list of such, or None; got {received(asked)}"
        )
    accepted = library.compute_capabilities
    if not accepted:
        raise ValueError(
            f"compute_capability={asked!r}: {library} builds for the GPU of this machine; "
            "accepted: None"
        )
    names = [f"sm_{word.strip().lower().removeprefix('sm').lstrip('_')}" for word in words]
    names = [name.replace(".", "") for name in names]
    for word, name in zip(words, names, strict=True):
        if name not in accepted:
            raise ValueError(
                f"compute_capability must be of {', '.join(accepted)} ({library}); got {word!r}"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"compute_capability names one twice; got {asked!r}")
    return tuple(names)
