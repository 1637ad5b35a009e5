"""Drop-in acceleration of guided-diffusion's and improved-diffusion's `GaussianDiffusion`.

Neither is on PyPI, and many projects carry a copy, so that an object is taken for what it has: the
attributes and methods of `GaussianDiffusion` or `SpacedDiffusion`. `accelerate` then compares a
step of theirs with ours on a few numbers, and replaces what agrees.

For OpenAI's checkpoints see `stepfuse.engine.networks.adm.load_adm`, which gives a network that
these loops call as ``model(x, t, labels)``: pass ``model_kwargs={"labels": y}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.adapters.guided_diffusion_probe import agreeing, signature
from stepfuse.engine.adapters.guided_diffusion_rows import (
    MEAN_TYPES,
    VAR_TYPES,
    Rows,
    Step,
    network_times,
)
from stepfuse.engine.adapters.guided_diffusion_run import (
    Run,
    device_of,
    start_dtype,
    with_bar,
)
from stepfuse.engine.adapters.network import FastNetwork, check_options
from stepfuse.engine.adapters.patch import Fast, class_name, install, remove, report
from stepfuse.kernels.add_noise import add_noise
from stepfuse.kernels.denoise_step import denoise_step

SUPPORTED = ("GaussianDiffusion and SpacedDiffusion of guided-diffusion and improved-diffusion",)

_ATTRIBUTES = (
    "betas",
    "num_timesteps",
    "model_mean_type",
    "model_var_type",
    "rescale_timesteps",
    "p_sample",
    "p_sample_loop",
    "ddim_sample",
    "q_sample",
)
_CACHED = 4  # tables, and networks


def supports(obj: Any) -> bool:
    """Whether the object has what a `GaussianDiffusion` of guided-diffusion has."""
    return not isinstance(obj, type) and all(hasattr(obj, name) for name in _ATTRIBUTES)


def accelerate(
    obj: Any,
    *,
    optimize: bool = True,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    backend: str = "auto",
) -> Any:
    """Make the sampling steps and loops of ``obj``, and ``q_sample``, fast.

    Args:
        obj: a `GaussianDiffusion` or `SpacedDiffusion`, changed in place.
        optimize: run a model that is an nn.Module through `stepfuse.optimize`.
        dtype: torch.bfloat16 or torch.float16 for the optimised network's products.
        strict: draw random numbers exactly as they do. False leaves out the noise that DDIM draws
            and does not use where eta = 0; the samples are the same.
        backend: of `denoise_step` and `add_noise`.

    Returns ``obj``. Raises TypeError for an object whose steps are others, with what differs.
    """
    _check(obj)
    check_options(optimize, dtype, strict, backend)
    remove(obj)
    # on the CPU, wherever it will run
    names, reasons = agreeing(obj, lambda d: FastDiffusion(d, False, None, True, "auto"))
    fast = FastDiffusion(obj, optimize, dtype, strict, backend, reasons)
    if "p_sample" not in names and "ddim_sample" not in names:
        raise TypeError(f"cannot accelerate {class_name(obj)}: {reasons['p_sample']}")
    if "ddim_reverse_sample" in names and not hasattr(obj, "ddim_reverse_sample_loop"):
        names.append("ddim_reverse_sample_loop")
    install(obj, fast, names)
    return obj


def restore(obj: Any) -> Any:
    """Take back what `accelerate` did, if it did anything, and return ``obj``."""
    _check(obj)
    return remove(obj)


def explain(obj: Any) -> str:
    """What of an accelerated ``obj`` is replaced and what is not, and of its networks."""
    _check(obj)
    return report(obj)


class FastDiffusion(Fast):
    """The replacing methods; arguments are those of the replaced ones."""

    def __init__(
        self,
        diffusion: Any,
        optimize: bool,
        dtype: torch.dtype | None,
        strict: bool,
        backend: str,
        reasons: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.optimize, self.dtype, self.strict, self.backend = optimize, dtype, strict, backend
        self.diffusion, self.reasons = diffusion, reasons or {}
        d = diffusion
        self.rows = Rows(d.betas, d.model_mean_type.name, d.model_var_type.name)
        self.times = network_times(d)
        self._networks: list[FastNetwork] = []
        self._tables: dict[Any, Tensor] = {}

    def p_sample(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """{"sample": x_{t-1}, "pred_xstart": x0} by DDPM."""
        return self._single("p_sample", args, kwargs)

    def ddim_sample(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """{"sample": x_{t-1}, "pred_xstart": x0} by DDIM."""
        return self._single("ddim_sample", args, kwargs)

    def ddim_reverse_sample(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """{"sample": x_{t+1}, "pred_xstart": x0} by DDIM's equation read upward."""
        return self._single("ddim_reverse_sample", args, kwargs)

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples by DDPM."""
        return self._last("p_sample", args, kwargs)

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples by DDIM."""
        return self._last("ddim_sample", args, kwargs)

    def p_sample_loop_progressive(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Tensor]]:
        """The results of `p_sample`, step by step."""
        return self._progressive("p_sample", args, kwargs)

    def ddim_sample_loop_progressive(
        self, *args: Any, **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        """The results of `ddim_sample`, step by step."""
        return self._progressive("ddim_sample", args, kwargs)

    def ddim_reverse_sample_loop(
        self,
        model: Any,
        x: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """x_T of an image x [N, ...] by `ddim_reverse_sample` from index 0 to the last but one.

        The last timestep has no next one: its step would end at abar = 0.
        """
        device = device_of(model) if device is None else device
        x = x.to(device)
        indices = range(self.diffusion.num_timesteps - 1)
        with torch.no_grad():
            for i in with_bar(indices, progress):
                t = torch.full((x.shape[0],), i, device=device)
                x = self.diffusion.ddim_reverse_sample(
                    model,
                    x,
                    t,
                    clip_denoised=clip_denoised,
                    denoised_fn=denoised_fn,
                    model_kwargs=model_kwargs,
                    eta=eta,
                )["sample"]
        return x

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, noise drawn where it is not given."""
        if (
            x_start.dtype not in (torch.float32, torch.float64)
            or x_start.numel() == 0
            or t.shape != x_start.shape[:1]
            or t.dtype is not torch.int64
            or (noise is not None and (noise.shape, noise.dtype) != (x_start.shape, x_start.dtype))
        ):
            noised: Tensor = self.theirs(self.diffusion, "q_sample", x_start, t, noise=noise)
            return noised
        if noise is None:
            noise = torch.randn_like(x_start)
        abar = self._tables.get(x_start.device)
        if abar is None:
            abar = torch.from_numpy(self.rows.abar).to(x_start.device)
            self._tables[x_start.device] = abar
        result = add_noise(x_start, noise, t, abar, backend=self.backend)
        assert isinstance(result, Tensor)
        return result

    def explain(self) -> str:
        """What is replaced and what is not, and the networks' own reports."""
        lines = [f"replaced               {', '.join(self.replaced)}"]
        lines += [f"not replaced           {name}: {why}" for name, why in self.reasons.items()]
        lines.append("theirs where           denoised_fn is given, or timesteps differ in a batch")
        lines += [f"network                {network.explain()}" for network in self._networks]
        return "\n".join(lines)

    def _bound(self, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by their names, as the replaced method has them."""
        bound = signature(self.diffusion, name).bind(self.diffusion, *args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _fused(self, step: Step, given: dict[str, Any], x: torch.dtype) -> bool:
        """Whether a step with these arguments is one of ours."""
        guided = given.get("cond_fn") is not None
        return (
            given.get("denoised_fn") is None
            and x in (torch.float32, torch.float64)
            and not (guided and f"{step} with cond_fn" in self.reasons)
            and not (step == "ddim_reverse_sample" and given.get("eta", 0) != 0)
        )

    def _single(self, step: Step, args: Any, kwargs: Any) -> dict[str, Tensor]:
        given = self._bound(step, args, kwargs)
        x, t = given["x"], given["t"]
        # elsewhere than on the CPU, reading t would wait for the device
        index = set(t.tolist()) if t.is_cpu and x.is_cpu else set()
        if not self._fused(step, given, x.dtype) or len(index) != 1:
            theirs: dict[str, Tensor] = self.theirs(self.diffusion, step, *args, **kwargs)
            return theirs
        i = index.pop()
        return self._advance(self._begin(step, given, x, [i]), x, i)

    def _last(self, step: Step, args: Any, kwargs: Any) -> Tensor:
        name = f"{step}_loop"
        given = self._bound(name, args, kwargs)
        if not self._fused(step, given, start_dtype(given)):
            theirs: Tensor = self.theirs(self.diffusion, name, *args, **kwargs)
            return theirs
        with torch.no_grad():
            x, indices = self._start(given)
            run = self._begin(step, given, x, indices)
            if run.cond_fn is None and given["noise"] is not None:
                x = x.clone()
            for i in with_bar(indices, given["progress"]):
                if run.cond_fn is None:
                    self._write_over(run, x, i)  # nobody sees what is between
                else:
                    x = self._advance(run, x, i)["sample"]
        return x

    def _progressive(self, step: Step, args: Any, kwargs: Any) -> Iterator[dict[str, Tensor]]:
        name = f"{step}_loop_progressive"
        given = self._bound(name, args, kwargs)
        if not self._fused(step, given, start_dtype(given)):
            yield from self.theirs(self.diffusion, name, *args, **kwargs)
            return
        with torch.no_grad():
            x, indices = self._start(given)
            run = self._begin(step, given, x, indices)
        for i in with_bar(indices, given["progress"]):
            with torch.no_grad():
                results = self._advance(run, x, i)
            yield results
            x = results["sample"]

    def _start(self, given: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """(x_T, the descending indices)."""
        device, shape = given["device"], given["shape"]
        if device is None:
            device = device_of(given["model"])
        assert isinstance(shape, (tuple, list)), f"shape must be a tuple or a list; got {shape!r}"
        x = given["noise"]
        if x is None:
            x = torch.randn(*shape, device=device)
        return x, list(range(self.diffusion.num_timesteps - 1, -1, -1))

    def _begin(self, step: Step, given: dict[str, Any], x: Tensor, indices: list[int]) -> Run:
        model, eta = given["model"], float(given.get("eta", 0.0))
        mapped = hasattr(self.diffusion, "timestep_map") and hasattr(model, "timestep_map")
        # a model that was wrapped by them maps the timesteps itself
        times = list(range(self.diffusion.num_timesteps)) if mapped else self.times
        network = self._network(model)
        integral = [t for t in (times[i] for i in indices) if isinstance(t, int)]
        return Run(
            step=step,
            network=network.ready(integral),
            table=self._table(step, bool(given["clip_denoised"]), eta, x),
            times=torch.tensor(times, device=x.device, dtype=None if integral else torch.float32),
            eta=eta,
            draws=step == "p_sample" or (step == "ddim_sample" and (self.strict or eta != 0)),
            cond_fn=given.get("cond_fn"),
            model_kwargs=given["model_kwargs"] or {},
        )

    def _advance(self, run: Run, x: Tensor, i: int) -> dict[str, Tensor]:
        t = run.times[i : i + 1].repeat(x.shape[0])
        out = run.network(x, t, **run.model_kwargs)
        # in the order in which they call what may draw random numbers
        noise = torch.randn_like(x) if run.draws and run.step == "p_sample" else None
        gradient = None if run.cond_fn is None else run.cond_fn(x, t, **run.model_kwargs)
        if run.draws and noise is None:
            noise = torch.randn_like(x)
        learned = self.rows.learned and run.step == "p_sample"
        results = denoise_step(
            x,
            out,
            run.table,
            i,
            noise=noise,
            learned_variance=learned,
            return_x0=True,
            backend=self.backend,
        )
        sample, x0 = results
        if gradient is not None:
            guide = self.rows.guide(run.step, i, run.eta)
            if guide.sample is None:
                sample = sample + self._variance(out, x, i) * gradient
            else:
                sample = torch.add(sample, gradient, alpha=guide.sample)
                x0 = torch.add(x0, gradient, alpha=guide.x0) if guide.x0 else x0
        return {"sample": sample, "pred_xstart": x0}

    def _write_over(self, run: Run, x: Tensor, i: int) -> None:
        out = run.network(x, run.times[i : i + 1].repeat(x.shape[0]), **run.model_kwargs)
        denoise_step(
            x,
            out,
            run.table,
            i,
            noise=torch.randn_like(x) if run.draws else None,
            learned_variance=self.rows.learned and run.step == "p_sample",
            inplace=True,
            backend=self.backend,
        )

    def _variance(self, out: Tensor, x: Tensor, i: int) -> Tensor:
        start, slope = self.rows.log_variance(i)
        return torch.exp(start + slope * out[:, x.shape[1] :].to(x.dtype))

    def _table(self, step: Step, clip: bool, eta: float, x: Tensor) -> Tensor:
        key = (step, clip, eta, x.device, x.dtype)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = self.rows.table(step, clip, eta).to(x.device, x.dtype)
            while len(self._tables) > _CACHED:
                del self._tables[next(iter(self._tables))]
        return table

    def _network(self, model: Any) -> FastNetwork:
        for network in self._networks:
            if network.model is model:
                return network
        network = FastNetwork(model, self.optimize, self.dtype)
        if isinstance(model, nn.Module):  # a function may be another one at every call
            self._networks = [*self._networks[1 - _CACHED :], network]
        return network

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_networks": []}


def _check(obj: Any) -> None:
    """TypeError for what `accelerate` does not take."""
    if not supports(obj):
        raise TypeError(f"cannot accelerate {class_name(obj)}; supported: {'; '.join(SUPPORTED)}")
    for name, accepted in (("model_mean_type", MEAN_TYPES), ("model_var_type", VAR_TYPES)):
        value = getattr(getattr(obj, name), "name", None)
        if value not in accepted:
            raise TypeError(
                f"cannot accelerate {class_name(obj)}: {name} is {getattr(obj, name)!r}; "
                f"accepted: {', '.join(accepted)}"
            )
