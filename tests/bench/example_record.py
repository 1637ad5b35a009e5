"""Records with invented figures, to draw and to compare: every field is filled somewhere."""

from __future__ import annotations

import random

from stepfuse.bench.record import (
    Candidate,
    ColdStart,
    Energy,
    Machine,
    Record,
    Runs,
    Settings,
    Split,
    Timing,
    Verified,
    Windows,
)

BATCHES = [1, 8, 32]
STEPS = [13, 25]
ROUNDS = 12
# name -> library, dtype, seconds of a loop of 50 steps at batch 1
TIMED = {
    "stepfuse": ("stepfuse", "fp32", 0.30),
    "stepfuse-eager": ("stepfuse", "fp32", 0.62),
    "stepfuse-bf16": ("stepfuse", "bf16", 0.21),
    "diffusers": ("diffusers", "fp32", 0.75),
    "compile": ("compile", "fp32", 0.48),
    "openvino": ("openvino", "fp32", 0.41),
}


def machine() -> Machine:
    """A machine that there is nowhere."""
    return Machine(
        processor="Example CPU <9000> & friends",  # to be escaped in HTML
        device="cpu",
        cores=2,
        logical_cores=4,
        threads=2,
        memory_bytes=16 << 30,
        isa="avx512",
        load=0.2,
        os="Linux 6.1",
        python="3.11.2",
        versions={"stepfuse": "0.1.0", "torch": "2.13.0", "diffusers": "0.35.0"},
        commit="0123456789ab",
        date="2026-01-02T03:04:05+00:00",
    )


def example(faster: float = 1.0, seed: int = 0) -> Record:
    """A record of whole loops; ours takes 1/``faster`` of its usual time."""
    draw = random.Random(seed)

    def around(seconds: float, count: int = ROUNDS) -> list[float]:
        return [seconds * (1 + 0.04 * abs(draw.gauss(0, 1))) for _ in range(count)]

    candidates = []
    for name, (library, dtype, usual) in TIMED.items():
        ours = library == "stepfuse"
        loop = usual / faster if ours else usual
        low = dtype == "bf16"
        candidates.append(
            Candidate(
                name=name,
                library=library,
                ours=ours,
                dtype=dtype,
                how=f"{library}'s network in {library}'s loop",
                verified=Verified(
                    batch=32,
                    max_abs=0.11 if low else 0.0 if name == "stepfuse-eager" else 3e-6,
                    psnr=38.2 if low else None if name == "stepfuse-eager" else 118.0,
                    limit="at least 25 dB" if low else "at most 0.002",
                    passed=True,
                ),
                latency=[Runs(b, 50, around(loop * (0.4 + 0.6 * b))) for b in BATCHES],
                over_steps=[Runs(1, s, around(loop * s / 50)) for s in STEPS],
                throughput=[
                    Windows(b, 50, [b] * ROUNDS, around(loop * (0.4 + 0.6 * b))) for b in BATCHES
                ],
                cold_start=ColdStart(
                    batch=1,
                    import_seconds=around(1.9, 3),
                    build_seconds=around(2.5, 3),
                    first_seconds=around(loop * 1.5, 3),
                    peak_bytes=[610 << 20, 612 << 20, 611 << 20],
                    imported_bytes=[310 << 20, 311 << 20, 311 << 20],
                ),
                energy=Energy("RAPL package-0", 1, around(12.0 * loop, 3))
                if name != "openvino"
                else Energy(reason="/sys/class/powercap has no counter that can be read"),
                split=Split(
                    batch=1,
                    network=around(loop / 50 * 0.93, 3),
                    update=around(loop / 50 * 0.03, 3),
                    rest=around(loop / 50 * 0.04, 3),
                    how="a clock around the network and the update of an eager loop",
                ),
            )
        )
    candidates.append(
        Candidate(
            name="onnxruntime",
            library="onnxruntime",
            ours=False,
            dtype="fp32",
            how="ONNX Runtime's network in a plain loop",
            failure="onnxruntime is not there; pip install onnxruntime",
            failed_at="install",
        )
    )
    candidates.append(
        Candidate(
            name="openvino-bf16",
            library="openvino",
            ours=False,
            dtype="bf16",
            how="OpenVINO's network in a plain loop",
            verified=Verified(32, 1.7, 9.1, "at least 25 dB", False),
            failure="its images are at 9.1 dB of the reference's: not timed",
            failed_at="verify",
        )
    )
    return Record(
        kind="sampler",
        machine=machine(),
        command="stepfuse bench --model digits --against all",
        notes=["An invented record."],
        settings=Settings(
            model="digits",
            parameters=1_900_000,
            shape=[1, 32, 32],
            condition="labels 0, 1, 2 ... taking turns",
            steps=50,
            num_train_timesteps=1000,
            method="ddim",
            spacing="leading",
            eta=0.0,
            prediction_type="epsilon",
            seed=0,
            backend="cpp",
            graph="auto",
            optimize=True,
            dtypes=["fp32", "bf16"],
            batches=BATCHES,
            rounds=ROUNDS,
            time_limit=None,
        ),
        candidates=candidates,
    )


def example_suite() -> Record:
    """A record of operators timed in groups."""
    draw = random.Random(1)
    return Record(
        kind="suite",
        machine=machine(),
        command="make bench",
        suite=[
            Timing(
                suite="kernels",
                group=f"group_norm_silu {shape}",
                name=name,
                reference="copy",
                dtype="float32",
                parameters={"shape": shape, "layout": "channels_last"},
                bytes=1 << 20,
                seconds=[seconds * (1 + 0.1 * abs(draw.gauss(0, 1))) for _ in range(15)],
            )
            for shape in ("1x64x32x32", "8x64x32x32")
            for name, seconds in (("stepfuse", 1.3e-4), ("eager", 4.1e-4), ("copy", 1.0e-4))
        ],
    )


def example_roofline() -> Record:
    """A record of compiled kernels."""
    return Record(
        kind="roofline",
        machine=machine(),
        command="stepfuse bench --static",
        roofline=[
            {
                "variant": variant,
                "arch": arch,
                "card": card,
                "gigabytes_per_second": speed,
                "kernels": [variant],
                "registers": [40],
                "shared_bytes": [2048],
                "spilled": False,
                "vector_bits": 128,
                "bytes_per_element": 12.0,
                "microseconds": 12.0 * (1 << 20) / speed / 1e3,
                "unfused_bytes_per_element": 60.0,
                "unfused_microseconds": 60.0 * (1 << 20) / speed / 1e3,
            }
            for arch, card, speed in ((80, "A100 80GB SXM", 2039), (90, "H100 SXM", 3350))
            for variant in ("denoise_step float32", "group_norm_silu bfloat16")
        ],
    )
