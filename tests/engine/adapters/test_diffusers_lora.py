"""LoRA on an accelerated U-Net, with real peft: whatever is switched, images are the original's.

peft keeps scales, active adapters and flags of what is merged as plain Python state of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import conditioned, distance
from torch import Tensor

import stepfuse as sf
from stepfuse.engine.adapters import explain

# float32 sums in another order, through some twenty layers
REORDERED = 1e-5
FAR = 1e-3  # what an adapter changes here is far more


def adapted() -> Any:
    """A U-Net with two adapters that do something, "a" active."""
    from peft import LoraConfig

    torch.manual_seed(1)
    unet = conditioned()
    for name, rank in (("a", 4), ("b", 2)):
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"],
            init_lora_weights=False,
        )
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapter("a")
    return unet.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([400]),
        torch.randn(1, 5, 12, generator=generator),
    )


SWITCHES: dict[str, Callable[[Any], None]] = {
    "weights": lambda unet: unet.set_adapters(["a"], weights=[0.25]),
    "another": lambda unet: unet.set_adapters(["b"]),
    "mixed": lambda unet: unet.set_adapters(["a", "b"], weights=[0.7, 0.4]),
    "off": lambda unet: unet.disable_lora(),
    "fused": lambda unet: unet.fuse_lora(),
    "fused weakly": lambda unet: unet.fuse_lora(lora_scale=0.5),
    "deleted": lambda unet: unet.delete_adapters("a"),
}


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_a_switch_is_followed(name: str) -> None:
    unet, given = adapted(), inputs()
    sf.accelerate(unet)
    before = unet(*given).sample
    SWITCHES[name](unet)
    after = unet(*given).sample
    sf.restore(unet)
    assert distance(after, unet(*given).sample) < REORDERED
    if name != "fused":  # which changes where the adapter is, not what it does
        assert distance(after, before) > FAR


@torch.no_grad()
def test_there_and_back_again() -> None:
    """Each state is the original's, and one that was met before is not compiled again."""
    unet, given, plain = adapted(), inputs(), adapted()
    sf.accelerate(unet)
    steps: list[Callable[[Any], None]] = [
        lambda unet: unet.set_adapters(["b"]),
        lambda unet: unet.set_adapters(["a"]),
        lambda unet: unet.disable_lora(),
        lambda unet: unet.enable_lora(),
        lambda unet: unet.fuse_lora(lora_scale=0.3),
        lambda unet: unet.unfuse_lora(),
        lambda unet: unet.set_adapters(["b"]),
    ]
    for i, step in enumerate(steps):
        for one in (unet, plain):
            step(one)
        assert distance(unet(*given).sample, plain(*given).sample) < REORDERED, f"step {i}"
    assert "original forward" not in explain(unet), "the compiled network did all of it"


@torch.no_grad()
def test_a_weight_of_an_adapter_is_watched() -> None:
    unet, given = adapted(), inputs()
    sf.accelerate(unet)
    before = unet(*given).sample
    for name, parameter in unet.named_parameters():
        if "lora_B.a" in name:
            parameter.mul_(3)
    after = unet(*given).sample
    sf.restore(unet)
    assert distance(after, unet(*given).sample) < REORDERED
    assert distance(after, before) > FAR


@torch.no_grad()
def test_a_captured_sampler_follows_too() -> None:
    """The Sampler replays what it recorded: a switch makes the step anew."""
    unet, (_, _, text) = adapted(), inputs()
    sampler = sf.Sampler(unet, sf.Schedule.linear(), steps=2, clip_sample=None)
    condition = {"encoder_hidden_states": text}
    arguments: dict[str, Any] = {"shape": (1, 4, 8, 8), "condition": condition}
    before = sampler.sample(**arguments)
    unet.set_adapters(["b"], weights=[0.5])
    after = sampler.sample(**arguments)
    fresh = sf.Sampler(unet, sf.Schedule.linear(), steps=2, clip_sample=None, graph=None)
    assert torch.equal(after, fresh.sample(**arguments))
    assert distance(after, before) > FAR
    assert sampler.stats()["captures"] == 2
