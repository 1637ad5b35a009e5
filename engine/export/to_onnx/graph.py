"""From a network to an ONNX graph: torch.export, fused ops decomposed, names put in order."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from stepfuse.engine.export.batch_profile import BatchProfile
from stepfuse.engine.export.network import Network, Source
from stepfuse.kernels.group_norm_silu import OP as GROUP_NORM

BATCH = "batch"
BRANCHES = "branches"
MODULE = "stepfuse.module"  # key of a node: dotted name of the module that it came from
_LARGEST_SIZE = 8192  # pixels, where the image size is dynamic


class CannotExport(ValueError):
    """The network has no ONNX graph of the kind that was asked for; the message says why."""


def build(network: Network, source: Source, batch: BatchProfile, opset: int, sizes: bool) -> Any:
    """The network as an ``onnx_ir.Model`` with inputs x, t, conditions and the output "output".

    ``meta[BRANCHES]`` says whether the network asks for its batch size and does something else
    for a large one (diffusers' upsampling lays out memory anew from 64 on). The file holds what it
    does for the batch it was traced with: whether that is the same must be tried out.

    Args:
        sizes: whether height and width of x are dynamic too.

    Raises `CannotExport`.
    """
    count = batch.optimum if batch.fixed else max(2, batch.optimum)
    example = source.with_batch(count)
    with torch.no_grad(), _quietly():
        program, branches = _traced(network, example, batch, sizes)
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(example.inputs),
                output_names=["output"],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise CannotExport(f"no ONNX form: {_first_lines(error)}") from error
    assert exported is not None
    model = exported.model
    _tidy(model)
    model.meta[BRANCHES] = branches
    return model


def _traced(
    network: Network, example: Source, batch: BatchProfile, sizes: bool
) -> tuple[ExportedProgram, bool]:
    """The network's program, and whether it branches on sizes."""
    inputs = tuple(example.inputs.values())
    refused: Exception | None = None
    for branches in (False, True):
        shapes = _dynamic_shapes(example, batch, sizes, branches)
        try:
            with _Decomposed():
                program = torch.export.export(network, inputs, dynamic_shapes=shapes)
            return program, branches
        # torch.export raises exceptions of many kinds, user code of any kind
        except Exception as error:
            refused = refused or error
            if "Constraints violated" not in str(error):
                break
    assert refused is not None
    raise CannotExport(_why(refused, batch, sizes)) from refused


def rename_sizes(graph: Any, names: Mapping[str, str]) -> None:
    """Other words for dynamic sizes, also inside expressions such as "4*s77"."""
    for value in _values(graph):
        if value.shape is not None:
            words = [size if isinstance(size, int) else size.value for size in value.shape]
            renamed = [
                re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), word)
                if isinstance(word, str)
                else word
                for word in words
            ]
            value.shape = type(value.shape)(renamed)


def _dynamic_shapes(source: Source, batch: BatchProfile, sizes: bool, branches: bool) -> Any:
    """``branches``: the network may shrink the range of the batch to that of its branch."""
    dims: dict[int, Any] = {}
    if not batch.fixed:
        whole = Dim(BATCH, min=batch.minimum, max=batch.maximum)
        dims = {0: Dim.DYNAMIC if branches else whole}
    image = dict(dims)
    if sizes:
        step = source.size_divisor or 1
        for axis, name in ((2, "height"), (3, "width")):
            part = Dim(f"{name}_parts" if step > 1 else name, min=1, max=_LARGEST_SIZE // step)
            image[axis] = step * part if step > 1 else part
    conditions = tuple(dims for _ in source.condition)
    return (image, dims, conditions) if conditions else (image, dims)


class _Decomposed(TorchFunctionMode):
    """Inside, the fused op is done by plain ones, which is what a trace then shows."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is GROUP_NORM:
            return _group_norm_silu(*args)
        return func(*args, **(kwargs or {}))


def _group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    silu: bool,
    backend: str,
) -> Tensor:
    """The fused op as the operators that ONNX and its runtimes know."""
    spatial = (..., *[None] * (x.dim() - 2))
    h = x if add is None else x + add[spatial]
    h = F.group_norm(h, groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale[spatial])
    if shift is not None:
        h = h + shift[spatial]
    return F.silu(h) if silu else h


def _tidy(model: Any) -> None:
    """Names that a reader expects; nothing of the machine it was made on stays in the file."""
    graph = model.graph
    words = {}
    for axis, word in ((0, BATCH), (2, "rows"), (3, "columns")):
        for symbol in re.findall(r"[A-Za-z_]\w*", str(graph.inputs[0].shape[axis : axis + 1])):
            words[symbol] = word
    rename_sizes(graph, words)
    for value in _values(graph):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props[MODULE] = _module_of(scopes)
    for name in list(graph.initializers):
        if name.startswith("model."):
            value = graph.initializers[name]
            value.name = name.removeprefix("model.")
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name, graph.doc_string = "denoiser", None


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _module_of(scopes: str) -> str:
    """ "['', 'model', 'model.mid', 'model.mid.conv', 'conv2d_3']" -> "mid.conv"."""
    names = re.findall(r"'([^']*)'", scopes)
    innermost = names[-2] if len(names) > 1 else ""
    return re.sub(r"^model\.?", "", innermost)


def _why(error: Exception, batch: BatchProfile, sizes: bool) -> str:
    text = f"torch.export refuses the network: {type(error).__name__}: {_first_lines(error)}"
    if not batch.fixed:
        text += f"; if its batch must be fixed, give batch={batch.optimum}"
    if sizes:
        text += "; if its image size must be fixed, leave out dynamic_size"
    return text


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters print and log on the way; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
