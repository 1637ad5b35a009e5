"""Models without a timestep: decoders, text encoders, stacks of layers, methods of a module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.engine.compile.networks import distance
from torch import Tensor, nn

import stepfuse as sf
from stepfuse.bench.stable_diffusion import text_encoder
from stepfuse.engine.compile.network import CompiledNetwork

# float32 sums in another order: 1e-7 each, over a few hundred terms and some layers
REORDERED = 5e-6
LOWERED = 5e-2  # 8 bits through some layers


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 12),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


def only_compiled(fast: Any) -> bool:
    return all(isinstance(network, CompiledNetwork) for network in fast.networks)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 5, 7)])
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_decoder_by_its_method(shape: tuple[int, ...], return_dict: bool) -> None:
    model, z = vae(), drawn(*shape)
    weights = copy.deepcopy(model.state_dict())
    expected = model.decode(z, return_dict=return_dict)
    fast = sf.optimize(model.decode, (z, {"return_dict": return_dict}))
    found = fast(z, return_dict=return_dict)
    assert type(found) is type(expected)
    assert distance(found[0], expected[0]) < REORDERED
    assert only_compiled(fast)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert "decode" not in vars(model)


def test_an_encoder_whose_result_is_a_distribution_runs_its_modules() -> None:
    """A distribution holds tensors where no graph sees them; `explain` says so."""
    model, x = vae(), drawn(1, 3, 16, 16)
    fast = sf.optimize(model.encode, (x,))
    found, expected = fast(x).latent_dist, model.encode(x).latent_dist
    assert distance(found.mean, expected.mean) < REORDERED
    assert "no graph" in fast.explain()
    assert only_compiled(sf.optimize(model.encoder, (x,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_in_16_bits(dtype: torch.dtype) -> None:
    model, z = vae(), drawn(2, 4, 8, 8)
    expected = model.decode(z).sample
    found = sf.optimize(model.decode, (z,), dtype)(z).sample
    assert found.dtype == expected.dtype
    assert distance(found, expected) < LOWERED


def test_a_decoder_in_float64() -> None:
    model, z = vae().double(), drawn(1, 4, 8, 8).double()
    assert distance(sf.optimize(model.decode, (z,))(z).sample, model.decode(z).sample) < 1e-12


def test_another_shape_and_changed_weights() -> None:
    model, z = vae(), drawn(1, 4, 8, 8)
    fast = sf.optimize(model.decode, (z,))
    other = drawn(3, 4, 6, 4)
    assert distance(fast(other).sample, model.decode(other).sample) < REORDERED
    model.decoder.conv_out.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"decoder.conv_out.weight' was changed"):
        fast(z)
    fast.refresh()
    assert distance(fast(z).sample, model.decode(z).sample) < REORDERED


def test_a_method_that_is_sliced() -> None:
    """``use_slicing`` is an attribute that the method reads."""
    model, z = vae(), drawn(2, 4, 8, 8)
    fast = sf.optimize(model.decode, (z,))
    model.enable_slicing()
    assert distance(fast(z).sample, model.decode(z).sample) < REORDERED
    assert len(fast.networks) == 2


def test_copies_and_pickles_of_a_method() -> None:
    model, z = vae(), drawn(1, 4, 8, 8)
    fast = sf.optimize(model.decode, (z,))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(z).sample, fast(z).sample)
        assert not set(map(id, other.parameters())) & set(map(id, model.parameters()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"attention_mask": torch.tensor([[1] * 7 + [0] * 2] * 3)}, {"output_hidden_states": True}],
    ids=lambda options: "-".join(options) or "tokens",
)
def test_a_text_encoder(options: dict[str, Any], dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, ids = text_encoder(8), tokens(3, 9)
    expected = model(ids, **options)
    fast = sf.optimize(model, (ids, options), dtype, has_timestep=False)
    limit = REORDERED if dtype is None else LOWERED
    for found in (fast(ids, **options), fast(input_ids=ids, **options)):
        assert type(found) is type(expected)
        assert found.keys() == expected.keys()
        for name in ("last_hidden_state", "pooler_output"):
            assert found[name].dtype == torch.float32
            assert distance(found[name], expected[name]) < limit
    assert len(fast.networks) == 1
    assert only_compiled(fast)


class Reader(nn.Module):
    """It reads a value of its input back, which no graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(50, 12), nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        result: Tensor = self.last(x if int(ids[0, 0]) > 10 else -x)
        return result


def test_integers_in_16_bits_where_there_is_no_graph() -> None:
    """The result has the dtype of the weights: x has none for it."""
    model, ids = Reader(), tokens(2, 4)
    fast = sf.optimize(model, (ids,), torch.bfloat16)
    assert "no graph" in fast.explain()
    found = fast(ids)
    assert found.dtype == torch.float32
    assert distance(found, model(ids)) < LOWERED


def test_layers_in_a_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 3))
    x = drawn(5, 7)
    assert distance(sf.optimize(model, (x,))(x), model(x)) < REORDERED


def test_attention_of_three_inputs() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k, v = (drawn(2, n, 8, seed=n) for n in (5, 3, 3))
    fast = sf.optimize(model, (q, k, v), has_timestep=False)
    for a, b in zip(fast(q, k, v), model(q, k, v), strict=True):
        assert distance(a, b) < REORDERED


class Frames(nn.Module):
    """Its second argument is a number, and no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor, frames: int = 1, weight: Tensor | None = None) -> Tensor:
        x = self.conv(x).unflatten(0, (-1, frames)).mean(1)
        return x if weight is None else x * weight[:, None, None, None]


def test_a_second_argument_that_is_no_timestep() -> None:
    model, x = Frames(), drawn(6, 4, 5, 5)
    fast = sf.optimize(model, (x, 3), has_timestep=False)
    for frames in (3, 2):
        assert distance(fast(x, frames), model(x, frames)) < REORDERED
        assert distance(fast(x, frames=frames), model(x, frames)) < REORDERED
    assert only_compiled(fast)
    weight = drawn(2)
    assert distance(fast(x, 3, weight), model(x, 3, weight)) < REORDERED
    assert "0 of 0; no timestep" in fast.explain()


def test_no_timestep_is_announced_to_a_model_without() -> None:
    model, x = Frames(), drawn(6, 4, 5, 5)
    with pytest.raises(ValueError, match=r"timesteps must be empty with has_timestep=False; got"):
        sf.optimize(model, (x,), has_timestep=False, timesteps=[3])
    fast = sf.optimize(model, (x,), has_timestep=False, timesteps=[])
    fast.prepare([])
    with pytest.raises(ValueError, match=r"timesteps must be empty .*; got \[1\]"):
        fast.prepare([1])
    with pytest.raises(TypeError, match="has_timestep must be True or False; got str 'no'"):
        sf.optimize(model, (x,), has_timestep="no")


@pytest.mark.parametrize(
    "wrong", [torch.nn.functional.relu, "decode", len, "text".upper, vae, None, nn.Linear]
)
def test_what_is_no_module_and_no_method_of_one(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a method of one; got"):
        sf.optimize(wrong, (drawn(1, 2),))


def test_errors_are_the_models_own() -> None:
    model = vae()
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3 channels instead"):
        sf.optimize(model.decode, (drawn(1, 3, 8, 8),))
    with pytest.raises(TypeError, match=r"example_inputs must be \(x, t, ...\) and start with"):
        sf.optimize(model.decode, ({"z": drawn(1, 4, 8, 8)},))
