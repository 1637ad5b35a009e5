"""The noise: known answers, distribution, independence, and the same in every backend."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from op_cases import COMPILED, NORMAL, SIMULATED, Poisoned, across, assert_within, everywhere
from torch import Tensor

from stepfuse.kernels import backends, philox
from stepfuse.kernels.reference import philox as reference

# Statistics of a fixed stream either hold or do not; the bounds are what a perfect generator would
# fail once in millions of streams.
SIGMAS = 5.0
SMALLEST_P = 1e-6

DRAWS = (100, 100_000)  # samples, elements: 10^7 draws
FULL = 0xFFFFFFFF
# Random123, kat_vectors: philox4x32 with 10 rounds
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_random123_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = reference.rounds(
        tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key)
    )
    assert tuple(words.tolist()) == answer


@everywhere(COMPILED)
def test_known_answer_of_the_first_elements(backend: str) -> None:
    """Seed, sample, timestep and element 0 are the vector of zeros."""
    assert tuple(philox.integers(0, 0, 0, (4,), backend).tolist()) == KNOWN[0][2]


@everywhere(COMPILED)
def test_key_and_counter_are_laid_out_as_specified(backend: str) -> None:
    """key = seed; counter = (element // 4, timestep, sample low, sample high)."""
    (_, timestep, low, high), key, _ = KNOWN[2]
    counter = tuple(torch.tensor(word) for word in (5, timestep, low, high))
    answer = reference.rounds(counter, tuple(torch.tensor(word) for word in key))
    found = philox.integers(key[0] | key[1] << 32, low | high << 32, timestep, (24,), backend)
    assert torch.equal(found[20:], answer)


SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, 1 << 32, FULL]


@everywhere(COMPILED)
@pytest.mark.parametrize("elements", [1, 4, 5, 63, 64, 1023])
def test_integers_are_bit_equal(backend: str, elements: int) -> None:
    seed = torch.tensor(SEEDS)
    sample, step = seed.flip(0), torch.tensor([0, 1, 999, FULL, 2**31, 7, 0, FULL])
    found = philox.integers(seed, sample, step, (elements,), backend)
    assert torch.equal(found, reference.integers(seed, sample, step, elements))


