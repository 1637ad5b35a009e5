"""What a run of `stepfuse bench` leaves behind: one JSON file that holds every sample.

    record = load("stepfuse-bench/record.json")
    for c in record.candidates:
        for runs in c.latency:
            print(c.name, runs.batch, statistics.median(runs.seconds))

A `Record` has one of three kinds. "sampler": whole sampling loops, in ``settings`` and
``candidates``. "suite": operators or networks timed in groups, in ``suite``. "roofline": what
compiled kernels need and what memory bandwidth allows, nothing timed, in ``roofline``. The parts
that do not belong to a kind are None or empty; `make bench` puts ``suite`` and ``roofline`` beside
the loops of a "sampler" too, for one file and one report.

Units: seconds, bytes, joules. Nothing is averaged before it is written: medians and percentiles
are taken from the samples by whoever reads them (`stepfuse.bench.samples`).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stepfuse.bench.json_dataclass import decode
from stepfuse.engine.files.reading import read_text
from stepfuse.engine.files.writing import write_file

SCHEMA = "stepfuse-bench-1"

Kind = Literal["sampler", "suite", "roofline"]


@dataclass
class Machine:
    """What the figures were taken on.

    Attributes:
        processor: model name of the CPU.
        device: what ran the network: "cpu", or the name of the GPU.
        cores: physical cores; None where they cannot be counted.
        logical_cores: logical cores this process may use.
        threads: threads of torch and of ours; the peers are built with as many.
        memory_bytes: of the machine; None where it cannot be read.
        isa: the instruction set of our C++ module, or why there is none.
        load: runnable processes (1 minute) when the run began: far above 0 is a busy machine. None
            where the system does not say.
        os: system and release.
        python: version.
        versions: package -> version: stepfuse, torch, and those of triton and the peers that are
            installed.
        commit: of the source tree, with "+" where files were changed; None for an installed wheel.
        date: when the run began, UTC, ISO 8601.
    """

    processor: str
    device: str
    cores: int | None
    logical_cores: int
    threads: int
    memory_bytes: int | None
    isa: str
    load: float | None
    os: str
    python: str
    versions: dict[str, str]
    commit: str | None
    date: str


@dataclass
class Settings:
    """What every candidate was asked to do.

    Attributes:
        model: name of an embedded checkpoint, file, or "ddpm-cifar".
        parameters: weights of the network.
        shape: C, H, W of an image.
        condition: what the network is told besides x and t, in words; "" for nothing.
        steps: of the loop, as the first batch's latency was taken.
        num_train_timesteps: T of the schedule.
        method, spacing, eta: of the sampler, as `stepfuse.Sampler` takes them.
        prediction_type: of the network.
        seed: of x_T, and of the noise where eta > 0.
        backend: of our update: the one that was chosen, not "auto".
        graph: "auto", "step", "loop" or "none".
        optimize: whether our candidates run the optimised network.
        dtypes: precisions that were asked for, "fp32" and "bf16".
        batches: batch sizes, the first is that of time over steps, cold start and time split.
        rounds: most samples of each figure; fewer where the time limit came first.
        time_limit: seconds that the rounds may take; None for no limit.
    """

    model: str
    parameters: int
    shape: list[int]
    condition: str
    steps: int
    num_train_timesteps: int
    method: str
    spacing: str
    eta: float
    prediction_type: str
    seed: int
    backend: str
    graph: str
    optimize: bool
    dtypes: list[str]
    batches: list[int]
    rounds: int
    time_limit: float | None


@dataclass
class Runs:
    """The whole loop, timed again and again: latency.

    Candidates take turns: sample i of one candidate and sample i of another, at the same batch and
    steps, were taken one after the other, so that ratios are taken pair by pair. After Ctrl-C the
    last round may be missing in some candidates.

    Attributes:
        batch: images of a run.
        steps: network evaluations of a run.
        seconds: one for each run. By ``batch`` it is the time of an image, by ``steps`` of a step.
    """

    batch: int
    steps: int
    seconds: list[float]


@dataclass
class Windows:
    """Loops one right after the other, for a while: throughput.

    Attributes:
        batch: images of a loop.
        steps: network evaluations of a loop.
        images: how many images each window made.
        seconds: how long each window took. Images per second is ``images[i] / seconds[i]``.
    """

    batch: int
    steps: int
    images: list[int]
    seconds: list[float]


@dataclass
class Verified:
    """The images of a candidate against those of the eager float32 loop, from the same x_T.

    Attributes:
        batch: images that were compared.
        max_abs: largest difference of a pixel, images in [-1, 1].
        psnr: in dB, for a range of 2; None where the images are equal to the last bit.
        limit: what was asked of it, in words.
        passed: whether it was met. Where it was not, nothing was timed.
    """

    batch: int
    max_abs: float
    psnr: float | None
    limit: str
    passed: bool

    def worse_than(self, other: Verified) -> bool:
        """Whether it failed where the other did not, or else is farther from the reference."""
        if self.passed != other.passed:
            return other.passed
        return (self.psnr or math.inf) < (other.psnr or math.inf)


@dataclass
class ColdStart:
    """From an interpreter that has just started to the first images, in a process of its own.

    Attributes:
        batch: images that were made.
        import_seconds: importing what the candidate needs, torch included; one per process.
        build_seconds: loading weights, converting, compiling.
        first_seconds: the first loop; includes whatever the candidate puts off until then.
        peak_bytes: most memory that the process held up to then, everything included.
        imported_bytes: memory it held after the imports, to be subtracted where only the model
            and its work are of interest.
    """

    batch: int
    import_seconds: list[float]
    build_seconds: list[float]
    first_seconds: list[float]
    peak_bytes: list[int]
    imported_bytes: list[int]


@dataclass
class Energy:
    """Energy of a window of loops, the idle machine included.

    Attributes:
        source: the counter, "RAPL package-0" or "NVML GPU 0"; "" where there is none.
        batch: images of a loop.
        joules_per_image: one for each window.
        reason: why nothing was measured; "" where something was.
    """

    source: str = ""
    batch: int = 0
    joules_per_image: list[float] = field(default_factory=list)
    reason: str = ""


@dataclass
class Split:
    """Where the time of a step goes, taken in runs of their own with a clock around the calls.

    Sample i of the three lists belongs to one run; their sum is the time of that run by its steps.

    Attributes:
        batch: images of the run.
        network: seconds of a step inside the network.
        update: seconds of a step inside the sampler's update.
        rest: seconds of a step in everything else: the loop, copies, noise.
        how: what was run and where the clock stood, in words.
    """

    batch: int
    network: list[float]
    update: list[float]
    rest: list[float]
    how: str


@dataclass
class Candidate:
    """One way to make the images.

    Attributes:
        name: unique in a record: "stepfuse", "stepfuse-bf16", "diffusers", "openvino-bf16"...
        library: "stepfuse", "diffusers", "compile", "onnxruntime", "openvino".
        ours: whether it is stepfuse's.
        dtype: "fp32" or "bf16": precision of the network's products.
        how: which network runs in which loop, in words.
        verified: None where it was never run.
        latency: the whole loop, one entry a batch size, with the settings' number of steps.
        over_steps: the whole loop with other numbers of steps, at the first batch size.
        throughput: one entry a batch size.
        cold_start: None where it was not measured.
        energy: None where it was not tried; `Energy.reason` says why there is no figure.
        split: None where it was not measured.
        failure: why it was left out, and what to do; "" for a candidate that was timed.
        failed_at: what it was doing: "install", "build", "verify", "measure"; "" for none.
    """

    name: str
    library: str
    ours: bool
    dtype: str
    how: str
    verified: Verified | None = None
    latency: list[Runs] = field(default_factory=list)
    over_steps: list[Runs] = field(default_factory=list)
    throughput: list[Windows] = field(default_factory=list)
    cold_start: ColdStart | None = None
    energy: Energy | None = None
    split: Split | None = None
    failure: str = ""
    failed_at: str = ""

    def runs(self, batch: int) -> Runs | None:
        """Its latency at a batch size."""
        return next((runs for runs in self.latency if runs.batch == batch), None)


@dataclass
class Timing:
    """One operator or network in a group of a suite.

    Attributes:
        suite: "kernels", "unet", "sampler", "adapters".
        group: what is compared: candidates of one group do the same work.
        name: the candidate.
        reference: name of the candidate of the group that ratios are taken to.
        dtype: of the tensors.
        parameters: shape, layout and the like, in words.
        bytes: that must move at least; None where that tells nothing.
        seconds: one sample a block or call.
    """

    suite: str
    group: str
    name: str
    reference: str
    dtype: str
    parameters: dict[str, str]
    bytes: int | None
    seconds: list[float]


@dataclass
class Record:
    """Everything of one run.

    Attributes:
        kind: "sampler", "suite" or "roofline".
        machine: what it ran on.
        command: as it was typed.
        complete: False where Ctrl-C or an error ended it; what was measured until then is here.
        notes: what a reader must know, in sentences: a busy machine, a figure that was left out.
        settings: of kind "sampler".
        candidates: of kind "sampler", in the order in which they took turns.
        suite: of kind "suite".
        roofline: of kind "roofline": the fields of `stepfuse.bench.roofline.Row`, one dict a row.
        schema: version of this layout.
    """

    kind: Kind
    machine: Machine
    command: str = ""
    complete: bool = True
    notes: list[str] = field(default_factory=list)
    settings: Settings | None = None
    candidates: list[Candidate] = field(default_factory=list)
    suite: list[Timing] = field(default_factory=list)
    roofline: list[dict[str, Any]] = field(default_factory=list)
    schema: str = SCHEMA

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name. Raises KeyError, naming those that are there."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        names = ", ".join(c.name for c in self.candidates) or "none"
        raise KeyError(f"no candidate {name!r}; there are: {names}")

    def check(self) -> None:
        """Raise ValueError for a record that contradicts itself."""
        names = [c.name for c in self.candidates]
        _require(len(set(names)) == len(names), f"candidates have names of their own: {names}")
        _require(
            (self.settings is not None) == (self.kind == "sampler"),
            f"settings belong to kind 'sampler', and to no other; kind is {self.kind!r}",
        )
        for c in self.candidates:
            timed = [r for r in (*c.latency, *c.over_steps, *c.throughput) if r.seconds]
            for runs in timed:
                _require(
                    min(runs.seconds) > 0 and runs.batch > 0 and runs.steps > 0,
                    f"{c.name}: seconds, batch and steps must be above 0",
                )
            for w in c.throughput:
                _require(len(w.images) == len(w.seconds), f"{c.name}: images and seconds differ")
            passed = c.verified is not None and c.verified.passed
            _require(not timed or passed, f"{c.name} was timed, but its images were not verified")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all. OSError names ``path``."""
        self.check()
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        write_file(path, f"{text}\n".encode())


def load(path: str | os.PathLike[str]) -> Record:
    """Read a record and check every field.

    Raises ValueError, with the path and the field, for a file that is no record or has another
    schema; OSError where it cannot be read.
    """
    text = read_text(path, "a record of stepfuse bench")
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or "schema" not in data:
            raise ValueError("it has no field 'schema'")
        if data["schema"] != SCHEMA:
            raise ValueError(f"its schema is {data['schema']!r}; accepted: {SCHEMA!r}")
        record = decode(Record, data, "record")
        record.check()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no record of stepfuse bench: {error}") from None
    return record


def _require(held: bool, rule: str) -> None:
    if not held:
        raise ValueError(rule)
