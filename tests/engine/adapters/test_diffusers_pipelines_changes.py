"""Changes of an accelerated U-Net that its compiled networks must see."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import counted, noise
from tests.engine.compile.networks import distance
from torch import Tensor, nn

from stepfuse.bench.stable_diffusion import conditional_unet
from stepfuse.engine.adapters.diffusers import accelerate, explain, restore

# float32 sums in another order: 1e-7 each, over a few hundred terms and some layers
REORDERED = 5e-6
X, TEXT, T = noise(2, 4, 8, 8), noise(2, 5, 8, seed=1), torch.tensor(17)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def unet() -> Any:
    """A smaller U-Net of the test's own, accelerated, with one network compiled."""
    found = accelerate(conditional_unet(channels=(8,)))
    found(X, T, TEXT)
    return found


def same(unet: Any, originals: int = 0) -> None:
    """The accelerated U-Net does what it does without, by compiled networks unless said."""
    found = unet(X, T, TEXT).sample
    assert counted(unet, lambda: unet(X, T, TEXT)) == originals
    assert distance(found, type(unet).forward(unet, X, T, TEXT).sample) < REORDERED


def _in_place(unet: Any) -> None:
    for weight in unet.parameters():
        weight.mul_(1.1)


def _by_data(unet: Any) -> None:
    for weight in unet.parameters():
        weight.data.mul_(1.1)


def _fused_lora(unet: Any) -> None:
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.weight.data = layer.weight.data + noise(8, 2) @ noise(2, 8, seed=1)


def _loaded(unet: Any) -> None:
    unet.load_state_dict({k: v * 1.1 for k, v in unet.state_dict().items()})


def _replaced(unet: Any) -> None:
    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight * 2)


def _wrapped(unet: Any) -> None:
    """As peft does it: a layer around the layer."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x: Tensor, *scale: float) -> Tensor:
            result: Tensor = self.base(x) + self.down(x)
            return result

    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = Adapted(attention.to_q)


def _frozen(unet: Any) -> None:
    unet.requires_grad_(False)
    _in_place(unet)


CHANGES = [_in_place, _by_data, _fused_lora, _loaded, _replaced, _wrapped, _frozen]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_changed_weights_are_read_again(change: Any, unet: Any) -> None:
    before = unet(X, T, TEXT).sample
    change(unet)
    assert distance(unet(X, T, TEXT).sample, before) > 1e-3
    same(unet)


def test_a_swap_of_weights_and_back(unet: Any) -> None:
    before = unet(X, T, TEXT).sample
    kept = copy.deepcopy(unet.state_dict())
    _loaded(unet)
    assert distance(unet(X, T, TEXT).sample, before) > 1e-3
    unet.load_state_dict(kept)
    assert torch.equal(unet(X, T, TEXT).sample, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_converted_weights(dtype: torch.dtype, unet: Any) -> None:
    before = unet(X, T, TEXT).sample
    unet.to(dtype)
    converted = unet(X.to(dtype), T, TEXT.to(dtype)).sample
    assert converted.dtype == dtype
    assert distance(converted, before) < (0.05 if dtype is torch.bfloat16 else REORDERED)
    unet.float()
    same(unet)


def test_free_u(unet: Any) -> None:
    before = unet(X, T, TEXT).sample
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    # its factors apply to blocks of 1280 and 640 channels only, which this network has not; that
    # the switch is seen is what can be checked: the network is compiled anew
    same(unet)
    assert explain(unet).count("inputs ") == 2
    unet.enable_freeu(s1=0.8, s2=0.2, b1=1.5, b2=1.6)
    same(unet)
    assert explain(unet).count("inputs ") == 3
    unet.disable_freeu()
    assert torch.equal(unet(X, T, TEXT).sample, before)


def test_attention_slicing_and_fused_projections(unet: Any) -> None:
    unet.set_attention_slice("auto")
    same(unet)
    unet.set_default_attn_processor()
    unet.fuse_qkv_projections()
    same(unet)
    unet.unfuse_qkv_projections()
    same(unet)


def test_attention_of_the_users_own(unet: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    class Watching(AttnProcessor):  # type: ignore[misc]
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Watching.calls += 1
            return 0.5 * super().__call__(*args, **kwargs)

    before = unet(X, T, TEXT).sample
    unet.set_attn_processor(Watching())
    same(unet, originals=1)
    seen = Watching.calls
    assert distance(unet(X, T, TEXT).sample, before) > 1e-4
    assert Watching.calls > seen
    assert "attention by Watching" in explain(unet)
    unet.set_attn_processor(AttnProcessor())
    same(unet)


def test_hooks_of_submodules_are_called(unet: Any) -> None:
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda *_: seen.append("mid"))
    same(unet, originals=1)
    assert seen
    hook.remove()
    same(unet)


def test_hooks_of_the_network_itself_are_called(unet: Any) -> None:
    seen = []
    unet.register_forward_hook(lambda module, args, result: seen.append(result))
    found = unet(X, T, TEXT)
    assert seen == [found]
    same(unet)


def test_a_method_put_over_a_blocks_forward(unet: Any) -> None:
    block = unet.mid_block
    original = block.forward
    before = unet(X, T, TEXT).sample
    block.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    assert distance(unet(X, T, TEXT).sample, before) > 1e-4
    same(unet)


def test_dropout_that_is_on(unet: Any) -> None:
    unet.train()
    same(unet)  # a probability of zero drops nothing
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    restore(unet)
    accelerate(unet)
    assert not torch.equal(unet(X, T, TEXT).sample, unet(X, T, TEXT).sample)
    assert "dropout is on" in explain(unet)
    unet.eval()
    same(unet)
