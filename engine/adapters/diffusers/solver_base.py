"""diffusers' solvers whose updates are rows of the step table.

    class EulerDiscreteScheduler(Solver, diffusers.EulerDiscreteScheduler): step = one row

Such a class has everything of diffusers' own, which is its second base: configuration, timesteps,
sigmas, counters, forward process. Its ``step`` is one `denoise_step` by a row that comes from those
sigmas; what no row can do runs the original ``step``, on the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stepfuse.engine.adapters.diffusers.listed import version
from stepfuse.engine.sampling.points import Points
from stepfuse.engine.sampling.terms import Terms, split, table
from stepfuse.kernels.registration import records_gradient
from stepfuse.kernels.step_row import Column

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")
_MOST_TABLES = 16  # of one scheduler: one for each place where a loop started, and each device


class Steps(NamedTuple):
    """The rows of a loop that begins at one of its timesteps, R of them, on the sample's device."""

    table: Tensor  # [R, 16]
    history: Tensor  # [R, 8]
    numbers: Tensor  # int64 [R, 2]: numbers[i, :1] is row i for `denoise_step`
    terms: list[Terms]
    predictor: list[Terms]  # the same without what corrects the step before


class Solver:
    """The base, beside a scheduler of diffusers.

    ``strict`` is an attribute, and no part of the configuration: False does what is right where
    diffusers does not.
    """

    config: Any
    sigmas: Tensor
    timesteps: Tensor
    step_index: int | None
    _internal_dict: Any
    _step_index: int | None

    strict = True
    _predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")
    _keep: int | None = None  # how many steps back are kept
    _levels = "sigmas"  # the attribute that says how much noise there is

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler that calls itself diffusers', so that saved pipelines load without ours."""
        made = super().__new__(cls)
        vars(made)["__module__"] = cls.__bases__[1].__module__
        vars(made).update(_tables={}, _tables_of=())
        return made

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers; ``strict`` is taken beside the configuration, which does not hold it."""
        strict = kwargs.pop("strict", True)
        theirs: Any = super()
        made, unused = theirs.from_config(config, return_unused_kwargs=True, **kwargs)
        made.strict = strict
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def taken_over(cls, theirs: Any, strict: bool) -> Any:
        """One in the state of ``theirs``, the same tensors."""
        made = cls.__new__(cls)
        vars(made).update({**vars(theirs), **vars(made)})
        made.strict = strict
        return made

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why no row does what this configuration says; None where rows do."""
        accepted, given = cls._predictions, cls._prediction(config)
        if given not in accepted:
            return f"prediction_type {given!r} is none of {', '.join(accepted)}"
        for name in ("thresholding", "use_flow_sigmas", "use_dynamic_shifting"):
            if getattr(config, name, False):
                return f"{name} is on"
        return None

    @staticmethod
    def _prediction(config: Any) -> str:
        return str(config.prediction_type)

    def _options(self) -> tuple[Any, ...]:
        """What rows also depend on: attributes, and arguments of ``step``."""
        return ()

    def _points(self) -> Points | None:
        """Where steps start and end; None where diffusers' results there are no numbers."""
        sigmas = self.sigmas
        steps = sigmas.diff()
        falls = steps < 0 if self._keep is not None else steps <= 0  # nothing to look back over
        if (
            not bool(falls.all() & sigmas.isfinite().all())
            or len(sigmas) != len(self.timesteps) + 1
            or len(sigmas) < 2
        ):
            return None
        return self._scaled(self.timesteps.double().cpu(), sigmas.double().cpu())

    def _scaled(self, timesteps: Tensor, sigmas: Tensor) -> Points:
        """The points of these sigmas, in the scale that this scheduler's x has."""
        return Points.of_sigmas(timesteps, sigmas)

    def _terms(self, points: Points, first: int, *options: Any) -> list[Terms]:
        """The steps from number ``first`` on, without a memory of those before."""
        raise NotImplementedError

    def _predictor(self, points: Points) -> list[Terms]:
        """The terms without what corrects the step before, where a solver has that."""
        return []

    def _steps(
        self, first: int, device: torch.device, *options: Any, prediction: str | None = None
    ) -> Any:
        """The rows of a loop that begins at step ``first``; None where there are none.

        ``options`` go to `_terms`; ``prediction`` is another type than that of the configuration.
        """
        levels: Tensor = getattr(self, self._levels)
        of = (self._internal_dict, levels, self.timesteps)
        now = (*of, version(levels), version(self.timesteps))
        known: Sequence[Any] = self.__dict__["_tables_of"]
        if len(known) != len(now) or not all(
            a is b if i < len(of) else a == b
            for i, (a, b) in enumerate(zip(now, known, strict=True))
        ):
            vars(self).update(_tables={}, _tables_of=now)  # kept alive: no other has their ids
        tables: dict[Any, Steps | None] = self.__dict__["_tables"]
        key = (first, device, self.strict, prediction, *options, *self._options())
        if key not in tables:
            if len(tables) >= _MOST_TABLES:
                tables.clear()
            tables[key] = self._written(first, device, prediction, options)
        return tables[key]

    def _written(
        self, first: int, device: torch.device, prediction: str | None, options: tuple[Any, ...]
    ) -> Steps | None:
        if self.refusal(self.config) is not None or not 0 <= first < len(self.timesteps):
            return None
        with torch.inference_mode(False), torch.no_grad():  # rows serve a later step outside, too
            points = self._points()
            if points is None:
                return None
            points = points.since(first)
            terms = self._terms(points, first, *options)
            predicted = prediction or self._prediction(self.config)
            rows = table(points, terms, predicted, self._clip(), self._keep)
            finite = rows.isfinite()
            finite[:, Column.CLIP] = True
            if not bool(finite.all()):
                return None
            steps, history = split(rows.to(torch.float32).to(device))
            # two columns, so that each step's number starts at 16 bytes, as allocations do
            numbers = torch.arange(len(rows), device=device).repeat(2, 1).t().contiguous()
        return Steps(steps, history, numbers, terms, self._predictor(points) or terms)

    def _clip(self) -> float | None:
        config = self.config
        return float(config.clip_sample_range) if getattr(config, "clip_sample", False) else None

    @staticmethod
    def _fits(sample: Any, output: Any) -> bool:
        """Whether `denoise_step` takes both, and nobody wants a gradient of them."""
        return (
            isinstance(sample, Tensor)
            and isinstance(output, Tensor)
            and sample.dim() > 1
            and sample.numel() > 0
            and sample.shape == output.shape
            and sample.dtype in _DTYPES
            and output.dtype in _DTYPES
            and sample.device == output.device
            and sample.device.type in _DEVICES
            and not records_gradient((sample, output))
        )

    @staticmethod
    def _noise(like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
        noise: Tensor = randn_tensor(
            like.shape, dtype=dtype, device=like.device, generator=generator
        )
        return noise
