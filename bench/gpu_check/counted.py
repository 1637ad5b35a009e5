"""The program whose kernels are counted: ``ncu ... python -m stepfuse.bench.gpu_check.counted``.

Every case is launched once outside the profiled range, where it is compiled, and once inside.
"""

from __future__ import annotations

import torch

from stepfuse.bench.gpu_check.kernel_cases import IMAGES, LATENTS, KernelCase, group_norm, stepping

KERNELS = ("_apply", "_statistics", "_kernel")  # of these cases, by their names in Triton


def cases(device: torch.device) -> list[tuple[KernelCase, tuple[str, ...]]]:
    """Each with the kernels that it launches: a norm in two passes, one in one pass, an update."""
    return [
        (group_norm(device, IMAGES[0], "fp16", "NHWC"), ("_statistics", "_apply")),
        (group_norm(device, IMAGES[2], "fp16", "NHWC"), ("_apply",)),
        (stepping(device, LATENTS["large"], "fp16", "ddim"), ("_kernel",)),
    ]


def main() -> None:
    """Launch them."""
    device = torch.device("cuda")
    runtime = torch.cuda.cudart()
    with torch.no_grad():
        made = [(case, case.make()) for case, _ in cases(device)]
        for case, inputs in made:
            case.ours(inputs)
        torch.cuda.synchronize()
        runtime.cudaProfilerStart()
        for case, inputs in made:
            case.ours(inputs)
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()


if __name__ == "__main__":
    main()
