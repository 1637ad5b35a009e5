"""stepfuse: fused kernels and a captured sampling loop for DDPM, DDIM and their family."""

from stepfuse._version import __version__
from stepfuse.engine.checkpoint import Checkpoint, load
from stepfuse.engine.guidance import CFG, ClassifierGuidance
from stepfuse.engine.latents import interpolate, slerp
from stepfuse.engine.sampler import Sampler, Step
from stepfuse.engine.schedule import Schedule
from stepfuse.engine.timesteps import spaced_timesteps
from stepfuse.kernels.backends import BackendUnavailable

__all__ = [
    "CFG",
    "BackendUnavailable",
    "Checkpoint",
    "ClassifierGuidance",
    "Sampler",
    "Schedule",
    "Step",
    "__version__",
    "interpolate",
    "load",
    "slerp",
    "spaced_timesteps",
]
