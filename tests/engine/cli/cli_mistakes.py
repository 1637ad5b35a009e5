"""Bad command lines, for every command and every option: made from its type, and told one by one.

A line is what follows the options that make a command quick.
"""

from __future__ import annotations

import importlib
import typing
from typing import Any

from tests.engine.cli.cli_case import SIDE
from typer.models import ArgumentInfo

from stepfuse.engine.cli import commands

HUGE = str(10**30)
# made in the folder of each test: see `test_cli_mistakes`
GOOD, DAMAGED, PICTURES, FOLDER = "good.safetensors", "damaged.safetensors", "data.npz", "folder"
KEPT = (GOOD, DAMAGED, PICTURES, FOLDER, "locked")
USUAL = {
    "sample": ("--model", GOOD, "-n", "1", "--steps", "2"),
    "generate": (
        "--model", GOOD, "-n", "4", "--out", "run", "--steps", "2", "--batch-size", "2",
        "--shard-size", "2", "--threads", "1",
    ),
    "export": ("--model", GOOD),
    "train": (PICTURES, "--out", "run", "--steps", "1", "--batch-size", "2"),
    "likelihood": (PICTURES, "--model", GOOD, "-n", "1", "--steps", "2", "--optimize", "off"),
    "restore": (
        "--task", "blur", "--demo", "--images", "1", "--model", GOOD, "--steps", "2",
    ),
    "bench": ("--quick", "--no-cold", "--model", GOOD),
    "doctor": (),
}  # fmt: skip
_PATHS_IN = (DAMAGED, "nothing.safetensors", FOLDER)
_OUT = ("missing/x{}", "/proc/x{}", f"{FOLDER}/../missing/x{{}}")

