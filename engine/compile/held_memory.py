"""Where the weights of a model and what was computed from them lie, in words."""

from __future__ import annotations

from torch import Tensor, nn

from stepfuse.engine.compile.compiled import Compiled
from stepfuse.engine.compile.network import CompiledNetwork
from stepfuse.engine.compile.numbered import Numbered
from stepfuse.engine.compile.weights.parked import Files
from stepfuse.engine.compile.weights.released import Released


def held_memory(model: nn.Module, network: Compiled | Numbered) -> str:
    """What is held for a network: constants of its own, and the model's weights, where they are."""
    weights = [*model.parameters(), *model.buffers()]
    freed = sum(w.nbytes for w in released_weights(model))
    files = Files()
    filed = sum(w.nbytes for w in weights if w in files)
    text = f"{network.nbytes() / _MB:.1f} MB packed and tabulated"
    text += f"; model {(sum(w.nbytes for w in weights) - freed - filed) / _MB:.1f} MB"
    text += f", {filed / _MB:.1f} MB in a file" if filed else ""
    text += f", {freed / _MB:.1f} MB released" if freed else ""
    inner = network.network if isinstance(network, Numbered) else network
    if not isinstance(inner, CompiledNetwork):
        return text
    text += f" ({inner.weights.note})" if inner.weights.note else ""
    if inner.turned:
        megabytes = sum(inner.turned.values()) / _MB
        text += f"; {len(inner.turned)} filters, {megabytes:.1f} MB, turned where they lie"
    return text + "".join(f"; {n} copied: {why}" for why, n in sorted(inner.left.items()))


def released_weights(model: nn.Module) -> list[Tensor]:
    """Those that were freed."""
    return [w for w in (*model.parameters(), *model.buffers()) if isinstance(w, Released)]


_MB = 1 << 20
