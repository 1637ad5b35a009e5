"""How far a candidate is from the reference: what is measured, and how much is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepfuse.kernels.checks import as_number


@dataclass(frozen=True)
class Deviation:
    """Of a candidate c from a reference r, the worst over some samples.

    Attributes:
        max_abs: max |c - r|.
        relative_l2: |c - r| / |r|.
        cosine: <c, r> / (|c| |r|), the smallest.
    """

    max_abs: float
    relative_l2: float
    cosine: float

    @classmethod
    def of(cls, candidate: Tensor, reference: Tensor) -> Deviation:
        """For tensors [N, ...]; what is not finite counts as infinitely far."""
        c, r = (v.detach().to("cpu", torch.float64).flatten(1) for v in (candidate, reference))
        if not bool(torch.isfinite(c).all()):
            return cls(math.inf, math.inf, -1.0)
        difference, norm = c - r, r.norm(dim=1)
        cosine = torch.nn.functional.cosine_similarity(c, r, dim=1, eps=1e-300)
        return cls(
            float(difference.abs().max()),
            float((difference.norm(dim=1) / norm.clamp_min(1e-300)).max()),
            float(torch.where(norm == 0, torch.ones_like(cosine), cosine).min()),
        )

    @classmethod
    def worst(cls, deviations: Sequence[Deviation]) -> Deviation:
        """The worst of each."""
        return cls(
            max(d.max_abs for d in deviations),
            max(d.relative_l2 for d in deviations),
            min(d.cosine for d in deviations),
        )


@dataclass(frozen=True)
class Tolerance:
    """What is accepted: of every case, and of the images after a whole DDIM run.

    ``cosine`` follows from ``relative_l2`` = e: two vectors that far apart have a cosine of at
    least sqrt(1 - e^2).

    Attributes:
        relative_l2: largest |c - r| / |r| of a prediction.
        psnr: smallest peak signal-to-noise ratio of the images, in dB, against a range of 2.

    Raises TypeError or ValueError for what are no such numbers.
    """

    relative_l2: float
    psnr: float

    def __post_init__(self) -> None:
        if not 0 < as_number("relative_l2", self.relative_l2, finite=False) < math.inf:
            raise ValueError(f"relative_l2 must be a positive number; got {self.relative_l2}")
        if not math.isfinite(as_number("psnr", self.psnr, finite=False)):
            raise ValueError(f"psnr must be a finite number of dB; got {self.psnr}")

    @property
    def cosine(self) -> float:
        """The smallest cosine that fits ``relative_l2``."""
        return math.sqrt(max(0.0, 1 - self.relative_l2**2))


# u = 2^-24, 2^-11, 2^-8 is the unit roundoff. Every rounding of an activation adds up to u in a
# random direction, and a U-Net has 50 to 300 of them in a row, so that relative errors come out
# between 1 u and 8 u. 16 u is what no correct file was seen to need; float32 has twice as much,
# because there the long sums of the products round too, in an order that differs. A fault in a
# weight that matters is above that by orders of magnitude. A prediction that is off by e leaves
# images of range 2 at about 20 log10(2 / e) dB; 10 dB less are accepted, for runs that amplify.
FP32_TOLERANCE = Tolerance(relative_l2=32 * 2**-24, psnr=110.0)
FP16_TOLERANCE = Tolerance(relative_l2=16 * 2**-11, psnr=38.0)
BF16_TOLERANCE = Tolerance(relative_l2=16 * 2**-8, psnr=20.0)
TOLERANCES = {"fp32": FP32_TOLERANCE, "fp16": FP16_TOLERANCE, "bf16": BF16_TOLERANCE}


@dataclass(frozen=True)
class Case:
    """One kind of input, one bin of timesteps, one batch size.

    Attributes:
        inputs: "random", x ~ N(0, I), or "real", images noised to t.
        timesteps: first and last of the bin.
        batch: samples in a call.
        against_float64, against_float32: the candidate from the reference in that arithmetic.
    """

    inputs: str
    timesteps: tuple[int, int]
    batch: int
    against_float64: Deviation
    against_float32: Deviation


@dataclass(frozen=True)
class LayerDeviation:
    """A layer of the candidate, given the candidate's own inputs to it.

    Attributes:
        name: the module's path, such as "down.3.block.conv1".
        local: relative L2 of its output from the reference's layer on the same inputs: what this
            layer, or what is between it and the layers before it, adds.
        total: relative L2 of its output from that in the whole reference.
    """

    name: str
    local: float
    total: float


def psnr(candidate: Tensor, reference: Tensor, peak: float = 2.0) -> float:
    """10 log10(peak^2 / mean squared error) in dB; infinite for equal images."""
    c, r = candidate.to("cpu", torch.float64), reference.to("cpu", torch.float64)
    error = float((c - r).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)
