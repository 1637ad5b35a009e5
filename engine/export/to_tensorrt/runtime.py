"""A TensorRT engine as a model for `Sampler`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.export.described import Described
from stepfuse.engine.export.metadata import Metadata
from stepfuse.engine.export.to_tensorrt.engine_file import TensorSpec, check_library, read_engine
from stepfuse.engine.export.to_tensorrt.library import Messages, find_library
from stepfuse.kernels.arguments import check_on_device, check_path, check_tensor
from stepfuse.kernels.backends import BackendUnavailable
from stepfuse.kernels.checks import as_device, as_integer, check_real

MOST_RESULTS = 1024


class TensorRTDenoiser(Described, nn.Module):
    """Runs an engine file of `stepfuse.export.tensorrt`: ``denoiser(x, t, labels=...)``.

        denoiser = sf.TensorRTDenoiser("unet.engine")
        sampler = sf.Sampler(denoiser, denoiser.schedule, prediction_type=denoiser.prediction_type)

    A call allocates nothing and waits for nothing: inputs are read where they are, unless they have
    another dtype or gaps and are copied into a buffer of the denoiser first; the result is written
    to one of ``results`` buffers in turn; the kernels go to PyTorch's current stream. So a call can
    be captured into a CUDA graph, after one call with the same batch outside of it.

    Never run on a GPU: the handling of buffers is tested with a library made of PyTorch.

    Args:
        path: of the engine file.
        device: the GPU.
        results: how many buffers take turns. A result is overwritten ``results`` calls later; two
            are enough for classifier-free guidance in separate calls.

    Copies and pickles name the file and open it again.

    Attributes:
        info: what the header of the file says.
        metadata: schedule, prediction type and so on of the network; None where the ONNX file did
            not say.
        differentiable: False, so that no guidance asks for a gradient.

    Raises `BadEngineFile` for a file that is damaged or was built by another version,
    `BackendUnavailable` with the reason where there is no GPU or no library.
    """

    differentiable = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cuda",
        results: int = 2,
    ) -> None:
        super().__init__()
        if not 1 <= as_integer("results", results) <= MOST_RESULTS:
            raise ValueError(f"results must be in 1 .. {MOST_RESULTS}; got {results}")
        self.path = Path(check_path("path", path))
        as_device("device", device)
        self._arguments = (self.path.absolute(), device, results)
        self.info, plan = read_engine(path)
        library = find_library(self.info.library)
        check_library(path, self.info, library.name, library.version)
        self.device = _gpu(device)
        self.metadata = Metadata.from_strings(self.info.metadata) if self.info.metadata else None
        self._messages = Messages(library)
        self._module = library.module
        self._runtime = library.module.Runtime(self._messages.logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendUnavailable(
                f"{library} cannot run {path} on {self.device}: {self._messages.reason()}"
            )
        if len(self.info.outputs) != 1:
            raise ValueError(f"{path} has {len(self.info.outputs)} outputs; accepted: 1")
        self._contexts: dict[int, Any] = {}
        self._copies: dict[str, Tensor] = {}
        self._results = [self._buffer(self.info.outputs[0]) for _ in range(results)]
        self._turn = 0
        # says dtype and device to whoever looks at the buffers of a module
        x = self.info.inputs[0]
        self.register_buffer("like_x", self._buffer(x)[:0], persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        """The raw prediction, [N, ...], valid until ``results`` calls later.

        Args:
            x: [N, C, H, W] of the shape in ``info.inputs``.
            t: [N].
            condition: the other inputs by name; where the network has classes, labels that are
                missing or None are the null class.

        Raises ValueError for shapes, a batch or names that the engine does not take.
        """
        check_tensor("x", x)
        check_tensor("t", t)
        count = x.shape[0] if x.dim() else 0
        self.info.batch.check(count)
        context = self._context(count)
        values = self._named(x, t, condition)
        for spec in self.info.inputs:
            value = self._in_place(spec, values[spec.name], count)
            self._require(context.set_tensor_address(spec.name, value.data_ptr()))
        result = self._results[self._turn][:count]
        self._turn = (self._turn + 1) % len(self._results)
        self._require(context.set_tensor_address(self.info.outputs[0].name, result.data_ptr()))
        self._require(context.execute_async_v3(_stream(self.device)))
        return result

    def takes_batch(self, count: int) -> bool:
        """Whether the engine takes that many samples."""
        return self.info.batch.takes(count)

    def __reduce__(self) -> Any:
        return _opened, self._arguments

    def _named(self, x: Tensor, t: Tensor, condition: dict[str, Any]) -> dict[str, Tensor | None]:
        """Every input by its name; None only for the labels."""
        names = [spec.name for spec in self.info.inputs]
        unknown = sorted(set(condition) - set(names[2:]))
        if unknown:
            accepted = ", ".join(names[2:]) or "none"
            raise ValueError(f"the engine has no input {unknown[0]!r}; accepted: {accepted}")
        values: dict[str, Tensor | None] = {names[0]: x, names[1]: t}
        labels = None if self.metadata is None else self.metadata.label_input
        for name in names[2:]:
            values[name] = condition.get(name)
            if values[name] is None and name != labels:
                raise ValueError(f"the engine needs the input {name!r}; got {sorted(condition)}")
        return values

    def _in_place(self, spec: TensorSpec, value: Tensor | None, count: int) -> Tensor:
        """The value itself where the engine can read it, or else its copy in a static buffer."""
        shape = (count, *spec.shape[1:])
        dtype = getattr(torch, spec.dtype)
        if value is None:
            assert self.metadata is not None
            return self._copy_of(spec)[:count].fill_(self.metadata.num_classes or 0)
        check_on_device(spec.name, value)
        check_real(spec.name, value)
        if tuple(value.shape) != shape:
            raise ValueError(f"{spec.name} has shape {tuple(value.shape)}; accepted: {shape}")
        ready = value.is_contiguous() and not value.is_neg()
        if ready and value.dtype is dtype and value.device == self.device:
            return value
        return self._copy_of(spec)[:count].copy_(value)

    def _copy_of(self, spec: TensorSpec) -> Tensor:
        if spec.name not in self._copies:
            self._copies[spec.name] = self._buffer(spec)
        return self._copies[spec.name]

    def _buffer(self, spec: TensorSpec) -> Tensor:
        shape = (self.info.batch.maximum, *spec.shape[1:])
        return torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device)

    def _context(self, count: int) -> Any:
        """One context per batch size: a captured graph holds the state of its own."""
        if count not in self._contexts:
            context = self._new_context()
            if context is None:
                raise RuntimeError(f"no execution context: {self._messages.reason()}")
            self._require(context.set_optimization_profile_async(0, _stream(self.device)))
            for spec in self.info.inputs:
                self._require(context.set_input_shape(spec.name, (count, *spec.shape[1:])))
            missing = context.infer_shapes()
            if missing:
                raise RuntimeError(f"inputs of unknown shape: {missing}")
            self._contexts[count] = context
        return self._contexts[count]

    def _new_context(self) -> Any:
        strategy = getattr(self._module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategy is None:
            return self._engine.create_execution_context()
        # TensorRT-RTX compiles kernels for a shape when it meets it: at once, so that nothing is
        # exchanged behind a captured graph
        settings = self._engine.create_runtime_config()
        settings.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        return self._engine.create_execution_context(settings)

    def _require(self, done: bool) -> None:
        if not done:
            raise RuntimeError(f"TensorRT refuses a call: {self._messages.reason()}")


def _opened(path: Path, device: torch.device | str, results: int) -> TensorRTDenoiser:
    return TensorRTDenoiser(path, device=device, results=results)


def _gpu(device: torch.device | str) -> torch.device:
    """The device with its number. Raises BackendUnavailable where it is not there."""
    asked = as_device("device", device)
    if asked.type != "cuda":
        raise ValueError(f"device must be a CUDA device; got {device!r}")
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
        raise BackendUnavailable(
            f"a TensorRT engine runs on an NVIDIA GPU, and PyTorch {torch.__version__} {why} here; "
            "an ONNX file runs on the CPU too: `stepfuse.OnnxDenoiser`"
        )
    return torch.device("cuda", torch.cuda.current_device() if asked.index is None else asked.index)


def _stream(device: torch.device) -> int:
    """The handle of the current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)
