"""Drop-in acceleration of denoising-diffusion-pytorch's `GaussianDiffusion`.

`accelerate` exchanges the sampling loops, `p_sample` and `q_sample` of one object. The new ones
call the network through `stepfuse.optimize` and do each update by one `denoise_step`. Random
numbers are drawn in their order, from PyTorch's generator, so that a seed gives the images it gave
before.
Training, buffers and the state dict are theirs and stay as they are.

Their conventions, which the rows below reproduce: coefficients come from their float32 buffers; the
variance at t = 0 is clamped; x0 is clipped to [-1, 1]; DDIM re-derives epsilon from the clipped x0
and draws noise even where eta = 0 multiplies it by 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepfuse.engine.adapters.network import FastNetwork, check_options
from stepfuse.engine.adapters.patch import Fast, class_name, install, remove, report
from stepfuse.engine.sampling.rows import Rows, Scale
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step

SUPPORTED = (
    "denoising_diffusion_pytorch.GaussianDiffusion (pred_noise, pred_x0, pred_v)",
    "denoising_diffusion_pytorch.LearnedGaussianDiffusion (p_sample_loop)",
)

_PACKAGE = "denoising_diffusion_pytorch"
_REPLACED = ("p_sample", "p_sample_loop", "ddim_sample", "q_sample")
# what an update is made of: a subclass that changes one of these has another sampler
_PARTS = (
    *_REPLACED,
    "model_predictions",
    "p_mean_variance",
    "q_posterior",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)
_CACHED_TABLES = 4


def supports(obj: Any) -> bool:
    """Whether the object's class, or one it derives from, is of denoising-diffusion-pytorch.

    `accelerate` says which of them it takes, and why not the others.
    """
    return any(
        base.__module__ == _PACKAGE or base.__module__.startswith(f"{_PACKAGE}.")
        for base in type(obj).__mro__
    )


def accelerate(
    obj: Any,
    *,
    optimize: bool = True,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    backend: str = "auto",
) -> Any:
    """Make ``p_sample_loop``, ``ddim_sample``, ``p_sample`` and ``q_sample`` of ``obj`` fast.

    Args:
        obj: a `GaussianDiffusion` or `LearnedGaussianDiffusion`, changed in place.
        optimize: run the network through `stepfuse.optimize` in the sampling loops.
        dtype: torch.bfloat16 or torch.float16 for the optimised network's products.
        strict: draw random numbers exactly as they do, and round DDIM's coefficients as they do.
            False leaves out the noise that DDIM draws and does not use where eta = 0 (the images
            are the same, the generator's state after them is not), and takes the coefficients in
            float64.
        backend: of `denoise_step` and `add_noise`.

    Returns ``obj``. Raises TypeError for other classes and for subclasses with a sampler of their
    own.
    """
    learned = _check(obj)
    check_options(optimize, dtype, strict, backend)
    network = FastNetwork(obj.model, optimize, dtype)
    remove(obj)
    names = [name for name in _REPLACED if not (learned and name == "ddim_sample")]
    install(obj, FastDiffusion(obj, network, learned, strict, backend), names)
    return obj


def restore(obj: Any) -> Any:
    """Take back what `accelerate` did, if it did anything, and return ``obj``."""
    _check(obj)
    return remove(obj)


def explain(obj: Any) -> str:
    """What of an accelerated ``obj`` is replaced, and what became of its network."""
    _check(obj)
    return report(obj)


def _check(obj: Any) -> bool:
    """Whether the variance is learned; TypeError for what is not taken."""
    from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion

    supported = f"supported: {'; '.join(SUPPORTED)}"
    if not isinstance(obj, GaussianDiffusion):
        hint = "for a network use stepfuse.optimize; " if _is_network(obj) else ""
        raise TypeError(f"cannot accelerate {class_name(obj)}; {hint}{supported}")
    learned = isinstance(obj, LearnedGaussianDiffusion)
    base = LearnedGaussianDiffusion if learned else GaussianDiffusion
    for name in _PARTS:
        if getattr(type(obj), name) is not getattr(base, name):
            raise TypeError(
                f"cannot accelerate {class_name(obj)}: it has a {name} of its own, so that its "
                f"sampling is not that of {base.__name__}; {supported}"
            )
    return learned


def _is_network(obj: Any) -> bool:
    return isinstance(obj, nn.Module) and not hasattr(obj, "sample")


class FastDiffusion(Fast):
    """The replacing methods; the signatures and results are those of the replaced ones."""

    def __init__(
        self, diffusion: Any, network: FastNetwork, learned: bool, strict: bool, backend: str
    ) -> None:
        super().__init__()
        self.diffusion, self.network = diffusion, network
        self.learned, self.strict, self.backend = learned, strict, backend
        self._tables: dict[Any, Tensor] = {}

    def p_sample(
        self, x: Tensor, t: int, x_self_cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_{t-1}, x0) from x_t."""
        d = self.diffusion
        if x.dtype != d.alphas_cumprod.dtype:  # a coefficient would change the dtype of x
            results: tuple[Tensor, Tensor] = self.theirs(d, "p_sample", x, t, x_self_cond)
            return results
        with _plain_tensors():
            table = self._table(self._ancestral, d.objective)
            network = self._network([t])
            out = self._output(network, x, t, x_self_cond)
            noise = torch.randn_like(x) if t > 0 else None
            step = self._step(x, out, table, d.num_timesteps - 1 - t, noise, return_x0=True)
        assert isinstance(step, tuple)
        return step

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Samples by DDPM over every timestep: [N, C, H, W], or [N, T + 1, C, H, W]."""
        d = self.diffusion
        if torch.get_default_dtype() != d.alphas_cumprod.dtype:
            images: Tensor = self.theirs(d, "p_sample_loop", shape, return_all_timesteps)
            return images
        times = list(range(d.num_timesteps - 1, -1, -1))
        noisy = [t > 0 for t in times]
        return self._loop(
            shape, times, noisy, (self._ancestral, d.objective), return_all_timesteps, len(times)
        )

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
        """Samples by DDIM over ``sampling_timesteps`` steps."""
        d = self.diffusion
        if torch.get_default_dtype() != d.alphas_cumprod.dtype:
            images: Tensor = self.theirs(d, "ddim_sample", shape, return_all_timesteps)
            return images
        ends = torch.linspace(-1, d.num_timesteps - 1, steps=d.sampling_timesteps + 1)
        times = list(reversed(ends.int().tolist()))
        drawn = self.strict or d.ddim_sampling_eta != 0
        noisy = [drawn and s >= 0 for s in times[1:]]
        rows = (self._implicit, d.objective, tuple(times), float(d.ddim_sampling_eta))
        return self._loop(shape, times[:-1], noisy, rows, return_all_timesteps, None)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, noise drawn where it is not given."""
        d = self.diffusion
        dtype = d.sqrt_alphas_cumprod.dtype
        if (
            d.immiscible
            or x_start.dtype != dtype
            or t.shape != x_start.shape[:1]
            or t.dtype is not torch.int64
            or x_start.numel() == 0
            or (noise is not None and (noise.shape, noise.dtype) != (x_start.shape, dtype))
        ):
            noised: Tensor = self.theirs(d, "q_sample", x_start, t, noise)
            return noised
        if noise is None:
            noise = torch.randn_like(x_start)
        abar = self._table(self._abar)
        result = add_noise(x_start, noise, t, abar, backend=self.backend)
        assert isinstance(result, Tensor)
        return result

    def explain(self) -> str:
        """What is replaced, and the network's own report."""
        lines = [f"replaced               {', '.join(self.replaced)}"]
        if self.learned:
            lines.append(
                "not replaced           ddim_sample: theirs, which uses no learned variance"
            )
        if self.diffusion.immiscible:
            lines.append("not replaced           q_sample: immiscible assigns the noise to samples")
        return "\n".join([*lines, f"network                {self.network.explain()}"])

    def _loop(
        self,
        shape: Sequence[int],
        times: list[int],
        noisy: list[bool],
        rows: tuple[Any, ...],
        return_all: bool,
        total: int | None,
    ) -> Tensor:
        d = self.diffusion
        with _plain_tensors():
            table = self._table(*rows)
            network = self._network(times)
            x = torch.randn(tuple(shape), device=d.device)
            noise, x0 = torch.empty_like(x), None
            images = [x]
            for row, t in enumerate(tqdm(times, desc="sampling loop time step", total=total)):
                out = self._output(network, x, t, x0)
                drawn = noise.normal_() if noisy[row] else None
                # what is kept, or goes into the next evaluation, is not written over
                if d.self_condition:
                    x, x0 = self._step(x, out, table, row, drawn, return_x0=True)
                else:
                    x = self._step(x, out, table, row, drawn, inplace=not return_all)
                if return_all:
                    images.append(x)
            result: Tensor = d.unnormalize(torch.stack(images, dim=1) if return_all else x)
        return result

    def _network(self, times: Sequence[int]) -> Any:
        self.network = self.network.of(self.diffusion.model)  # an attribute, set at any time
        return self.network.ready(times)

    def _output(self, network: Any, x: Tensor, t: int, x_self_cond: Tensor | None) -> Any:
        """The model's output; x0 goes in only where the model was built for it."""
        d = self.diffusion
        time = torch.full((x.shape[0],), t, device=x.device)
        if self.learned:
            return network(x, time)
        if d.self_condition and x_self_cond is None:
            # once a loop: not worth a compiled network of its own
            return d.model(x, time, None)
        return network(x, time, x_self_cond)

    def _step(
        self,
        x: Tensor,
        out: Tensor,
        table: Tensor,
        row: int,
        noise: Tensor | None,
        **how: Any,
    ) -> Any:
        return denoise_step(
            x,
            out,
            table,
            row,
            noise=noise,
            learned_variance=self.learned,
            backend=self.backend,
            **how,
        )

    def _table(self, build: Any, *args: Any) -> Tensor:
        """``build(*args)`` on the device of the buffers, kept until the buffers are others."""
        buffer = self.diffusion.alphas_cumprod
        version = None if buffer.is_inference() else buffer._version
        key = (build.__name__, args, buffer.data_ptr(), version, buffer.device, buffer.dtype)
        table = self._tables.get(key)
        if table is None:
            with torch.no_grad():
                table = build(*args)
            if build.__name__ != "_abar":  # add_noise wants float64
                table = table.to(buffer.dtype)
            table = self._tables[key] = table.to(buffer.device)
            while len(self._tables) > _CACHED_TABLES:
                del self._tables[next(iter(self._tables))]
        return table

    def _ancestral(self, objective: str) -> Tensor:
        """DDPM, row 0 being the last timestep: mean = c_1 x0 + c_2 x, variance from a logarithm."""
        rows = self._rows(range(self.diffusion.num_timesteps), objective)
        rows.ancestral((self._buffer("posterior_mean_coef1"), self._buffer("posterior_mean_coef2")))
        small = self._buffer("posterior_log_variance_clipped")
        if self.learned:
            rows.learned(small, self._buffer("betas").log(), True)
        else:
            rows.noised((small / 2).exp())
        return rows.table.flip(0)

    def _implicit(self, objective: str, times: tuple[int, ...], eta: float) -> Tensor:
        """DDIM from each of ``times`` to the next; -1 is the x0 that was predicted.

        At eta = 1 the difference under the root of c cancels: they take it in the dtype of the
        buffers, so that half its digits are rounding where abar_t is small.
        """
        rows = self._rows(times[:-1], objective)
        abar = self._buffer("alphas_cumprod")
        if self.strict:
            abar = abar.to(self.diffusion.alphas_cumprod.dtype)
        ends = torch.tensor(times[1:], device="cpu")
        a, b = abar[list(times[:-1])], torch.where(ends < 0, 1.0, abar[ends])
        sigma = eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
        direction = torch.where(ends < 0, 0.0, (1 - b - sigma**2).sqrt())
        rows.implicit(b.double().sqrt(), direction, torch.where(ends < 0, 0.0, sigma), True)
        return rows.table

    def _rows(self, times: Sequence[int], objective: str) -> Rows:
        """Rows that say what the output means and that x0 is clipped, at ``times``."""
        at = list(times)
        scale = Scale.of_reciprocals(
            self._buffer("sqrt_recip_alphas_cumprod")[at],
            self._buffer("sqrt_recipm1_alphas_cumprod")[at],
        )
        rows = Rows(torch.tensor(at, device="cpu"), None, None, 1.0, scale)
        # their p_mean_variance with a learned variance takes any output for epsilon
        if objective == "pred_noise" or self.learned:
            rows.predict("epsilon")
        elif objective == "pred_v":
            rows.signal = self._buffer("sqrt_alphas_cumprod")[at]
            rows.noise = self._buffer("sqrt_one_minus_alphas_cumprod")[at]
            rows.predict("v_prediction")
        else:
            rows.predict("sample")
        return rows

    def _abar(self) -> Tensor:
        """abar in float64 with both square roots as exact as their buffers have them."""
        signal = self._buffer("sqrt_alphas_cumprod") ** 2
        noise = self._buffer("sqrt_one_minus_alphas_cumprod") ** 2
        return torch.where(signal < noise, signal, 1 - noise)

    def _buffer(self, name: str) -> Tensor:
        values: Tensor = getattr(self.diffusion, name)
        return values.detach().to("cpu", torch.float64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and tensors with version counters even inside torch.inference_mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
