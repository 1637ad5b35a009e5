"""Whoever computes images: a loaded network and its samplers, for one job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepfuse.engine.compile.timings import Timings
from stepfuse.engine.files.images import to_uint8
from stepfuse.engine.generate.conditions.batches import Batch, batches
from stepfuse.engine.generate.conditions.row import Row
from stepfuse.engine.generate.made import Made
from stepfuse.engine.generate.settings import Settings
from stepfuse.engine.generate.source import Source
from stepfuse.engine.sampling.sampler import Sampler

_SAMPLERS = 4  # of different guidance, that keep what they have captured


class Worker:
    """A network, ready to make any images of a job.

    Every batch has the job's number of images, so that there is one captured step, one compiled
    network and one set of bits. Threads of PyTorch are as many as the job says while it samples.

    Args:
        settings: of the job, with its batch size and threads.
        source: of the network, which is loaded here.
        device: where it runs.
        timings: decide how the network is compiled; None lets it be measured.
    """

    def __init__(
        self, settings: Settings, source: Source, device: torch.device, timings: Timings | None
    ) -> None:
        self.settings, self.source, self.device, self.timings = settings, source, device, timings
        model = source.load()
        self._model = model.to(device) if hasattr(model, "to") else model
        self._samplers: dict[float, Sampler] = {}

    def images(self, rows: Sequence[Row], first: int, count: int) -> Iterator[list[Made]]:
        """Images first .. first + count - 1 in lists, in the order of their numbers.

        ``rows`` are their conditions, and those of the images that follow as far as they are known:
        they fill the last batch.

        Raises ValueError for samples that are no numbers, and what the network raises.
        """
        waiting: dict[int, Made] = {}
        wanted = first
        size = self.settings.batch_size or 1
        for batch in batches(rows[:count], first, size):
            for made in self.batch(batch, rows, first):
                waiting[made.n] = made
            ready = []
            while wanted in waiting:  # guidance may have changed the order
                ready.append(waiting.pop(wanted))
                wanted += 1
            if ready:
                yield ready

    def batch(self, batch: Batch, rows: Sequence[Row], first: int) -> Iterator[Made]:
        """The images of one batch that are kept; ``rows`` begin with that of image ``first``."""
        own = [rows[n - first] for n in batch.numbers]
        x = self.sample(batch.numbers, own, batch.guidance)
        with _naming(batch.numbers[: batch.keep]):
            pixels = self._pixels(x[: batch.keep])
        for n, row, picture in zip(batch.numbers, own, pixels, strict=False):
            yield Made(n, picture, self._label(row), self._extra(row))

    def sample(
        self, numbers: Sequence[int], rows: Sequence[Row], guidance: float | None = None
    ) -> torch.Tensor:
        """Samples [N, C, H, W] of these images; bits depend on how many there are."""
        sampler = self.sampler(guidance)
        seed: Any = self.settings.seed
        if any(row.seed is not None for row in rows):
            seeds = [_signed(seed if row.seed is None else row.seed) for row in rows]
            seed = torch.tensor(seeds, dtype=torch.int64)
        condition = None
        if self.source.num_classes is not None:
            condition = {"labels": torch.tensor([row.label for row in rows])}
        with self._pinned():
            return sampler.sample(
                (len(numbers), *self.source.sample_shape),
                seed=seed,
                first_index=torch.tensor(list(numbers), dtype=torch.int64),
                condition=condition,
            )

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        """What the last bits depend on is the job's inside, and the process's again outside."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads or before)
        try:
            with torch.backends.cudnn.flags(benchmark=False, deterministic=True), self._asking():
                yield
        finally:
            torch.set_num_threads(before)

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        if self.timings is None:
            return contextlib.nullcontext()
        # a network that compiles itself, though nobody has asked the job for it, measures
        compiled = self.settings.recipe.optimize != "off"
        return self.timings.replaying("error" if compiled else "measure")

    def sampler(self, guidance: float | None) -> Sampler:
        scale = self.settings.recipe.guidance if guidance is None else guidance
        if scale not in self._samplers:
            while len(self._samplers) >= _SAMPLERS:
                del self._samplers[next(iter(self._samplers))]
            with self._pinned():
                self._samplers[scale] = self.settings.recipe.sampler(
                    self._model, self.source, guidance=scale
                )
        return self._samplers[scale]

    def _pixels(self, x: torch.Tensor) -> NDArray[Any]:
        if self.settings.format == "npy":
            if bool(x.isnan().any()):
                raise ValueError(f"{int(x.isnan().sum())} of {x.numel()} values are NaN")
            if self.source.normalization is not None:
                x = 2 * self.source.decode(x) - 1
            return np.ascontiguousarray(x.float().cpu().numpy())
        pixels = to_uint8(self.source.decode(x), self.settings.rounding, low=0)
        return np.ascontiguousarray(pixels.movedim(1, -1).cpu().numpy())

    def _label(self, row: Row) -> int | None:
        classes = self.source.num_classes
        if classes is None or row.label is None:
            return None
        return -1 if row.label == classes else row.label

    def _extra(self, row: Row) -> dict[str, Any]:
        extra = dict(row.extra)
        label = self._label(row)
        if label is not None and label >= 0 and self.source.labels[label] != str(label):
            extra["label_name"] = self.source.labels[label]
        if row.seed is not None:
            extra["seed"] = row.seed
        if row.guidance is not None:
            extra["guidance"] = row.guidance
        return extra


@contextlib.contextmanager
def _naming(numbers: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"images {numbers[0]} .. {max(numbers)}: {error}") from error


def _signed(seed: int) -> int:
    """The int64 with the bits of a seed of up to 64 bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
