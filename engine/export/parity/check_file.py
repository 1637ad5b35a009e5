"""`check`: an exported network against the network it came from."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepfuse.engine.export.batch_profile import LARGEST, BatchProfile
from stepfuse.engine.export.metadata import Metadata, read_metadata
from stepfuse.engine.export.network import Source, describe, frozen_copy
from stepfuse.engine.export.parity.compare import TOLERANCES, Case, Deviation, Tolerance, psnr
from stepfuse.engine.export.parity.inputs import (
    Inputs,
    batch_sizes,
    make_inputs,
    random_condition,
    timestep_bins,
)
from stepfuse.engine.export.parity.layers import compare_layers
from stepfuse.engine.export.parity.onnx_nodes import OnnxProbe
from stepfuse.engine.export.parity.report import Report
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.networks.unet_blocks import GroupNormSiLU
from stepfuse.engine.sampling.denoiser import Denoiser
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.engine.sampling.update import PredictionType
from stepfuse.kernels.arguments import (
    as_seed,
    check_callable,
    check_clip,
    check_kind,
    check_literal,
    check_path,
)
from stepfuse.kernels.checks import as_integer, as_number, check_flag, check_word
from stepfuse.kernels.reference.group_norm_silu import formula

Candidate = str | os.PathLike[str] | Callable[..., Any]
LAYER_SAMPLES = 4  # the search for the worst layer looks at the worst samples only


def check(
    reference: nn.Module | Checkpoint,
    candidate: Candidate,
    *,
    example_inputs: Sequence[Any] | None = None,
    sample_shape: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    prediction_type: str | None = None,
    batch: str | int | BatchProfile | None = None,
    precision: str | None = None,
    tolerance: Tolerance | float | None = None,
    bins: int = 10,
    steps: int | None = 50,
    images: int = 4,
    clip_sample: float | None = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Compare a candidate with the network it was made from.

        report = sf.export.check(sf.load("digits"), "digits.onnx")
        print(report.markdown());  assert report.passed

    The reference is computed in plain PyTorch, in float64 and in float32. Inputs are random,
    x ~ N(0, I), and real, images that the reference draws, noised to t; t comes from every part of
    the schedule, labels are random with the null class among them, batches are those of the
    profile. Then both draw the same images by DDIM. Where a tolerance is missed, the report names
    the layer that adds most of the error.

    Args:
        reference: the network or its checkpoint; it is not changed.
        candidate: path of an .onnx file, or anything that is called as (x, t, **condition): an
            `OnnxDenoiser`, a `TensorRTDenoiser`, a module.
        example_inputs, sample_shape: as for `stepfuse.export.onnx`, where the network does not
            say what it takes.
        schedule, prediction_type: where neither the checkpoint nor the file says.
        batch: the profile MIN:OPT:MAX to check; None for that of the file, or 1:4:8.
        precision: "fp32", "fp16" or "bf16", for the tolerance; None for that of the file, or fp32.
        tolerance: of predictions and images; a number is the relative L2 of predictions.
        bins: parts of the schedule.
        steps: of the DDIM run; None leaves the images out.
        images: how many are drawn.
        clip_sample: of the DDIM run, see `Sampler`.
        seed: of inputs and images.
        progress: show a progress bar.

    Raises ValueError for settings that are not accepted and for files that are no ONNX network,
    `BackendUnavailable` where onnx or onnxruntime is missing.
    """
    check_flag("progress", progress)
    if schedule is not None:
        check_kind("schedule", schedule, Schedule, "a Schedule, Schedule.linear() say")
    if prediction_type is not None:
        check_literal("prediction_type", prediction_type, PredictionType)
    if precision is not None:
        check_word("precision", precision, TOLERANCES)
    said = _said(candidate)
    given_shape = sample_shape
    if sample_shape is None and example_inputs is None:
        given_shape = said.sample_shape
    source = describe(reference, example_inputs, given_shape, "reference")
    known = _completed(said, source.metadata, schedule, prediction_type)
    assert known.schedule is not None
    precision = precision or known.precision
    limits = _limits(tolerance, precision)
    profile = BatchProfile.parse(batch) if batch is not None else known.batch
    profile = profile or BatchProfile(1, 4, 8)
    for name, value in (
        ("images", images),
        ("bins", bins),
        ("steps", 1 if steps is None else steps),
    ):
        if not 1 <= as_integer(name, value) <= LARGEST:
            raise ValueError(f"{name} must be in 1 .. {LARGEST}; got {value}")
    check_clip(clip_sample)
    sizes = batch_sizes(profile)
    parts = timestep_bins(known.schedule.num_train_timesteps, bins)
    count = max(len(parts), sizes[-1])
    exact, single = _Exact(source, torch.float64), _Exact(source, torch.float32)
    tried = _Tried(candidate, source)
    generator = torch.Generator().manual_seed(as_seed("seed", seed))
    total = (0 if steps is None else 2) + 2 * (2 + len(sizes))
    with tqdm(total=total, unit="run", desc="checking", disable=not progress, leave=False) as bar:
        x0 = torch.randn(images, *source.x.shape[1:], generator=generator).clamp_(-1, 1)
        ratios: list[float] = []
        if steps is not None:
            shown = min(max(images, profile.minimum), sizes[-1])
            draw = _Drawing(source, known, steps, clip_sample, shown, generator)
            x0 = draw(exact)
            bar.update()
            ratios = [psnr(b, a) for a, b in zip(x0, draw(tried), strict=True)]
            bar.update()
        cases: list[Case] = []
        floor: list[Deviation] = []
        worst = _Worst()
        for inputs in make_inputs(source, known.schedule, x0, parts, count, generator):
            truth = _evaluate(exact, inputs, count)
            bar.update()
            rounded = _evaluate(single, inputs, count)
            bar.update()
            floor.append(Deviation.of(rounded, truth))
            for size in sizes:
                output = _evaluate(tried, inputs, size)
                bar.update()
                cases += _cases(inputs, size, output, truth, rounded)
                worst.see(inputs, output, truth)
    report = Report(
        candidate=tried.name,
        precision=precision,
        tolerance=limits,
        cases=tuple(cases),
        floor=Deviation.worst(floor),
        psnr=tuple(ratios),
        steps=steps,
        emulated=tried.emulated,
    )
    if report.passed or tried.inside is None:
        return report
    x, t, condition = worst.samples()
    layers = compare_layers(exact.model, tried.inside, x, t, condition, source.constants)
    return replace(report, layers=tuple(layers))


