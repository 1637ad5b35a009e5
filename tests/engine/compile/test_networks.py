"""U-Nets of other libraries, whole: the same function in float32 and bfloat16, and what is left."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.engine.compile.adm import ADM
from tests.engine.compile.networks import distance, stable_diffusion
from torch import Tensor

from stepfuse.engine.compile.optimize import Optimized, optimize

# float32 sums in another order, through some forty layers
REORDERED = 1e-5
# of eager bfloat16's own error: roundings fall elsewhere, on average not worse
NO_WORSE = 1.2
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # without AVX-512 it has not


@pytest.fixture(autouse=True)
def _bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a busy machine measures, if oneDNN has bfloat16 at all."""
    monkeypatch.setattr("stepfuse.engine.compile.network.pays", lambda *_: HAS_BFLOAT16)


def matched(fast: Optimized) -> dict[str, tuple[int, int]]:
    """(matched, candidates) of every pass, from what `explain` prints."""
    lines = re.findall(r"^(\w+) +(\d+) of (\d+)", fast.explain(), re.MULTILINE)
    return {name: (int(done), int(all_of)) for name, done, all_of in lines}


def compare(model: Any, *inputs: Tensor, **condition: Tensor) -> tuple[Optimized, Optimized]:
    """Check both dtypes against eager float32; the networks compiled."""

    def call(network: Any) -> Tensor:
        result = network(*inputs, **condition)
        return result if isinstance(result, Tensor) else result.sample

    with torch.no_grad():
        exact = call(model)
        with torch.autocast("cpu", torch.bfloat16):
            eager = distance(call(model), exact)
        fast = optimize(model, (*inputs, condition))
        low = optimize(model, (*inputs, condition), torch.bfloat16)
        assert distance(call(fast), exact) < REORDERED
        assert distance(call(low), exact) < NO_WORSE * eager
    return fast, low


@pytest.mark.parametrize(
    ("scale_shift", "legacy", "classes"), [(True, True, None), (True, False, 5), (False, True, 5)]
)
def test_adm(scale_shift: bool, legacy: bool, classes: int | None) -> None:
    model = ADM(scale_shift, legacy, classes).eval()
    condition = {} if classes is None else {"y": torch.tensor([0, 4])}
    for fast in compare(model, torch.randn(2, 3, 12, 8), torch.tensor([3, 700]), **condition):
        done = matched(fast)
        assert done["fuse_group_norm_silu"] == (24, 24)
        assert done["widen_conv1d"] == (6, 6)
        assert done["gather_attention"] == (3, 3)
        assert done["attention"][1] == 3
        # ten blocks and three attentions; what runs by tiles takes its own sum along
        by_tiles = sum(int(n) for n in re.findall(r"(\d+) with a residual", fast.explain()))
        assert done["fuse_residual_add"] == (13 - by_tiles, 13 - by_tiles)
        note = "10 with scale-shift" if scale_shift else "10 with add"
        assert note in fast.explain()


@torch.no_grad()
def test_adm_in_half_precision_keeps_its_norms_in_float32() -> None:
    exact = ADM().eval()
    model = ADM(dtype=torch.bfloat16).eval()
    model.load_state_dict(exact.state_dict())
    x, t = torch.randn(2, 3, 12, 8), torch.tensor([3, 700])
    expected = exact(x, t)
    fast = optimize(model, (x, t))
    assert distance(fast(x, t), expected) < NO_WORSE * distance(model(x, t), expected)
    assert "24 of 24; 21 with SiLU, 10 with scale-shift" in fast.explain()


def test_stable_diffusion() -> None:
    model = stable_diffusion(layers_per_block=1, block_out_channels=(64, 128))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 77, 768)
    for fast in compare(model, x, t, encoder_hidden_states=text)[: 1 + HAS_BFLOAT16]:
        done = matched(fast)
        for name in ("fuse_group_norm_silu", "prepack_convolutions", "fuse_residual_add"):
            assert done[name][0] == done[name][1] > 0, fast.explain()


@pytest.mark.parametrize(
    "options", [{"self_condition": True}, {"learned_variance": True}, {"full_attn": (True, True)}]
)
def test_denoising_diffusion_pytorch(options: dict[str, Any]) -> None:
    from denoising_diffusion_pytorch import Unet

    model = Unet(**{"dim": 16, "dim_mults": (1, 2), "flash_attn": False, **options}).eval()
    inputs = [torch.randn(2, 3, 8, 8), torch.tensor([3, 4])]
    if "self_condition" in options:
        inputs.append(torch.randn(2, 3, 8, 8))
    fast, _ = compare(model, *inputs)
    done = matched(fast)
    linear = 0 if "full_attn" in options else 4  # softmax over q and over k, not over logits
    assert done["gather_attention"][1] - done["gather_attention"][0] == linear
    assert (f"{linear} left: softmax of something else" in fast.explain()) == bool(linear)
