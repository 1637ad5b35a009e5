"""What the schedulers share: timesteps, cached rows of the step table, one update by a row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from stepfuse.engine.adapters.diffusers.listed import place_in, version
from stepfuse.engine.adapters.diffusers.scheduler_rows import plain_step
from stepfuse.engine.adapters.diffusers.scheduler_tables import betas_of, spaced
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.checks import FLOATS
from stepfuse.kernels.denoise_step import denoise_step
from stepfuse.kernels.step_row import Column

_DEVICES = ("cpu", "cuda")
_COEFFICIENTS = [
    *(Column.P_X, Column.P_O, Column.C_X, Column.C_O, Column.C_0),
    *(Column.SIGMA, Column.L_0, Column.L_1),
]
_MOST_TABLES = 16  # of one scheduler: one for each eta, device and configuration in use
# 1 - abar that float64 rows take for abar = 1, where x is x0 and every formula divides 0 by 0
_NEARLY_ONE = 2.0**-40


class Row(NamedTuple):
    """One row: where it stands for `denoise_step`, and its numbers for the host."""

    table: Tensor  # [S, 16] on the sample's device
    step: Tensor | None  # int64 [1]; None where a coefficient is not finite, which no kernel takes
    numbers: list[float]


def _takes(x: Tensor) -> bool:
    """Whether `denoise_step` takes such a sample."""
    return x.dim() > 1 and x.numel() > 0 and x.dtype in FLOATS and x.device.type in _DEVICES


class StepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The base of DDIM, its inverse and DDPM: ``step`` looks a row up and hands it to one kernel.

    Rows are built at the first step of a loop, for all its timesteps, and kept until the timesteps,
    the configuration or ``alphas_cumprod`` change. A timestep that is not in the list gets a row
    of its own.
    """

    order = 1
    _home = "scheduling_utils"  # the module of diffusers that holds the class of the same name
    _end = "one"  # the attribute that holds abar beyond the list
    _ascending = False
    _spacings: tuple[str, ...] = ("linspace", "leading", "trailing")
    ignore_for_config = ["strict"]  # noqa: RUF012

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers; ``strict`` is taken beside the configuration, which does not hold it."""
        strict = kwargs.pop("strict", True)
        made, unused = super().from_config(config, return_unused_kwargs=True, **kwargs)
        made.strict = strict
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def taken_over(cls, theirs: Any, strict: bool) -> Any:
        """One of the configuration of ``theirs``, with its timesteps and tables as they are."""
        made = cls.from_config(theirs.config, strict=strict)
        for name in vars(made).keys() & vars(theirs).keys():
            vars(made)[name] = vars(theirs)[name]
        return made

    @classmethod
    def refusal(cls, config: Any) -> str | None:
        """Why ours cannot stand for a scheduler of this configuration: never."""
        return None

    def _begin(self, strict: bool) -> None:
        """Tables and state, from the registered configuration."""
        config = self.config
        self.strict = strict
        self.betas = betas_of(config, type(self))
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        steps = torch.arange(config.num_train_timesteps, device="cpu")
        self._take_timesteps(steps if self._ascending else steps.flip(0), None)
        # pipelines write this name into model_index.json: what they save loads without stepfuse
        self.__dict__["__module__"] = f"diffusers.schedulers.{self._home}"

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` as it is: these schedulers scale nothing."""
        return sample

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Choose the timesteps of a loop of ``num_inference_steps``, by ``timestep_spacing``.

        Raises ValueError for less than one step, for more than the training schedule has, and for a
        spacing that the scheduler does not know.
        """
        config, steps = self.config, num_inference_steps
        train_steps = config.num_train_timesteps
        listed = spaced(
            config.timestep_spacing, self._spacings, train_steps, steps, config.steps_offset
        )
        if not self.strict:
            listed = listed[(listed >= 0) & (listed < train_steps)]
        self.num_inference_steps = steps
        self._take_timesteps(listed.flip(0) if self._ascending else listed, device)

    def _take_timesteps(self, listed: Tensor, device: str | torch.device | None) -> None:
        self.timesteps = listed.to(device)
        self._listed: list[int] = listed.tolist()
        self._listed_of, self._listed_version = self.timesteps, version(self.timesteps)
        self._tables: dict[Any, dict[int, Row]] = {}
        self._constants: tuple[Tensor | None, Tensor | None] = (None, None)

    def _timestep_list(self) -> list[int]:
        """``timesteps`` on the host, also where the attribute was exchanged or written to."""
        listed = self.timesteps
        if listed is not self._listed_of or version(listed) != self._listed_version:
            self._listed, self._listed_of = listed.tolist(), listed
            self._listed_version = version(listed)
            self._tables = {}
        return self._listed

    def _index(self, timestep: Any) -> int:
        """The timestep as an int, without waiting for the device where it is a view of the list."""
        if type(timestep) is int:
            return timestep
        if not isinstance(timestep, Tensor):
            return operator.index(timestep)
        if not timestep.is_cpu and timestep.device == self.timesteps.device:
            place = place_in(timestep, self.timesteps)
            if place is not None:
                return self._timestep_list()[place]
        return timestep.item()  # type: ignore[return-value]

    def _abar(self) -> Tensor:
        """abar on the host: float32 as diffusers has it, float64 where not strict."""
        if self.strict:
            return self.alphas_cumprod.detach().cpu()
        betas = betas_of(self.config, type(self), torch.float64)
        return torch.cumprod(1 - betas, dim=0).clamp(max=1 - _NEARLY_ONE)

    def _rows(self, timesteps: list[int], *options: Any) -> Tensor:
        """Rows from these timesteps, float64 [S, 16] on the CPU."""
        raise NotImplementedError

    def _row(self, t: int, sample: Tensor, *options: Any) -> Row:
        """The row of timestep t for this configuration and these options."""
        self._timestep_list()
        config, abar, end = self.config, self.alphas_cumprod, getattr(self, self._end)
        key = (
            sample.device,
            sample.dtype is torch.float64,
            self.strict,
            self.num_inference_steps,
            config.num_train_timesteps,
            config.prediction_type,
            config.clip_sample,
            config.clip_sample_range,
            id(abar),
            version(abar),
            id(end),
            options,
        )
        rows = self._tables.get(key)
        if rows is not None:
            row = rows.get(t)
            if row is not None:
                return row
        return self._new_row(key, t, sample, options)

    def _new_row(self, key: Any, t: int, sample: Tensor, options: tuple[Any, ...]) -> Row:
        constants = (self.alphas_cumprod, getattr(self, self._end))
        if any(now is not then for now, then in zip(constants, self._constants, strict=True)):
            self._tables.clear()
            self._constants = constants  # while they live, no other tensor has their ids
        rows = self._tables.get(key)
        if rows is None:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            size = len(self.alphas_cumprod)
            wanted = [s for s in self._timestep_list() if -size <= s < size]
            rows = self._tables[key] = self._table(wanted, sample, options)
        if t not in rows:
            rows.update(self._table([t], sample, options))
        return rows[t]

    def _table(
        self, timesteps: Sequence[int], sample: Tensor, options: tuple[Any, ...]
    ) -> dict[int, Row]:
        if not timesteps:
            return {}
        with torch.inference_mode(False), torch.no_grad():  # rows serve a later training step too
            numbers = self._rows(list(timesteps), *options)
            dtype = torch.float64 if sample.dtype is torch.float64 else torch.float32
            table = numbers.to(sample.device, dtype)
            # two columns, so that each step's number starts at 16 bytes, as allocations do
            steps = torch.arange(len(numbers), device=sample.device).repeat(2, 1).t().contiguous()
        finite: list[bool] = numbers[:, _COEFFICIENTS].isfinite().all(dim=1).tolist()
        if not self.strict and not all(finite):
            raise ValueError(
                f"no step starts at timestep {timesteps[finite.index(False)]}: abar is 0 or 1 "
                f"there; got prediction_type {self.config.prediction_type!r}, accepted where abar "
                "is 0: 'sample', 'v_prediction', where it is 1: 'epsilon', 'v_prediction'"
            )
        return {
            t: Row(table, steps[i, :1] if finite[i] else None, values)
            for i, (t, values) in enumerate(zip(timesteps, numbers.tolist(), strict=True))
        }

    def _clip(self) -> float | None:
        config = self.config
        if getattr(config, "thresholding", False) or not config.clip_sample:
            return None
        return float(config.clip_sample_range)

    def _limit(self, x0: Tensor) -> Tensor:
        """x0 clipped or thresholded, as the configuration says."""
        if getattr(self.config, "thresholding", False):
            return self._threshold_sample(x0)
        clip = self._clip()
        return x0 if clip is None else x0.clamp(-clip, clip)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, section 2.3), sample by sample.

        s = quantile(|x0|, ratio), at least 1 and at most ``sample_max_value``;
        x0 = clamp(x0, -s, s) / s.
        """
        config = self.config
        flat = sample if sample.dtype is torch.float64 else sample.float()
        flat = flat.reshape(sample.shape[0], -1)
        scale = torch.quantile(flat.abs(), config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        scale = scale.clamp(min=1, max=config.sample_max_value)
        return (flat.clamp(-scale, scale) / scale).reshape(sample.shape).to(sample.dtype)

    def _update(
        self,
        row: Row,
        sample: Tensor,
        output: Tensor,
        noise: Tensor | None,
        thresholding: bool = False,
        split: bool = False,
        learned: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(x_s, x0) by one kernel, in the dtype that the tensors promote to.

        ``split``: the output has twice the channels of the sample, the second half being a variance
        that is ``learned`` by the row's L_0 and L_1, or that the noise holds already.
        """
        fused = row.step is not None and not thresholding and _takes(sample)
        if (
            fused
            and output.dtype is sample.dtype
            and output.shape == sample.shape
            and (noise is None or (noise.dtype is sample.dtype and noise.shape == sample.shape))
        ):
            return self._fused(row, sample, output, noise, False)
        channels = sample.shape[1] if split else 0
        mean = output[:, :channels] if split else output
        others = [mean] if noise is None else [mean, noise]
        if fused and all(x.shape == sample.shape and x.dtype in FLOATS for x in others):
            x0_dtype = torch.promote_types(sample.dtype, output.dtype)
            dtype = x0_dtype if noise is None else torch.promote_types(x0_dtype, noise.dtype)
            x_s, x0 = self._fused(row, sample.to(dtype), output, noise, learned)
            return x_s, x0.to(x0_dtype)
        return plain_step(
            row.numbers,
            self.config.prediction_type,
            self._limit,
            sample,
            mean,
            noise,
            output[:, channels:] if learned else None,
        )

    def _fused(
        self, row: Row, sample: Tensor, output: Tensor, noise: Tensor | None, learned: bool
    ) -> tuple[Tensor, Tensor]:
        return denoise_step(  # type: ignore[return-value]
            sample,
            output,
            row.table,
            row.step,  # type: ignore[arg-type]
            noise=noise,
            learned_variance=learned,
            return_x0=True,
        )


class NoisingScheduler(StepScheduler):
    """Adds the forward process."""

    _forward_table: tuple[Any, ...] = (None,)

    def _forward_abar(self, like: Tensor) -> Tensor:
        """abar in float64 on the device of ``like``, rounded to its dtype first as diffusers does.

        Where not strict nothing is rounded: half precision takes 1 - abar for 0 at small t.
        """
        abar = self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        kept, *now = self._forward_table
        if kept is not abar or now[:3] != [version(abar), like.dtype, self.strict]:
            if self.strict:
                table = abar.to(like.dtype).to(torch.float64)
            else:
                table = self._abar().to(like.device)
            self._forward_table = (abar, version(abar), like.dtype, self.strict, table)
        return self._forward_table[-1]  # type: ignore[no-any-return]

    def _forward(self, x0: Tensor, noise: Tensor, timesteps: Tensor, target: str | None) -> Tensor:
        abar = self._forward_abar(x0)
        t = timesteps.to(x0.device, torch.int64).flatten()
        t = torch.where(t < 0, t + len(abar), t)
        dtype = torch.promote_types(x0.dtype, noise.dtype)
        shape = torch.broadcast_shapes(x0.shape, noise.shape, (len(t), *(1,) * (x0.dim() - 1)))  # type: ignore[no-untyped-call]
        x0, noise = x0.to(dtype).expand(shape), noise.to(dtype).expand(shape)
        result = add_noise(x0, noise, t.expand(shape[0]), abar, target=target)  # type: ignore[arg-type]
        return result[1] if isinstance(result, tuple) else result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM, eq. 4).

        original_samples, noise: [N, ...]; timesteps: int64 [N] or [1].
        """
        return self._forward(original_samples, noise, timesteps, None)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (Salimans & Ho 2022, section 4)."""
        return self._forward(sample, noise, timesteps, "v_prediction")
