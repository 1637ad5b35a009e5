"""stepfuse: fused kernels and a captured sampling loop for DDPM, DDIM and their family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepfuse._version import __version__

if TYPE_CHECKING:
    from stepfuse.engine import export
    from stepfuse.engine.adapters import accelerate, restore
    from stepfuse.engine.compile.graph import PassContext, PassReport
    from stepfuse.engine.compile.optimize import Optimized, WeightsChanged, optimize
    from stepfuse.engine.compile.pass_order import PASSES
    from stepfuse.engine.compile.weights.released import WeightsReleased
    from stepfuse.engine.export.to_onnx.denoiser import OnnxDenoiser
    from stepfuse.engine.export.to_tensorrt.runtime import TensorRTDenoiser
    from stepfuse.engine.generate.api import generate
    from stepfuse.engine.generate.job import open_job
    from stepfuse.engine.generate.work import run_shard, todo
    from stepfuse.engine.networks.checkpoint import Checkpoint, load, models
    from stepfuse.engine.networks.normalization import Normalization
    from stepfuse.engine.networks.sampling_defaults import SamplingDefaults
    from stepfuse.engine.sampling import inverse
    from stepfuse.engine.sampling.bound.api import bits_per_dim
    from stepfuse.engine.sampling.bound.result import Bound, RateDistortion
    from stepfuse.engine.sampling.guidance.cfg import CFG
    from stepfuse.engine.sampling.guidance.classifier import ClassifierGuidance
    from stepfuse.engine.sampling.guidance.measured import DPS, PiGDM
    from stepfuse.engine.sampling.guidance.protocol import Guidance, Outputs
    from stepfuse.engine.sampling.latents import interpolate, slerp
    from stepfuse.engine.sampling.methods import Method
    from stepfuse.engine.sampling.sampler import Sampler
    from stepfuse.engine.sampling.schedule import Schedule
    from stepfuse.engine.sampling.step import Step
    from stepfuse.engine.sampling.timesteps import spaced_timesteps
    from stepfuse.kernels.backends import BackendUnavailable

__all__ = [
    "CFG",
    "DPS",
    "PASSES",
    "BackendUnavailable",
    "Bound",
    "Checkpoint",
    "ClassifierGuidance",
    "Guidance",
    "Method",
    "Normalization",
    "OnnxDenoiser",
    "Optimized",
    "Outputs",
    "PassContext",
    "PassReport",
    "PiGDM",
    "RateDistortion",
    "Sampler",
    "SamplingDefaults",
    "Schedule",
    "Step",
    "TensorRTDenoiser",
    "WeightsChanged",
    "WeightsReleased",
    "__version__",
    "accelerate",
    "bits_per_dim",
    "export",
    "generate",
    "interpolate",
    "inverse",
    "load",
    "models",
    "open_job",
    "optimize",
    "restore",
    "run_shard",
    "slerp",
    "spaced_timesteps",
    "todo",
]

# Imported at first use, so that `stepfuse --help` does not wait two seconds for torch.
_HOMES = {
    "engine.adapters": ("accelerate", "restore"),
    "engine.generate.api": ("generate",),
    "engine.generate.job": ("open_job",),
    "engine.generate.work": ("run_shard", "todo"),
    "engine.networks.checkpoint": ("Checkpoint", "load", "models"),
    "engine.networks.normalization": ("Normalization",),
    "engine.networks.sampling_defaults": ("SamplingDefaults",),
    "engine.export.to_onnx.denoiser": ("OnnxDenoiser",),
    "engine.export.to_tensorrt.runtime": ("TensorRTDenoiser",),
    "engine.sampling.bound.api": ("bits_per_dim",),
    "engine.sampling.bound.result": ("Bound", "RateDistortion"),
    "engine.sampling.guidance.cfg": ("CFG",),
    "engine.sampling.guidance.classifier": ("ClassifierGuidance",),
    "engine.sampling.guidance.measured": ("DPS", "PiGDM"),
    "engine.sampling.guidance.protocol": ("Guidance", "Outputs"),
    "engine.sampling.methods": ("Method",),
    "engine.sampling.latents": ("interpolate", "slerp"),
    "engine.compile.graph": ("PassContext", "PassReport"),
    "engine.compile.optimize": ("Optimized", "WeightsChanged", "optimize"),
    "engine.compile.pass_order": ("PASSES",),
    "engine.compile.weights.released": ("WeightsReleased",),
    "engine.sampling.sampler": ("Sampler",),
    "engine.sampling.schedule": ("Schedule",),
    "engine.sampling.step": ("Step",),
    "engine.sampling.timesteps": ("spaced_timesteps",),
    "kernels.backends": ("BackendUnavailable",),
}
_PACKAGES = {"export": "engine.export", "inverse": "engine.sampling.inverse"}


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
