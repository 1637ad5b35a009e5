"""The smallest calls of an op, for a tool that watches this process.

``python -m stepfuse.bench.gpu_check.sanitized OP [--stand-in]`` prints what is wrong, a line each,
and exits with 1 then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from stepfuse.bench.gpu_check.op_cases import Place, smallest

OPS = ("group_norm_silu", "denoise_step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and make the calls."""
    parser = argparse.ArgumentParser(prog="stepfuse.bench.gpu_check.sanitized")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--stand-in", action="store_true", help="on the CPU")
    given = parser.parse_args(arguments)
    device, backend = ("cpu", "auto") if given.stand_in else ("cuda", "triton")
    place = Place(torch.device(device), backend)
    wrong = [
        f"{case.op} {case.name}: {problem}"
        for case in smallest()
        if case.op == given.op
        for problem in case.run(place)
    ]
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
