"""`OnnxDenoiser`: an ONNX file as a model for `Sampler`, run by ONNX Runtime."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.export.described import Described
from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.metadata import PREFIX, Metadata
from stepfuse.engine.export.to_onnx.runtime import (
    DTYPES,
    Provider,
    check_providers,
    device_of,
    quiet_options,
)
from stepfuse.engine.files.reading import NOT_THERE, check_regular, kind_of
from stepfuse.kernels.arguments import (
    check_dtype_kind,
    check_on_device,
    check_path,
    check_tensor,
)
from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.checks import as_integer, received
from stepfuse.kernels.layout import resolved
from stepfuse.kernels.limits import check_threads
from stepfuse.kernels.registration import define


@dataclass(frozen=True)
class Port:
    """An input or output: a word in ``shape`` is a dynamic size; ``numpy`` is ORT's type."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    numpy: Any

    @classmethod
    def of(cls, path: Path, info: Any) -> Port:
        """From ONNX Runtime's description; ValueError for a type that PyTorch cannot lend."""
        if info.type not in DTYPES:
            raise ValueError(
                f"{path}: {info.name!r} is a {info.type}; accepted: {', '.join(DTYPES)}"
            )
        return cls(info.name, tuple(info.shape), *DTYPES[info.type])

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError for a shape that the file does not take, the batch aside."""
        fits = len(shape) == len(self.shape) and all(
            isinstance(accepted, str) or accepted == size
            for accepted, size in zip(self.shape, shape, strict=True)
        )
        if not fits:
            accepted = ", ".join(map(str, self.shape))
            raise ValueError(f"{self.name} has shape {tuple(shape)}; accepted: [{accepted}]")


class OnnxDenoiser(Described, nn.Module):
    """Runs an ONNX file as ``denoiser(x, t, **condition)``.

        denoiser = sf.OnnxDenoiser("digits.onnx")
        sampler = sf.Sampler(denoiser, denoiser.schedule, prediction_type=denoiser.prediction_type)

    ONNX Runtime reads the tensors where PyTorch has them and writes into a tensor of PyTorch: no
    copies, unless a tensor has gaps or another dtype. The call is one PyTorch operator, so that a
    sampler records and replays it like any other on the CPU. On CUDA it has never been run; a CUDA
    graph cannot hold it, since it waits for the GPU, and a sampler runs it eagerly there. Copies
    and pickles name the file and open it again.

    Args:
        path: of a file written by `stepfuse.export.onnx`, or of another with inputs (x, t, ...).
        providers: of ONNX Runtime, in order of preference, names or (name, options). By default
            CUDA where ONNX Runtime and PyTorch both have it, and the CPU.
        threads: of one operator; by default as many as PyTorch has now.

    Attributes:
        metadata: what the file says of itself; None for a file of another program.
        inputs, output: names, shapes and dtypes.
        capturable: False on CUDA, see `Sampler`.
        differentiable: False, so that no guidance asks for a gradient.

    Raises:
        ValueError: a file that is missing, truncated, no ONNX file, or no denoiser.
        BackendUnavailable: onnxruntime or a provider is not installed, or lacks an operator.
    """

    differentiable = False
    uncapturable_because = "ONNX Runtime waits for the GPU in every call"

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        runtime = library("onnxruntime", "an OnnxDenoiser")
        self.path = Path(check_path("path", path))
        self._arguments = (self.path.absolute(), providers, threads)
        if threads is not None:
            check_threads("threads", as_integer("threads", threads, "an int or None"))
        chosen = check_providers(runtime, providers)
        if kind_of(self.path) == NOT_THERE:
            raise ValueError(f"{path} is not there, or no file; accepted: an ONNX file")
        check_regular(self.path, "an ONNX file")
        self._session = _session(runtime, self.path, quiet_options(runtime, threads), chosen)
        self.providers: list[str] = self._session.get_providers()
        self.metadata = _metadata(self.path, self._session)
        self.inputs = [Port.of(self.path, info) for info in self._session.get_inputs()]
        self.output = Port.of(self.path, self._session.get_outputs()[0])
        if len(self.inputs) < 2:
            names = ", ".join(port.name for port in self.inputs)
            raise ValueError(f"{path} has the inputs ({names}); a denoiser has (x, t, ...)")
        self._handle = next(_handles)
        _denoisers[self._handle] = self
        # says dtype and device to whoever looks at the buffers of a module
        like_x = torch.empty(0, dtype=self.inputs[0].dtype, device=device_of(chosen[0]))
        self.register_buffer("like_x", like_x, persistent=False)
        self.like_x: Tensor

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The raw prediction, [N, C or 2C, ...].

        Args:
            x: [N, C, ...].
            t: [N].
            condition: the other inputs by name; where the network has a null class, labels that are
                missing or None stand for it.

        Raises ValueError or TypeError for shapes, dtypes, a batch or names that the file does not
        take, RuntimeError where ONNX Runtime stops (a label out of range, say).
        """
        check_tensor("x", x)
        check_tensor("t", t)
        if x.dim() == 0:
            raise ValueError("x must have shape [N, C, ...]; got ()")
        if self.metadata is not None and self.metadata.batch is not None:
            self.metadata.batch.check(x.shape[0])
        named = self._named(x, t, condition)
        values = []
        for port in self.inputs:
            value = named[port.name]
            check_on_device(port.name, value)
            port.check(value.shape)
            if value.shape[:1] != x.shape[:1]:
                raise ValueError(
                    f"{port.name} has {value.shape[0]} entries; accepted: {x.shape[0]}, as x has"
                )
            check_dtype_kind(port.name, value, port.dtype)
            value = value.to(device=self.like_x.device, dtype=port.dtype)
            values.append(value.contiguous())
        result: Tensor = _OP(values, self._handle)
        return result

    @property
    def capturable(self) -> bool:
        """Whether a call may be part of a captured step."""
        return self.like_x.device.type != "cuda"

    def takes_batch(self, count: int) -> bool:
        """Whether the file takes that many samples."""
        batch = None if self.metadata is None else self.metadata.batch
        sizes = [port.shape[0] for port in self.inputs if port.shape]
        takes = batch is None or batch.takes(count)
        return takes and all(isinstance(size, str) or size == count for size in sizes)

    def __reduce__(self) -> Any:
        return OnnxDenoiser, self._arguments

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """Run the file on tensors in the order of ``inputs``, contiguous and of their dtypes."""
        output = torch.empty(
            self._output_shape(values), dtype=self.output.dtype, device=self.like_x.device
        )
        on_gpu = output.device.type == "cuda"
        place = (output.device.type, output.device.index or 0)
        binding = self._session.io_binding()
        values = resolved(*values)
        for port, value in zip(self.inputs, values, strict=True):
            binding.bind_input(port.name, *place, port.numpy, list(value.shape), value.data_ptr())
        binding.bind_output(
            self.output.name, *place, self.output.numpy, list(output.shape), output.data_ptr()
        )
        if on_gpu:  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream(output.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        # ONNX Runtime's exceptions have no base class of their own
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime cannot run {self.path}: {error}") from error
        if on_gpu:
            binding.synchronize_outputs()
        return output

    def _output_shape(self, values: Sequence[Tensor]) -> list[int]:
        """Sizes of x where the file leaves them open."""
        x = values[0]
        return [
            x.shape[axis] if isinstance(size, str) else size
            for axis, size in enumerate(self.output.shape)
        ]

    def _named(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> dict[str, Tensor]:
        first, second, *others = (port.name for port in self.inputs)
        unknown = sorted(set(condition) - set(others))
        if unknown:
            raise ValueError(
                f"the file has no input {unknown[0]!r}; accepted: {', '.join(others) or 'none'}"
            )
        named = {first: x, second: t}
        for name in others:
            value = condition.get(name)
            if value is None and self.metadata is not None and name == self.metadata.label_input:
                null = self.metadata.num_classes or 0
                value = torch.full((x.shape[0],), null, dtype=torch.int64, device=x.device)
            if not isinstance(value, Tensor):
                raise ValueError(f"the file needs the tensor {name!r}; got {received(value)}")
            named[name] = value
        return named


def _session(runtime: Any, path: Path, options: Any, providers: list[Provider]) -> Any:
    errors = runtime.capi.onnxruntime_pybind11_state
    try:
        session = runtime.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except errors.NotImplemented as error:
        raise BackendUnavailable(
            f"ONNX Runtime {runtime.__version__} cannot run {path}: {error}"
        ) from None
    # ONNX Runtime's exceptions have no base class of their own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or no ONNX file that can be run: {reason}") from None
    asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if asked not in session.get_providers():
        raise BackendUnavailable(
            f"{asked} is built into onnxruntime but does not start here: is its driver installed?"
        )
    return session


def _metadata(path: Path, session: Any) -> Metadata | None:
    strings = session.get_modelmeta().custom_metadata_map
    if not any(key.startswith(PREFIX) for key in strings):
        return None
    metadata = Metadata.from_strings(strings)
    if metadata.kind != "denoiser":
        raise ValueError(f"{path} holds a whole {metadata.kind}; accepted: a denoiser")
    return metadata


# the operator below knows its denoiser by number, so that a recorded call finds it again
_denoisers: weakref.WeakValueDictionary[int, OnnxDenoiser] = weakref.WeakValueDictionary()
_handles = itertools.count()


def _run(values: list[Tensor], handle: int) -> Tensor:
    return _denoisers[handle].run(values)


def _fake(values: list[Tensor], handle: int) -> Tensor:
    denoiser = _denoisers[handle]
    return values[0].new_empty(denoiser._output_shape(values), dtype=denoiser.output.dtype)


_OP = define("stepfuse_export::onnx_denoiser(Tensor[] values, int handle) -> Tensor", _run, _fake)
