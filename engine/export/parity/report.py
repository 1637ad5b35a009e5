"""What `check` found, as a table, as Markdown, as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from stepfuse.engine.export.parity.compare import Case, Deviation, LayerDeviation, Tolerance

NAMED_LAYERS = 3  # in a report; the JSON has them all
HEADINGS = ("inputs", "timesteps", "max abs", "relative L2", "1 - cosine", "against float32")


@dataclass(frozen=True)
class Report:
    """How far a candidate is from its reference.

    Attributes:
        candidate: the path, or the kind of model.
        precision: "fp32", "fp16" or "bf16".
        tolerance: what was accepted.
        cases: kind of input, bin of timesteps and batch size, each with its deviations.
        floor: of the reference in float32 from the reference in float64: what rounding does
            without any export.
        psnr: dB of every image after the DDIM run; empty where none was asked for.
        steps: of that run.
        emulated: half precision was computed by rounding every result, see `OnnxProbe`.
        layers: after a failure, by what each layer adds, the most first.
    """

    candidate: str
    precision: str
    tolerance: Tolerance
    cases: tuple[Case, ...]
    floor: Deviation
    psnr: tuple[float, ...]
    steps: int | None
    emulated: bool = False
    layers: tuple[LayerDeviation, ...] = ()

    @property
    def worst(self) -> Deviation:
        """Over all cases, against float64."""
        return Deviation.worst([case.against_float64 for case in self.cases])

    @property
    def failures(self) -> list[str]:
        """Every tolerance that was missed, in words."""
        worst, limits = self.worst, self.tolerance
        missed = []
        if not worst.relative_l2 <= limits.relative_l2:
            missed.append(f"relative L2 {worst.relative_l2:.3g} above {limits.relative_l2:.3g}")
        if not worst.cosine >= limits.cosine:
            missed.append(f"1 - cosine {1 - worst.cosine:.3g} above {1 - limits.cosine:.3g}")
        if self.psnr and not min(self.psnr) >= limits.psnr:
            missed.append(f"images at {min(self.psnr):.1f} dB, below {limits.psnr:g} dB")
        return missed

    @property
    def passed(self) -> bool:
        """Whether no tolerance was missed."""
        return not self.failures

    @property
    def worst_layer(self) -> str | None:
        """The layer that adds most of the error; None where all is well or none could be named."""
        return self.layers[0].name if self.layers else None

    def rows(self) -> list[tuple[str, ...]]:
        """The table: a line for each kind of input and bin, the worst over the batch sizes."""
        lines = []
        for key in dict.fromkeys((case.inputs, case.timesteps) for case in self.cases):
            same = [case for case in self.cases if (case.inputs, case.timesteps) == key]
            exact = Deviation.worst([case.against_float64 for case in same])
            single = Deviation.worst([case.against_float32 for case in same])
            (kind, (first, last)) = key
            lines.append((kind, f"{first}-{last}", *_figures(exact), f"{single.relative_l2:.2e}"))
        return lines

    def summary(self) -> list[str]:
        """The sentences below the table."""
        sizes = ", ".join(str(size) for size in dict.fromkeys(case.batch for case in self.cases))
        worst = self.worst
        lines = [
            f"{self.candidate}, {self.precision}: worst relative L2 {worst.relative_l2:.2e} "
            f"(accepted {self.tolerance.relative_l2:.2e}), max abs {worst.max_abs:.2e}, "
            f"batches of {sizes}",
            f"the reference itself in float32: relative L2 {self.floor.relative_l2:.2e}",
        ]
        if self.psnr:
            lines.append(
                f"{len(self.psnr)} image{'s' if len(self.psnr) > 1 else ''} after {self.steps} "
                "steps of DDIM: "
                f"{min(self.psnr):.1f} dB or better (accepted {self.tolerance.psnr:g} dB)"
            )
        if self.emulated:
            lines.append(f"{self.precision} on the CPU: every result rounded, sums in float32")
        if self.layers:
            named = (
                f"{layer.name} (adds {layer.local:.2e}, {layer.total:.2e} in all)"
                for layer in self.layers[:NAMED_LAYERS]
            )
            lines.append(f"worst layers: {', '.join(named)}")
        verdict = "passed" if self.passed else "failed: " + "; ".join(self.failures)
        return [*lines, verdict]

    def table(self) -> Any:
        """A rich Table, for a terminal."""
        from rich.table import Table

        table = Table(title=f"{self.candidate} against the reference", title_justify="left")
        for n, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if n < 2 else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table and the sentences."""
        lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join([*lines, "", *(f"- {line}" for line in self.summary())]) + "\n"

    def to_json(self) -> str:
        """Everything; infinite numbers are the strings "inf" and "-inf"."""
        values = {**asdict(self), "passed": self.passed, "failures": self.failures}
        return json.dumps(_plain(values), indent=1, allow_nan=False)


def _figures(deviation: Deviation) -> tuple[str, ...]:
    return (
        f"{deviation.max_abs:.2e}",
        f"{deviation.relative_l2:.2e}",
        f"{max(0.0, 1 - deviation.cosine):.1e}",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
