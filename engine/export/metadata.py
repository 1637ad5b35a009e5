"""What an exported file says of itself: enough to sample from it without the checkpoint.

It stands in the ``metadata_props`` of the ONNX file, strings under keys that start with
"stepfuse.": numbers and lists as JSON, betas as base64 of little-endian float64, so that the
schedule comes back bit for bit.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stepfuse._version import __version__
from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.libraries import library
from stepfuse.engine.files.reading import NOT_THERE, check_regular, kind_of, reason
from stepfuse.engine.networks.normalization import Normalization
from stepfuse.engine.sampling.schedule import Schedule
from stepfuse.kernels.arguments import check_mapping, check_path

FORMAT_VERSION = 1
PREFIX = "stepfuse."

Kind = Literal["denoiser", "sampler"]


@dataclass(frozen=True)
class Metadata:
    """What is known of an exported network; None or empty where nothing was said.

    Attributes:
        schedule: the forward process it was trained on.
        prediction_type: "epsilon", "sample", "v_prediction" or "mean".
        variance_type: as in `Sampler`; "learned_range" and "learned" networks have 2C channels.
        sample_shape: (C, H, W) it was exported with.
        num_classes: the index of the null class.
        label_names: of the classes.
        label_input: the input that takes class labels, where None may stand for the null class.
        precision: "fp32", "fp16" or "bf16", of weights and arithmetic.
        batch: batch sizes that it takes.
        opset: of the file.
        kind: "denoiser", the network alone, or "sampler", the whole loop.
        normalization: of the images it was trained on; None for pixels in [-1, 1]. The images of
            a "sampler" are decoded, and are in [-1, 1] again.
        sampler: of a "sampler": method, steps, timesteps, eta and so on.
        version: of the stepfuse that wrote the file.
        format_version: of these keys.
    """

    schedule: Schedule | None = None
    prediction_type: str | None = None
    variance_type: str | None = None
    sample_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    label_names: tuple[str, ...] = ()
    label_input: str | None = None
    precision: str = "fp32"
    batch: BatchProfile | None = None
    opset: int | None = None
    kind: Kind = "denoiser"
    normalization: Normalization | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__
    format_version: int = FORMAT_VERSION

    def to_strings(self) -> dict[str, str]:
        """Keys and values for the file."""
        values: dict[str, Any] = {
            "format_version": self.format_version,
            "version": self.version,
            "kind": self.kind,
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "sample_shape": self.sample_shape,
            "num_classes": self.num_classes,
            "label_names": list(self.label_names),
            "label_input": self.label_input,
            "precision": self.precision,
            "batch": None if self.batch is None else str(self.batch),
            "opset": self.opset,
            "normalization": None if self.normalization is None else self.normalization.to_json(),
            "sampler": dict(self.sampler),
        }
        if self.schedule is not None:
            betas = self.schedule.betas.numpy().astype("<f8").tobytes()
            values["schedule.name"] = self.schedule.name
            values["schedule.betas"] = base64.b64encode(betas).decode("ascii")
        return {
            PREFIX + key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for key, value in values.items()
            if value not in (None, [], {})
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> Metadata:
        """The inverse; keys of others are ignored.

        Raises ValueError for strings that are not of this format.
        """
        check_mapping("strings", strings, "a dict of strings")
        if not all(isinstance(value, str) for value in strings.values()):
            raise TypeError("strings must be a dict of strings; got a value that is none")
        found = {k.removeprefix(PREFIX): v for k, v in strings.items() if k.startswith(PREFIX)}
        if "format_version" not in found:
            raise ValueError(
                f"strings hold no metadata of stepfuse, only {sorted(strings) or 'none at all'}"
            )
        try:
            version = int(found["format_version"])
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}; accepted: {FORMAT_VERSION}")
            return cls._read(found)
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"damaged metadata of stepfuse: {reason}") from None

    @classmethod
    def _read(cls, found: Mapping[str, str]) -> Metadata:
        def parsed(key: str, default: Any = None) -> Any:
            return json.loads(found[key]) if key in found else default

        schedule = None
        if "schedule.betas" in found:
            content = base64.b64decode(found["schedule.betas"], validate=True)
            betas = torch.from_numpy(np.frombuffer(content, dtype="<f8").astype(np.float64))
            schedule = Schedule.from_betas(betas, found.get("schedule.name", "custom"))
        shape = parsed("sample_shape")
        normalization = parsed("normalization")
        if normalization is not None:
            if shape is None:
                raise ValueError("a normalization without a sample_shape")
            normalization = Normalization.from_json(normalization, int(shape[0]))
        kind = found["kind"]
        if kind not in ("denoiser", "sampler"):
            raise ValueError(f"kind {kind!r}; accepted: 'denoiser', 'sampler'")
        return cls(
            schedule=schedule,
            prediction_type=found.get("prediction_type"),
            variance_type=found.get("variance_type"),
            sample_shape=None if shape is None else tuple(int(n) for n in shape),
            num_classes=parsed("num_classes"),
            label_names=tuple(parsed("label_names", ())),
            label_input=found.get("label_input"),
            precision=found["precision"],
            batch=BatchProfile.parse(found["batch"]) if "batch" in found else None,
            opset=parsed("opset"),
            kind="denoiser" if kind == "denoiser" else "sampler",
            normalization=normalization,
            sampler=parsed("sampler", {}),
            version=found["version"],
            format_version=int(found["format_version"]),
        )


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of an ONNX file written by `onnx` or `onnx_loop`; needs the package onnx.

    Raises ValueError for a file that is missing, truncated, no ONNX file, or of another program.
    """
    return Metadata.from_strings(read_strings(path))


def read_strings(path: str | os.PathLike[str]) -> dict[str, str]:
    """All ``metadata_props`` of an ONNX file. Raises ValueError as `read_metadata` does."""
    onnx = library("onnx", "reading an ONNX file")
    path = Path(check_path("path", path))
    if kind_of(path) == NOT_THERE:
        raise ValueError(f"{path} is not there, or no file; accepted: the path of an ONNX file")
    check_regular(path, "the path of an ONNX file")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own, which moved between its releases
        raise ValueError(f"{path} is truncated or no ONNX file: {reason(error)}") from None
    if not model.HasField("graph"):
        raise ValueError(f"{path} is truncated or no ONNX file: it holds no graph")
    return {entry.key: entry.value for entry in model.metadata_props}
