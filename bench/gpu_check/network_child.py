"""One child of the network check: ``python -m stepfuse.bench.gpu_check.network_child JOB``.

JOB is JSON: device, dtype (of torch), batches, names of candidates, whether cuDNN tries out its
algorithms ("tuned"), the seconds it has, and the path of the facts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from stepfuse.bench.gpu_check import capped
from stepfuse.bench.gpu_check.check import Context
from stepfuse.bench.gpu_check.network_candidates import Workload
from stepfuse.bench.gpu_check.network_compare import compare
from stepfuse.bench.tf32 import tf32

SECONDS = 4.0  # of timing a batch size


def main(job: dict[str, Any]) -> None:
    """Compare the candidates of the job for each batch size."""
    context = Context(
        torch.device(job["device"]),
        job["limit_s"],
        lambda context: capped.answer(job["path"], context.facts, context.wrong),
    )
    torch.backends.cudnn.benchmark = bool(job["tuned"])
    dtype = getattr(torch, job["dtype"])
    with torch.no_grad(), tf32(False):
        work = Workload.of(context, job["batches"][0], dtype)
        for batch in job["batches"]:
            compare(context, f"batch {batch}", work.of_batch(batch), job["names"], SECONDS)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
