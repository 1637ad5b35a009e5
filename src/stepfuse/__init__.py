"""stepfuse: fused kernels and a captured sampling loop for DDPM, DDIM and their family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepfuse._version import __version__

if TYPE_CHECKING:
    from stepfuse.engine import export
    from stepfuse.engine.adapters import accelerate, restore
    from stepfuse.engine.checkpoint import Checkpoint, load
    from stepfuse.engine.export.onnx_denoiser import OnnxDenoiser
    from stepfuse.engine.export.tensorrt_runtime import TensorRTDenoiser
    from stepfuse.engine.guidance import CFG, ClassifierGuidance
    from stepfuse.engine.latents import interpolate, slerp
    from stepfuse.engine.optimize import Optimized, WeightsChanged, optimize
    from stepfuse.engine.passes.released import WeightsReleased
    from stepfuse.engine.sampler import Sampler
    from stepfuse.engine.schedule import Schedule
    from stepfuse.engine.step import Step
    from stepfuse.engine.timesteps import spaced_timesteps
    from stepfuse.kernels.backends import BackendUnavailable

__all__ = [
    "CFG",
    "BackendUnavailable",
    "Checkpoint",
    "ClassifierGuidance",
    "OnnxDenoiser",
    "Optimized",
    "Sampler",
    "Schedule",
    "Step",
    "TensorRTDenoiser",
    "WeightsChanged",
    "WeightsReleased",
    "__version__",
    "accelerate",
    "export",
    "interpolate",
    "load",
    "optimize",
    "restore",
    "slerp",
    "spaced_timesteps",
]

# Imported at first use, so that `stepfuse --help` does not wait two seconds for torch.
_HOMES = {
    "engine.adapters": ("accelerate", "restore"),
    "engine.checkpoint": ("Checkpoint", "load"),
    "engine.export.onnx_denoiser": ("OnnxDenoiser",),
    "engine.export.tensorrt_runtime": ("TensorRTDenoiser",),
    "engine.guidance": ("CFG", "ClassifierGuidance"),
    "engine.latents": ("interpolate", "slerp"),
    "engine.optimize": ("Optimized", "WeightsChanged", "optimize"),
    "engine.passes.released": ("WeightsReleased",),
    "engine.sampler": ("Sampler",),
    "engine.schedule": ("Schedule",),
    "engine.step": ("Step",),
    "engine.timesteps": ("spaced_timesteps",),
    "kernels.backends": ("BackendUnavailable",),
}
_PACKAGES = {"export": "engine.export"}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"stepfuse.{_PACKAGES[name]}")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"stepfuse.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'stepfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