class _Model:
    """A network called as (x, t, **condition) with tensors on the CPU, whatever it computes on."""

    def __init__(self, model: Any, dtype: torch.dtype, constants: Mapping[str, Any]) -> None:
        self.dtype, self.constants = dtype, dict(constants)
        self.denoiser = Denoiser(model)
        self.device = self.denoiser.device or torch.device("cpu")

    def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        named = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for name, value in condition.items()
        }
        with torch.no_grad():
            found = self.denoiser(
                x.to(self.device, self.dtype), t.to(self.device), {**named, **self.constants}
            )
        # a copy: a runtime may write its next result into the same memory
        return found.to("cpu", self.dtype, copy=True)


class _Exact(_Model):
    """The reference in plain PyTorch, in one dtype."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.model = _without_fused_ops(frozen_copy(source.model, dtype))
        super().__init__(self.model, dtype, source.constants)


class _Tried(_Model):
    """The candidate, and what can be looked into when it fails."""

    def __init__(self, candidate: Candidate, source: Source) -> None:
        self.inside: OnnxProbe | nn.Module | None = None
        self.name = type(candidate).__name__
        model: Any = candidate
        constants: Mapping[str, Any] = {}
        if isinstance(candidate, (str, os.PathLike)):
            self.name = os.fspath(candidate)
            self.inside = model = OnnxProbe(candidate)
        elif isinstance(candidate, type(source.model)):
            self.inside, constants = candidate, source.constants
        self.emulated = isinstance(model, OnnxProbe) and model.emulated
        super().__init__(model, torch.float32, constants)


class _Drawing:
    """The same images from whichever model: x_T and condition are fixed."""

    def __init__(
        self,
        source: Source,
        known: Metadata,
        steps: int,
        clip_sample: float | None,
        count: int,
        generator: torch.Generator,
    ) -> None:
        self.known, self.steps, self.clip_sample = known, steps, clip_sample
        self.x_T = torch.randn(count, *source.x.shape[1:], generator=generator)
        self.condition = random_condition(source, count, generator)

    def __call__(self, model: _Model) -> Tensor:
        """DDIM at eta = 0, without capture, on the CPU: [N, C, ...] in the model's dtype."""
        assert self.known.schedule is not None
        sampler = Sampler(
            model,
            self.known.schedule,
            steps=min(self.steps, self.known.schedule.num_train_timesteps),
            prediction_type=self.known.prediction_type or "epsilon",  # type: ignore[arg-type]
            variance_type=self.known.variance_type or "fixed_small",  # type: ignore[arg-type]
            clip_sample=self.clip_sample,
            backend="reference",
            graph=None,
            dtype=model.dtype,
        )
        return sampler.sample(self.x_T.shape, x_T=self.x_T, condition=self.condition)


