"""Suite: one evaluation of an optimised network beside the same network in eager float32.

python -m pytest bench/suite_unet.py --benchmark-only [-k digits]
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepfuse.bench.suite import Timed
from stepfuse.bench.unet_candidates import PRECISIONS, TIMESTEP, TOLERANCE
from stepfuse.engine.compile.optimize import optimize

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_unet(timed: Timed, network: Any, batch: int, dtype: str) -> None:
    x = torch.randn(network.shape(batch), generator=torch.Generator().manual_seed(batch))
    t, condition = torch.full((batch,), TIMESTEP), network.condition(batch)
    made: list[Any] = []

    def fast() -> Any:
        return made[0](x, t, **condition)

    def verify() -> dict[str, float]:
        inputs = (x, t, condition)
        made.append(
            optimize(network.model, inputs, PRECISIONS[DTYPES[dtype]], timesteps=[TIMESTEP])
        )
        exact = network.model(x, t, **condition).double()
        error = float((fast().double() - exact).norm() / exact.norm())
        assert error <= TOLERANCE[DTYPES[dtype]], f"relative error {error:.2g}: not timed"
        return {"relative_error": error}

    timed(
        fast,
        beside=lambda: network.model(x, t, **condition),
        reference="eager float32",
        dtype=dtype,
        group=f"unet {network.name} batch {batch}",
        verify=verify,
    )
