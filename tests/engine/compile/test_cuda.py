"""What CUDA gets: whole networks on a device that computes shapes, small ones in the interpreter.

No kernel runs on a GPU here. The first kind shows that a network of full size is rewritten and runs
without a host sync; the second that the graph with the Triton op in it computes the network.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.engine.compile.fake_cuda import DEVICE, fake_cuda, module_on_cuda
from tests.engine.compile.networks import distance, own, small, stable_diffusion
from tests.kernels.triton_modes import interpreted
from torch import nn

from stepfuse import CFG, Sampler, Schedule
from stepfuse.bench.networks import cifar10
from stepfuse.engine.compile.graph import PassContext, calls, finish
from stepfuse.engine.compile.network import CompiledNetwork, Settings
from stepfuse.engine.compile.network_cache import NetworkCache
from stepfuse.engine.compile.optimize import optimize
from stepfuse.engine.compile.pass_order import PASSES
from stepfuse.engine.compile.rewrite import rewrite
from stepfuse.engine.compile.tracing.trace import trace
from stepfuse.engine.replay.capture import CaptureRefused
from stepfuse.engine.sampling.lint import _Watch, check_capturable
from stepfuse.kernels.group_norm_silu import OP

# the interpreter's sums against eager ones, float32: 1e-7 each over a few hundred terms
INTERPRETED = 2e-6
# bfloat16 keeps 8 bits, and the interpreter cuts the ninth off instead of rounding
INTERPRETED_BF16 = 3e-2
ONLY_CPU = ("merge_linears", "concatenate", "attention", "convolution_forms", "fold_group_norm")
ONLY_CPU += ("read_side_by_side",)
ONLY_CPU += ("upsampled_convolutions", "prepack_convolutions", "fuse_residual_add")


class Calls(_Watch):
    """What the lint watches, and the name of every operator called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, *rest: Any) -> Any:
        self.names[func.name()] += 1
        return super().__torch_dispatch__(func, *rest)


FULL = [
    (cifar10, (8, 3, 32, 32), None, torch.bfloat16),
    (stable_diffusion, (2, 4, 64, 64), (2, 77, 768), None),
]


@pytest.mark.parametrize(("make", "shape", "text", "dtype"), FULL)
def test_full_networks_run_without_a_host_sync(
    make: Any, shape: tuple[int, ...], text: Any, dtype: torch.dtype | None
) -> None:
    with fake_cuda():
        inputs = [torch.empty(shape, device=DEVICE), torch.zeros(shape[0], device=DEVICE).long()]
        condition = {"encoder_hidden_states": torch.empty(text, device=DEVICE)} if text else {}
        model = module_on_cuda(make)
        network = CompiledNetwork(model, tuple(inputs), condition, Settings(dtype))
        leaves = [*inputs, *condition.values()]
        result = network(leaves).sample
        assert (result.shape, result.dtype, result.device) == (shape, torch.float32, DEVICE)
        network.prepare([0, 20, 999])
        with Calls() as seen:
            network(leaves)
        assert seen.problems == seen.outliving() == []
    done = {r.name: r for r in network.reports}
    modules = list(model.modules())
    norms = sum(isinstance(m, nn.GroupNorm) for m in modules)
    assert seen.names["stepfuse::group_norm_silu"] == norms
    assert (done["fuse_group_norm_silu"].matched, seen.names["aten::group_norm"]) == (norms, 0)
    assert not [name for name in seen.names if name.startswith("mkldnn")]
    assert {name: done[name].matched for name in ONLY_CPU} == dict.fromkeys(ONLY_CPU, 0)
    # a row of the table, found on the device: no sinusoid, no embedding
    assert network.table.table.device == DEVICE
    assert not {"aten::sin", "aten::cos", "aten::exp"} & set(seen.names)
    # images are channels-last from the first convolution on, and the filters were turned once
    assert int(done["channels_last"].note.split()[0]) <= 5
    filters = [v for v in network.constants.values() if v.dim() == 4]
    wide = [v for v in filters if v.shape[2] == 3]
    assert len(wide) == sum(isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3 for m in modules)
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in wide)


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_a_sampler_over_it_can_be_captured(
    announced: bool, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = NetworkCache.build
    monkeypatch.setattr(
        NetworkCache, "build", lambda self, *a: built.append(build(self, *a)) or built[-1]
    )
    unet, inputs = own(num_classes=3)
    fast = optimize(unet, inputs, timesteps=range(0, 1000, 200) if announced else ())
    guidance = CFG(2.0, unconditional={"labels": None}) if guided else None
    sampler = Sampler(fast, Schedule.linear(), steps=5, guidance=guidance)
    check_capturable(sampler, (2, 3, 10, 6), {"labels": torch.tensor([0, 1])})
    for network in built:
        assert isinstance(network, CompiledNetwork), "the lint has seen another network"
    assert len(built) == (3 if guided else 2)
    assert fast.explain().count("inputs ") == 1, "what the lint compiled is not kept"


def test_a_branch_on_values_is_refused_by_the_lint() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(x) if x.mean() > 0 else x
            return out

    x, t = torch.ones(1, 3, 4, 4), torch.tensor([1])
    sampler = Sampler(optimize(Branch().eval(), (x, t)), Schedule.linear(), steps=5)
    with pytest.raises(CaptureRefused, match="read on the host"):
        check_capturable(sampler, (1, 3, 4, 4))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("scale_shift", [False, True])
@torch.no_grad()
def test_the_graph_with_the_triton_op_computes_the_network(
    scale_shift: bool, dtype: torch.dtype | None
) -> None:
    model, inputs = small(scale_shift)
    found = trace(model, inputs, {})
    passes = [pass_ for pass_ in PASSES if pass_.__name__ not in ONLY_CPU]
    rewrite(found.gm, passes, PassContext(found.time, dtype))
    norms = calls(found.gm, OP)
    for node in norms:
        node.args = (*node.args[:-1], "triton")
    finish(found.gm)
    weights = {n.name: n.meta["weight"] for n in found.gm.graph.nodes if "weight" in n.meta}
    held = {**dict(model.named_parameters()), **dict(model.named_buffers()), **found.constants}
    with interpreted():
        (result,) = found.gm(*(held[name] for name in weights.values()), *inputs)
    assert len(norms) == 4
    assert distance(result, model(*inputs)) < (INTERPRETED if dtype is None else INTERPRETED_BF16)