class _Worst:
    """Remembers the samples that came out worst."""

    def __init__(self) -> None:
        self.error = -1.0

    def see(self, inputs: Inputs, output: Tensor, truth: Tensor) -> None:
        """Take the worst of these where they are worse than all before."""
        pairs = zip(output[:, None], truth[:, None], strict=True)
        errors = torch.tensor([Deviation.of(*pair).relative_l2 for pair in pairs])
        if float(errors.max()) > self.error:
            self.error, self.inputs = float(errors.max()), inputs
            self.index = errors.argsort(descending=True)[:LAYER_SAMPLES]

    def samples(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x, t and condition."""
        return self.inputs.take(self.index)


def _said(candidate: Candidate) -> Metadata:
    """What the candidate says of itself; nothing is not an error."""
    said: Any = getattr(candidate, "metadata", None)
    if isinstance(candidate, (str, os.PathLike)):
        check_path("candidate", candidate)
        if not Path(candidate).is_file():
            raise ValueError(f"{candidate} is not there, or no file; accepted: an ONNX file")
        with contextlib.suppress(ValueError):
            said = read_metadata(candidate)
    else:
        check_callable("candidate", candidate, "the path of an .onnx file, or callable as (x, t)")
    if not isinstance(said, Metadata):
        return Metadata()
    if said.kind != "denoiser":
        raise ValueError(f"the candidate is a whole {said.kind}; accepted: a network")
    return said


def _completed(
    said: Metadata, own: Metadata, schedule: Schedule | None, prediction_type: str | None
) -> Metadata:
    """As the caller says, as the candidate says, or as the reference says."""
    plan = schedule or said.schedule or own.schedule
    if plan is None:
        raise ValueError("give schedule=...: neither the reference nor the candidate names one")
    return replace(
        said,
        schedule=plan,
        prediction_type=prediction_type or said.prediction_type or own.prediction_type,
        variance_type=said.variance_type or own.variance_type,
        normalization=said.normalization or own.normalization,
    )


def _limits(tolerance: Tolerance | float | None, precision: str) -> Tolerance:
    check_word("precision", precision, TOLERANCES)
    if tolerance is None:
        return TOLERANCES[precision]
    if isinstance(tolerance, Tolerance):
        return tolerance
    if not 0 < as_number("tolerance", tolerance, finite=False) < math.inf:
        raise ValueError(f"tolerance must be a positive number; got {tolerance}")
    return replace(TOLERANCES[precision], relative_l2=float(tolerance))


def _evaluate(model: _Model, inputs: Inputs, size: int) -> Tensor:
    """Every sample, ``size`` at a time; the last call is filled up with the first samples."""
    count = len(inputs.x)
    outputs = []
    for start in range(0, count, size):
        x, t, condition = inputs.take(torch.arange(start, start + size) % count)
        outputs.append(model(x, t, **condition))
    return torch.cat(outputs)[:count]


def _cases(
    inputs: Inputs, batch: int, output: Tensor, truth: Tensor, rounded: Tensor
) -> list[Case]:
    """One case per bin."""
    cases = []
    for part in dict.fromkeys(inputs.bins):
        index = [n for n, own in enumerate(inputs.bins) if own == part]
        cases.append(
            Case(
                inputs.kind,
                part,
                batch,
                Deviation.of(output[index], truth[index]),
                Deviation.of(output[index], rounded[index]),
            )
        )
    return cases


class _PlainNorm(nn.Module):
    """`GroupNormSiLU` by its formula: no fused op, no backend to choose."""

    def __init__(self, norm: GroupNormSiLU) -> None:
        super().__init__()
        self.norm = [norm]  # in a list: this module has no children and stays a layer
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor, **modulation: Tensor | None) -> Tensor:
        """As `GroupNormSiLU.forward`, with scale, shift and add by name."""
        norm = self.norm[0]
        scale, shift, add = (modulation.get(name) for name in ("scale", "shift", "add"))
        silu = norm.act == "silu"
        y = formula(x, self.weight, self.bias, norm.groups, norm.eps, scale, shift, add, silu)
        return y.to(x.dtype)


def _without_fused_ops(model: nn.Module) -> nn.Module:
    """The same network, in place, with every fused norm in plain PyTorch."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, GroupNormSiLU)]
    for name, norm in norms:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _PlainNorm(norm))
    return model
