"""`onnx_loop`: a whole sampler as an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.network import Network, Source
from stepfuse.engine.export.to_onnx.graph import build
from stepfuse.engine.export.to_onnx.job import Exported, FileOptions, prepare
from stepfuse.engine.export.to_onnx.loop_graph import Loop, looped
from stepfuse.engine.export.to_onnx.verify import verify_loop
from stepfuse.engine.export.to_onnx.write import Draft
from stepfuse.engine.networks.checkpoint import Checkpoint
from stepfuse.engine.sampling.guidance.protocol import Guidance, Steering
from stepfuse.engine.sampling.methods import Method
from stepfuse.engine.sampling.sampler import Sampler
from stepfuse.engine.sampling.timesteps import Spacing
from stepfuse.kernels.checks import received
from stepfuse.kernels.step_row import Column

if TYPE_CHECKING:
    from typing_extensions import Unpack


def onnx_loop(
    model: nn.Module | Checkpoint,
    path: str | os.PathLike[str],
    *,
    steps: int | str = 50,
    eta: float = 0.0,
    method: str | Method = "ddim",
    spacing: Spacing = "leading",
    steps_offset: int = 0,
    timesteps: Sequence[int] | None = None,
    order: int | None = None,
    solver_type: str | None = None,
    strict: bool = True,
    guidance: Guidance | None = None,
    clip_sample: float | None = 1.0,
    rederive_epsilon: bool = True,
    final_alpha_one: bool = True,
    **options: Unpack[FileOptions],
) -> Exported:
    """Write network and sampling loop as one ONNX model: noise in, images out, without Python.

        sf.export.onnx_loop(sf.load("digits"), "sampler.onnx", steps=50)

    The inputs are "x_T" float32 [N, C, H, W], standard normal, the conditions by name, and where a
    step adds noise (eta > 0, or method "ddpm"), "noise" float32 [S, N, C, H, W], row i for step i.
    The output "images" is what `Sampler.sample` returns for the same x_T and noise; of a checkpoint
    with a normalization, 2 `Checkpoint.decode` - 1 of that. The rows of the
    step table are computed in float64 and stored as float32, as the sampler's own are; the update
    is float32 whatever the ``precision`` of the network.

    Args:
        model, path: see `onnx`.
        steps, eta, method, spacing, steps_offset, timesteps, order, solver_type, strict,
            clip_sample, rederive_epsilon, final_alpha_one: see `Sampler`. Timesteps are whole: the
            network in the file takes integers. What a solver remembers is carried by the loop.
        guidance: `CFG`, or another that is a ``mixture`` of two outputs. Both halves go through the
            network in one call of twice the batch; its ``unconditional`` may hold tensors that
            broadcast over the batch, or None for labels.
        options: those of `onnx` but ``dynamic_size``. ``verify`` runs all steps for the smallest
            batch, once in ONNX Runtime and once in `Sampler`, and compares the images.

    Raises: as `onnx`, and ValueError where schedule or prediction type are not known, or for
        guidance that has no such form.
    """
    for name in options:
        if name not in FileOptions.__annotations__:
            accepted = ", ".join(FileOptions.__annotations__)
            raise TypeError(
                f"onnx_loop has no option {name!r}; accepted besides its own: {accepted}"
            )
    job = prepare(model, path, **options)
    known, source = job.metadata, job.source
    if known.schedule is None or known.prediction_type is None:
        raise ValueError("give schedule=... and prediction_type=...: the model does not name them")
    if known.normalization is not None and clip_sample is not None:
        raise ValueError(
            f"clip_sample must be None for a checkpoint with a normalization; got {clip_sample}"
        )
    network = Network(source, job.precision)
    guided = _guidance(guidance, source)
    sampler = Sampler(
        network.promoted().named,
        known.schedule,
        method=method,
        steps=steps,
        spacing=spacing,
        steps_offset=steps_offset,
        timesteps=timesteps,
        order=order,
        solver_type=solver_type,
        strict=strict,
        eta=eta,
        prediction_type=known.prediction_type,  # type: ignore[arg-type]
        variance_type=known.variance_type or "fixed_small",  # type: ignore[arg-type]
        clip_sample=clip_sample,
        rederive_epsilon=rederive_epsilon,
        final_alpha_one=final_alpha_one,
        guidance=guided,
        backend="reference",
        graph=None,
    )
    noisy = bool((sampler.plan.table[:, Column.SIGMA] != 0).any())
    if not sampler.plan.whole:
        raise ValueError(
            "timesteps must be whole numbers: the network in a file takes integers; got "
            f"{next(t for t in sampler.timesteps if not isinstance(t, int)):.6g}"
        )
    loop = Loop(
        sampler.plan.table,
        None if guided is None else guided.unconditional,
        sampler.update.uses_learned_variance,
        noisy,
        [int(t) for t in sampler.timesteps],
        sampler.plan.history,
        sampler.plan.slots,
        known.normalization,
    )
    settings = {
        "method": str(method),
        "eta": float(eta),
        "timesteps": sampler.timesteps,
        "clip_sample": None if clip_sample is None else float(clip_sample),
        "rederive_epsilon": bool(rederive_epsilon),
        "final_alpha_one": bool(final_alpha_one),
        "guidance_scale": _scale(sampler),
    }
    if sampler.update.solver.orders:
        settings |= {"order": sampler.update.solver_order, "solver_type": sampler.update.kind}

    def graph() -> Any:
        profile = job.batch if guided is None else _doubled(job.batch)
        return looped(build(network, source, profile, job.opset, False), loop)

    def compare(draft: Draft) -> str:
        return verify_loop(draft, sampler, source, job.batch, loop)

    whole = replace(job, metadata=replace(known, kind="sampler", sampler=settings))
    return whole.write(graph, compare)


def _scale(sampler: Sampler) -> float | None:
    """The one scale of the guided steps; None where they have several, or none is guided."""
    rows = zip(sampler.plan.table, sampler.plan.guided, strict=True)
    scales = {float(row[Column.GUIDANCE]) for row, guided in rows if guided}
    return scales.pop() if len(scales) == 1 else None


def _guidance(guidance: Guidance | None, source: Source) -> Steering | None:
    """The same with tensors only, one entry that stands for all samples."""
    if guidance is None:
        return None
    steering = Steering(guidance)
    if not steering.mixture or steering.unconditional is None:
        raise ValueError(
            "guidance must be a CFG without rescale, or another whose outputs the update mixes "
            f"(mixture=True, with an unconditional); got {received(guidance)}"
        )
    replaced: dict[str, Tensor] = {}
    for name, value in steering.unconditional.items():
        if name not in source.condition:
            accepted = ", ".join(source.condition) or "none"
            raise ValueError(f"the network has no condition {name!r}; accepted: {accepted}")
        like = source.condition[name]
        if value is None and name == source.metadata.label_input:
            value = torch.tensor([source.metadata.num_classes])
        if not isinstance(value, Tensor):
            raise ValueError(f"unconditional {name!r} must be a tensor; got {received(value)}")
        try:
            replaced[name] = value.detach().to("cpu", like.dtype).expand_as(like[:1]).contiguous()
        except RuntimeError:
            raise ValueError(
                f"unconditional {name!r} must broadcast to {tuple(like[:1].shape)}; "
                f"got {tuple(value.shape)}"
            ) from None
    if not replaced:
        raise ValueError("guidance needs unconditional={name: ...}; got none")
    return Steering(guidance, replaced)


def _doubled(batch: BatchProfile) -> BatchProfile:
    return BatchProfile(2 * batch.minimum, 2 * batch.optimum, 2 * batch.maximum)