TOLD: dict[str, dict[str, list[list[str]]]] = {
    "sample": {
        "--model": [[path] for path in _PATHS_IN] + [[""], ["no such name"]],
        "--label": [["8"], ["-1"], [""], ["Circle "]],
        "--steps": [["0"], ["-1"], ["101"], ["abc"], ["1.5"], ["ddim300"], ["60,60"], [""], [HUGE]],
        "--method": [["rk4"], [""], ["DDIM"]],
        "--order": [["4", "--method", "unipc"], ["0", "--method", "dpmpp"], ["2"]],
        "--solver-type": [["bh1", "--method", "dpmpp"], ["heun"], ["", "--method", "unipc"]],
        "--grid": [
            ["karras"], ["odd", "--method", "euler"], ["1,2", "--method", "euler"],
            ["9e9,1", "--method", "euler"], ["1,a", "--method", "heun"],
            ["karras", "--method", "heun", "--steps", "1"], ["", "--method", "heun"],
        ],
        "--eta": [["-0.1"], ["1.1"], ["1", "--method", "ddpm"]],
        "--spacing": [["odd"], [""]],
        "--guidance": [["2", "--label", "none"]],
        "--count": [["0"], ["-1"], [HUGE]],
        "--seed": [[str(2**64)], [HUGE]],
        "--first-index": [["-1"], [HUGE]],
        "--out": [["x.jpg"], [""], ["/"], ["missing/x.png"], ["/proc/x.png"], [f"{FOLDER}/"]],
        "--scale": [["0"], ["9"], ["-1"]],
        "--columns": [["0"], ["-1"]],
        "--batch-size": [["0"], ["-1"]],
        "--backend": [["fpga"], [""]],
        "--optimize": [["fp8"], [""]],
        "--device": [["tpu"], [""], ["meta"]],
        "--threads": [["0"], ["-1"], ["100000"], [HUGE]],
    },
    "generate": {
        "run": [],
        "--model": [[path] for path in _PATHS_IN] + [[""], ["no.module:f"], ["json:nothing"]],
        "--count": [["0"], ["-1"], [HUGE]],
        "--seed": [[str(2**64)], [HUGE]],
        "--steps": [["0"], ["101"], ["abc"], [""]],
        "--method": [["rk4"], [""]],
        "--order": [["4", "--method", "unipc"], ["2"], ["3", "--method", "dpmpp"]],
        "--solver-type": [["bh1", "--method", "dpmpp"], ["heun"]],
        "--grid": [["karras"], ["odd", "--method", "euler"], ["1,2", "--method", "euler"]],
        "--eta": [["-0.1"], ["1.1"]],
        "--spacing": [["odd"], [""]],
        "--guidance": [],
        "--labels": [["some"], [""]],
        "--label": [["8"], [""], ["0", "--labels", "random"]],
        "--per-class": [["0"], ["-1"], ["2", "--labels", "random"]],
        "--conditions": [["nothing.csv"], [FOLDER], [DAMAGED], [""]],
        "--per-row": [["0"], ["2"]],
        "--optimize": [["fp8"], [""]],
        "--batch-size": [["0"], ["-1"], ["3"], [HUGE]],
        "--threads": [["0"], ["100000"]],
        "--out": [[""]],
        "--format": [["zip"], [""]],
        "--image": [["gif"], ["webp", "--format", "npz"]],
        "--quality": [["0"], ["101"], ["50"]],
        "--level": [["10"], ["-1"]],
        "--rounding": [["up"], [""]],
        "--shard-size": [["0"], ["3"], [HUGE]],
        "--features": [["f"], [""], ["no.module:f"]],
        "--workers": [["0"], [HUGE]],
        "--engine": [["spark"], [""]],
        "--address": [["auto"]],
        "--shard": [["2/2"], ["1"], [""], ["-1/2"]],
        "--device": [["tpu"], [""]],
        "--memory": [],
        "--grace": [["-1"]],
        "--price-per-hour": [],
        "--log-json": [],
        "--metrics": [["x.txt"]],
    },
    "export": {
        "--model": [[path] for path in _PATHS_IN] + [[""]],
        "--out": [["x.png"], [""], [FOLDER], *([out.format(".onnx")] for out in _OUT)],
        "--precision": [["int8"], [""]],
        "--batch": [["0"], ["8:4:1"], ["1:2"], ["a"], [""], [f"1:2:{HUGE}"]],
        "--opset": [["1"], ["99"], ["18", "--precision", "fp16"]],
        "--steps": [["0", "--whole-loop"], ["101", "--whole-loop"], ["abc", "--whole-loop"]],
        "--method": [["rk4", "--whole-loop"]],
        "--order": [["2"], ["4", "--whole-loop", "--method", "unipc"], ["2", "--whole-loop"]],
        "--solver-type": [["bh1"], ["bh1", "--whole-loop", "--method", "dpmpp"]],
        "--spacing": [["odd", "--whole-loop"]],
        "--eta": [["2", "--whole-loop"]],
        "--guidance": [["2"], ["inf", "--whole-loop"]],
        "--tensorrt": [["x.engine", "--whole-loop"], ["missing/x.engine"], ["good.onnx"]],
        "--compute-capability": [["sm_89"], ["sm_1", "--tensorrt", "x.engine"]],
        "--timing-cache": [["x.cache"], ["missing/x", "--tensorrt", "x.engine"]],
        "--tolerance": [["0.1"], ["0", "--check"], ["-1", "--check"], ["0.1", "--whole-loop"]],
        "--report": [["x.md"], ["x.txt", "--check"], ["missing/x.md", "--check"]],
        "--seed": [[str(2**64), "--check"], [HUGE, "--check"]],
    },
    "train": {
        "data": [],
        "--out": [["/proc/x"], [PICTURES], ["locked"]],
        "--background": [["red"], [""]],
        "--network": [["vgg"], [""]],
        "--objective": [["vdm"], [""], ["keras", "--prediction", "v_prediction"]],
        "--prediction": [["sample"], [""]],
        "--steps": [["0"], ["-1"], [HUGE]],
        "--batch-size": [["0"], ["-1"], [HUGE]],
        "--learning-rate": [["0"], ["-1"]],
        "--warmup-steps": [["-1"]],
        "--decay": [["fast"], [""]],
        "--label-dropout": [["-0.1"], ["1.1"]],
        "--ema-decay": [["-0.1"], ["1"]],
        "--save-every": [["0"], ["-1"]],
        "--sample-every": [["-1"]],
        "--seed": [[str(2**64)], [HUGE]],
        "--device": [["tpu"], [""]],
    },
    "likelihood": {
        "data": [],
        "--model": [[path] for path in _PATHS_IN] + [[""], ["no such name"]],
        "--count": [["0"], ["-1"]],
        "--steps": [["0"], ["1"], ["101"], ["abc"], [""], ["ddim300"], [HUGE]],
        "--spacing": [["odd"], [""]],
        "--variance": [["large"], [""], ["learned_range"], ["learned"]],
        "--cdf": [["erf"], [""]],
        "--labels": [["all"], [""]],
        "--seed": [[str(2**64)], [HUGE]],
        "--background": [["red"], [""]],
        "--out": [["x.jpg"], [""], ["/"], [".png"], *([out.format(".png")] for out in _OUT)],
        "--batch-size": [["0"], ["-1"]],
        "--optimize": [["fp8"], [""]],
        "--backend": [["fpga"], [""]],
        "--device": [["tpu"], [""], ["meta"]],
        "--threads": [["0"], ["-1"], ["100000"], [HUGE]],
    },
    "restore": {
        "picture": [],
        "--task": [["deblur"], [""]],
        "--images": [["0"], ["-1"]],
        "--mask": [["nothing.png", "--task", "inpaint"], [DAMAGED, "--task", "inpaint"], ["x"]],
        "--pad": [["0", "--task", "outpaint"], ["4", "--task", "outpaint"], ["2"]],
        "--factor": [["0", "--task", "sr"], ["3", "--task", "sr"], ["2"]],
        "--sigma": [["0"], ["-1"], ["2", "--task", "sr"]],
        "--angles": [["0", "--task", "tomography"], ["361", "--task", "tomography"], ["3"]],
        "--noise": [["-0.1"]],
        "--model": [[path] for path in _PATHS_IN] + [[""], ["no such name"]],
        "--method": [["ddrm"], [""]],
        "--weight": [["half"], ["paper", "--method", "dps"]],
        "--data-std": [["0"], ["-1"], ["1", "--method", "dps"]],
        "--scale": [["-1", "--method", "dps"], ["1"]],
        "--steps": [["0"], ["101"], ["abc"], [""], [HUGE]],
        "--eta": [["-0.1"], ["1.1"]],
        "--label": [["8"], ["-1"], [""], ["Circle "]],
        "--guidance": [["2"]],
        "--count": [["0"], ["-1"], [HUGE]],
        "--seed": [[str(2**64)], [HUGE]],
        "--out": [["x.jpg"], [""], ["/"], [".png"], *([out.format(".png")] for out in _OUT)],
        "--std": [["x.png"], ["x.npz", "-n", "2"], ["restored.png", "-n", "2"]],
        "--batch-size": [["0"], ["-1"]],
        "--backend": [["fpga"], [""]],
        "--device": [["tpu"], [""], ["meta"]],
        "--threads": [["0"], ["-1"], ["100000"], [HUGE]],
    },
    "bench": {
        "--model": [[path] for path in _PATHS_IN] + [[""]],
        "--steps": [["0"], ["-1"], ["101"], [HUGE]],
        "--method": [["rk4"]],
        "--eta": [["2"], ["-1"]],
        "--spacing": [["odd"]],
        "--batch": [["0"], ["a"], [""], ["1,1"], [HUGE]],
        "--dtype": [["fp8"], ["bf16", "--no-optimize"]],
        "--backend": [["fpga"]],
        "--graph": [["always"]],
        "--seed": [[str(2**64)], [HUGE]],
        "--device": [["tpu"]],
        "--threads": [["0"], ["100000"]],
        "--against": [["keras"]],
        "--rounds": [["0"], ["-1"]],
        "--busy": [["-1"], ["257"]],
        "--time-limit": [["-1"]],
        "--out": [["missing/deep/x"], ["/proc/x"], [PICTURES]],
        "--json": [["missing/deep/x"], ["/proc/x"], [FOLDER], ["x", "--html", "x"]],
        "--markdown": [["missing/deep/x"], ["/proc/x"]],
        "--html": [["missing/deep/x"], ["/proc/x"]],
        "--compare": [
            ["nothing.json", "nothing.json"], [FOLDER, FOLDER], [DAMAGED, DAMAGED],
            ["a.json", "b.json", "--static"], ["a.json"],
        ],
    },
    "doctor": {},
}  # fmt: skip
# lines that are wrong as a whole
WHOLE = {
    "restore": [
        [],
        ["--demo"],
        ["--task", "inpaint", "--model", GOOD],
        ["nothing.png", "--task", "blur", "--model", GOOD],
        [FOLDER, "--task", "blur", "--model", GOOD],
        [DAMAGED, "--task", "sr", "--model", GOOD],
        [DAMAGED, "--task", "inpaint", "--model", GOOD],
        [DAMAGED, "--task", "blur", "--images", "2", "--demo", "--model", GOOD],
    ],
    "likelihood": [["nothing.npz"], [FOLDER], [DAMAGED], [], ["locked"]],
    "train": [
        ["nothing.npz", "--out", "run"],
        [FOLDER, "--out", "run"],
        [DAMAGED, "--out", "run"],
        [PICTURES],
        ["--out", "run"],
        [PICTURES, "--out", "run", "--resume"],
    ],
}


