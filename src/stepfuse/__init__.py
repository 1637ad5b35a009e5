"""stepfuse: fused kernels and a captured sampling loop for DDPM, DDIM and their family."""

from stepfuse._version import __version__
from stepfuse.engine.schedule import Schedule
from stepfuse.kernels.backends import BackendUnavailable

__all__ = ["BackendUnavailable", "Schedule", "__version__"]