@across(
    "shape,dtype",
    (
        ("cpp", "interpreter"),
        [((1,), torch.float32), ((3, 7, 9), torch.float32), ((1027,), torch.float32)]
        + [((3, 16, 16), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ),
    (SIMULATED[:1], [((3, 7, 9), torch.float32)]),
    (SIMULATED[1:], [((3, 16, 16), torch.bfloat16)]),
)
def test_normals_agree(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seed = torch.tensor(SEEDS[:3])
    sample, step = torch.tensor([5, -1, 2**40]), torch.tensor([0, 999, FULL])
    exact = philox.normal(seed, sample, step, shape, "reference", dtype=torch.float64)
    out = Poisoned(torch.empty(3, *shape, dtype=dtype))
    philox.normal(seed, sample, step, shape, backend, dtype=dtype, out=out.tensor)
    assert_within(out.check(), exact, NORMAL)


@everywhere(COMPILED)
def test_normals_agree_over_many_draws(backend: str) -> None:
    """10^6 draws reach the tails, and the places where sine and cosine change sign."""
    found = philox.normal(11, torch.arange(10), 3, (100_000,), backend)
    exact = philox.normal(11, torch.arange(10), 3, (100_000,), "reference", dtype=torch.float64)
    assert_within(found, exact, NORMAL)
    assert found.abs().max() > 4.5


@everywhere(("cpp",))
def test_threads_do_not_matter(backend: str) -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(philox.normal(1, torch.arange(5), 2, (3, 101, 103), backend))
    assert torch.equal(*results)


@everywhere()
def test_one_sample_or_many(backend: str) -> None:
    many = philox.normal(9, torch.tensor([4, 5]), 17, (3, 4, 5), backend)
    assert torch.equal(philox.normal(9, 5, 17, (3, 4, 5), backend), many[1])
    seeds = philox.normal(torch.tensor([8, 9]), torch.tensor([5, 5]), 17, (3, 4, 5), backend)
    assert torch.equal(seeds[1], many[1])
    assert not torch.equal(seeds[0], many[1])
    out = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert philox.normal(9, torch.tensor([4, 5]), 17, (3, 4, 5), backend, out=out) is out
    assert torch.equal(out, many)


def test_a_longer_sample_starts_like_a_shorter_one() -> None:
    assert torch.equal(philox.normal(1, 2, 3, (1000,))[:10], philox.normal(1, 2, 3, (10,)))
    assert philox.normal(1, 2, 3, (0,)).shape == (0,)


def test_the_initial_noise_has_a_timestep_of_its_own() -> None:
    assert philox.INITIAL == 2**32 - 1
    first = philox.normal(1, 2, philox.INITIAL, (64,))
    assert not torch.isclose(first, philox.normal(1, 2, 0, (64,))).any()


def test_triton_stores_no_integers() -> None:
    with pytest.raises(backends.BackendUnavailable, match="use the reference"):
        philox.integers(0, 0, 0, (4,), "triton")


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    """10^7 words."""
    found = philox.integers(2024, torch.arange(DRAWS[0]), 500, DRAWS[1:], "auto")
    return found.numpy().astype(np.uint32)


@pytest.fixture(scope="module")
def normals() -> Tensor:
    """10^7 normals, [samples, elements], of the backend that runs here by default."""
    return philox.normal(2024, torch.arange(DRAWS[0]), 500, DRAWS[1:])


@pytest.mark.parametrize("shift", [0, 8, 16], ids=["low", "middle", "high"])
def test_words_are_uniform(words: np.ndarray, shift: int) -> None:
    """Chi-square of 2^16 bins taken from the low, middle and high bits."""
    counts = np.bincount(((words >> shift) & 0xFFFF).ravel(), minlength=2**16)
    assert scipy.stats.chisquare(counts).pvalue > SMALLEST_P


def test_every_bit_is_fair(words: np.ndarray) -> None:
    sigma = 0.5 / math.sqrt(words.size)
    for bit in range(32):
        share = np.count_nonzero(words & np.uint32(1 << bit)) / words.size
        assert abs(share - 0.5) < SIGMAS * sigma, bit


def test_normals_have_the_normal_distribution(normals: Tensor) -> None:
    """Kolmogorov-Smirnov against the exact distribution, over 10^7 draws."""
    x = np.sort(normals.numpy().ravel())
    expected = scipy.stats.norm.cdf(x)
    ranks = np.arange(x.size + 1) / x.size
    distance = max((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())
    assert scipy.stats.kstwobign.sf(distance * math.sqrt(x.size)) > SMALLEST_P


def test_normals_have_the_normal_moments(normals: Tensor) -> None:
    x, n = normals.double(), normals.numel()
    # E z^k, and the standard deviation of its mean over n draws: sqrt((E z^2k - (E z^k)^2) / n)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        found = float((x**power).mean())
        assert abs(found - moment) < SIGMAS * math.sqrt(variance / n), power
    # Box-Muller from 32 bits reaches sqrt(2 ln 2^33) = 6.76; 10^7 draws should reach 4.7
    assert 4.7 < float(x.abs().max()) < 6.77


def correlation(a: Tensor, b: Tensor) -> float:
    """In units of its standard deviation for independent draws."""
    a, b = a.double().flatten(), b.double().flatten()
    return abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) * math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64])
def test_elements_are_independent(normals: Tensor, lag: int) -> None:
    """Neighbours share a counter block or a Box-Muller pair, and neither shows, nor do squares."""
    a, b = normals[:10, :-lag], normals[:10, lag:]
    assert correlation(a, b) < SIGMAS
    assert correlation(a.square(), b.square()) < SIGMAS


@pytest.mark.parametrize("lag", [1, 2, 4, 32])
def test_samples_are_independent(normals: Tensor, lag: int) -> None:
    a, b = normals[:-lag][:10], normals[lag:][:10]
    assert correlation(a, b) < SIGMAS
    assert correlation(a.square(), b.square()) < SIGMAS


STREAM = {"seed": 77, "sample": 3, "step": 40}


@pytest.mark.parametrize(
    ("name", "bit"),
    [*itertools.product(("seed", "sample"), (0, 31, 32, 63)), ("step", 0), ("step", 31)],
)
def test_every_word_of_the_counter_matters(name: str, bit: int) -> None:
    """One bit, in the high words too, gives an unrelated stream."""
    elements = (1_000_000,)
    a = philox.normal(**STREAM, shape=elements)
    b = philox.normal(**(STREAM | {name: STREAM[name] ^ 1 << bit}), shape=elements)
    assert correlation(a, b) < SIGMAS
    # the chance that neighbouring float32 values agree by accident is about 10^-7 an element
    assert torch.count_nonzero(a == b) < 20


def test_seed_sample_and_step_are_not_interchangeable() -> None:
    streams = [philox.normal(*order, (64,)) for order in itertools.permutations((1, 2, 3))]
    for a, b in itertools.combinations(streams, 2):
        assert not torch.equal(a, b)
