"""What is left for a module that cannot be traced: exchange its GroupNorms for fused ones.

    Sequential(GroupNorm, SiLU) ──► Sequential(FusedGroupNorm with SiLU, Identity)
    GroupNorm                   ──► FusedGroupNorm

in a copy of the module tree that shares every parameter and buffer with the original.
"""

from __future__ import annotations

import copy
from typing import Literal

from torch import Tensor, nn

from stepfuse.engine.passes.graph import PassReport
from stepfuse.kernels.group_norm_silu import group_norm_silu


class FusedGroupNorm(nn.Module):
    """act(GroupNorm(x)), x [N, C, ...], with the parameters of another GroupNorm."""

    def __init__(self, norm: nn.GroupNorm, act: Literal["silu", "none"]) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.act = norm.num_groups, norm.eps, act

    def forward(self, x: Tensor) -> Tensor:
        """Result like x, in its dtype."""
        act: Literal["silu", "none"] = "silu" if self.act == "silu" else "none"
        return group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, act=act)


def with_fused_norms(model: nn.Module) -> tuple[nn.Module, PassReport]:
    """A shallow copy of ``model`` with fused GroupNorms, and what was exchanged."""
    report = PassReport("module replacement")
    return _copied(model, report, {}), report


def _copied(module: nn.Module, report: PassReport, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    if type(module) is nn.GroupNorm:
        report.count()
        done[id(module)] = FusedGroupNorm(module, "none")
        return done[id(module)]
    twin = copy.copy(module)
    done[id(module)] = twin
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = {}
    children = list(module._modules.items())
    for i, (name, child) in enumerate(children):
        if child is None:
            twin._modules[name] = None
            continue
        before = children[i - 1][1] if i else None
        after = children[i + 1][1] if i + 1 < len(children) else None
        in_sequence = type(module) is nn.Sequential
        if in_sequence and type(child) is nn.GroupNorm and type(after) is nn.SiLU:
            report.count()
            twin._modules[name] = FusedGroupNorm(child, "silu")
        elif in_sequence and type(child) is nn.SiLU and type(before) is nn.GroupNorm:
            twin._modules[name] = nn.Identity()
        else:
            twin._modules[name] = _copied(child, report, done)
    return twin
