"""group_norm_silu in Triton: `run` and `backward`, with the contract of the reference.

group_norm_silu_plan      how a shape is cut into tiles, in plain Python
group_norm_silu_tile      device functions: addresses, statistics, modulation
group_norm_silu_forward   one pass, or statistics and a second pass
group_norm_silu_backward  the gradients
"""

from stepfuse.kernels.triton.group_norm_silu_backward import backward
from stepfuse.kernels.triton.group_norm_silu_forward import run

__all__ = ["backward", "run"]
