"""What `bench_unet` evaluates, and the table of what each candidate holds."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

import stepfuse as sf
from stepfuse.bench import unet_candidates, unet_memory

# float32 sums in another order, through thirty layers
REORDERED = 1e-5


@torch.no_grad()
def test_digits_is_the_embedded_checkpoint_with_every_class_in_turn() -> None:
    model, shape = unet_candidates.network("digits", None, 12)
    x, t = unet_candidates.inputs(shape)
    checkpoint = sf.load("digits")
    assert shape == (12, *checkpoint.sample_shape)
    expected = checkpoint.model(x, t, labels=torch.tensor([*range(10), 0, 1]))
    assert (model(x, t) - expected).norm() < REORDERED * expected.norm()


def test_a_configuration_gives_the_shape() -> None:
    config = {
        "sample_size": [8, 6],
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": [8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
    }
    model, shape = unet_candidates.network("cifar10", config, 3)
    assert shape == (3, 2, 8, 6)
    x, t = unet_candidates.inputs(shape)
    assert model(x, t).shape == shape
    released = unet_candidates.maker("stepfuse-fp32-released", model, x, t)()
    with pytest.raises(sf.WeightsReleased):
        model(x, t)
    assert released(x, t).shape == shape


def test_the_table_compares_peaks_with_eager() -> None:
    row = {"imported": 100, "loaded": 200, "built": 200, "running": 300, "peak": 400}
    found = {"eager": row, "ours": row | {"peak": 500}}
    found = {name: {k: v << 20 for k, v in row.items()} for name, row in found.items()}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(unet_memory.table(found, 4))
    text = captured.get()
    assert "batch 4" in text
    assert [cell.strip() for cell in text.splitlines()[-2].strip(" │").split("│")] == [
        "ours", "200", "300", "500", "1.25", "200",
    ]  # fmt: skip