def function_of(name: str) -> Any:
    """What runs a command."""
    if name not in commands.DEFERRED:
        return {"sample": commands.sample, "doctor": commands.doctor}[name]
    module, function, _ = commands.DEFERRED[name]
    return getattr(importlib.import_module(module), function)


def options_of(name: str) -> dict[str, set[Any]]:
    """Its options by their long names, and its arguments, with the types they may have."""
    found = {}
    for parameter, annotation in typing.get_type_hints(
        function_of(name), include_extras=True
    ).items():
        if parameter in ("return", "context"):
            continue
        kind, info = typing.get_args(annotation)
        words = [word for word in info.param_decls or () if word.startswith("--")]
        long = f"--{parameter.replace('_', '-')}"
        if isinstance(info, ArgumentInfo):
            long = parameter
        elif words:
            long = words[0].partition("/")[0]
        found[long] = {*typing.get_args(kind)} or {kind}
    return found


def is_flag(kinds: set[Any]) -> bool:
    """Whether it takes no value."""
    return bool in kinds


def lines(name: str) -> list[list[str]]:
    """Every bad line of a command, made and told."""
    found = [[*USUAL[name], "--nonsense"], [*USUAL[name], "-?"], [*USUAL[name], "a", "stray", "b"]]
    for option, kinds in options_of(name).items():
        if not option.startswith("-"):
            continue
        made = [[f"{option}=1"]] if is_flag(kinds) else [[option]]
        made += [[option, value] for value in _of_type(kinds)]
        made += [[option, *words] for words in TOLD[name].get(option, ())]
        found += [[*USUAL[name], *words] for words in made]
    return found + [list(words) for words in WHOLE.get(name, ())]


def _of_type(kinds: set[Any]) -> list[str]:
    if int in kinds:
        return ["many", "1.5", "", "nan", "1e3"]
    return ["many", "", "nan", "inf"] if float in kinds else []


def pictures() -> dict[str, Any]:
    """What `PICTURES` holds."""
    import numpy as np

    return {"images": np.zeros((4, SIDE, SIDE), dtype=np.uint8), "labels": np.arange(4) % 2}
