"""A mode that sees every operation, before and after PyTorch's compiler is there."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from stepfuse.engine.replay.watching_mode import WatchingMode


class Names(WatchingMode):
    """Keeps the names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_operations_are_seen_where_a_model_is_compiled() -> None:
    """The handler's own frames are none that the compiler takes."""

    @torch.compile(backend="eager")
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    expected = twice(torch.ones(3))
    with Names() as names:
        assert torch.equal(twice(torch.ones(3)), expected)
        torch.zeros(2) + 1
    assert "add" in names.seen


def test_they_are_seen_without_the_compiler_too() -> None:
    code = (
        "import sys, torch\n"
        "from tests.engine.replay.test_watching_mode import Names\n"
        "with Names() as names:\n"
        "    torch.zeros(2) + 1\n"
        "assert names.seen == ['zeros', 'add'], names.seen\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
