"""A denoiser's graph becomes the body of a Loop that runs down a step table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepfuse.engine.export.libraries import library
from stepfuse.engine.export.to_onnx.graph import BATCH, rename_sizes
from stepfuse.engine.export.to_onnx.job import sizes
from stepfuse.engine.networks.normalization import Normalization
from stepfuse.kernels.step_row import Column, HistoryColumn

_PREFIX = "loop."  # of every name that is not the network's


@dataclass(frozen=True)
class Loop:
    """What the loop runs over.

    Attributes:
        table: [S, 16] float64, see `stepfuse.kernels.step_row`.
        unconditional: of classifier-free guidance: what replaces entries of the condition, tensors
            that broadcast against them; None for no guidance.
        learned_variance: the update uses the second half of the network's channels.
        noisy: an input "noise" [S, N, C, ...] is added, row i in step i.
        timesteps: what the network is given in each of the S turns.
        history: [S, 8] float64, the second part of the rows of a solver with a memory.
        slots: how many tensors it remembers, carried from turn to turn.
        normalization: of the samples, which are decoded to images in [-1, 1]; None where they are.
    """

    table: Tensor
    unconditional: Mapping[str, Tensor] | None
    learned_variance: bool
    noisy: bool
    timesteps: Sequence[int]
    history: Tensor | None = None
    slots: int = 0
    normalization: Normalization | None = None


def looped(model: Any, loop: Loop) -> Any:
    """The sampler as an ``onnx_ir.Model``; ``model`` is used up.

        x_T, condition, (noise) -> images

    Each turn reads one row of the table and does what `stepfuse.kernels.reference.denoise_step`
    does with it, in float32. With guidance both halves go through the network as one batch.
    """
    ir = library("onnx_ir", "writing an ONNX file")
    network = model.graph
    ops = _Ops(ir, list(network.initializers.values()))
    shape = _image_shape(network, loop)
    start = ops.value("x_T", ir.DataType.FLOAT, shape)
    conditions = [ops.value(v.name, v.dtype, [shape[0], *sizes(v)[1:]]) for v in network.inputs[2:]]
    inputs = [start, *conditions]
    noise = None
    if loop.noisy:
        noise = ops.value("noise", ir.DataType.FLOAT, [len(loop.table), *shape])
        inputs.append(noise)
    if loop.unconditional is not None:
        rename_sizes(network, {BATCH: "both_batches"})
    body = _body(ops, network, loop, shape, conditions, noise)
    samples = ops.value("images", ir.DataType.FLOAT, shape)
    turns = ops.constant("steps", np.array(len(loop.table), np.int64))
    going = ops.constant("going", np.array(True))
    attributes = {"body": body}
    before, empty = _nothing_yet(ops, start) if loop.slots else ([], None)
    carried = [start, *[empty] * loop.slots]
    left = [ir.Value(name=f"{_PREFIX}left_{slot}") for slot in range(loop.slots)]
    node = ir.node(
        "Loop", [turns, going, *carried], attributes, outputs=[samples, *left], name="loop"
    )
    ops.nodes = [*before, node]
    images = _decoded(ops, samples, shape, loop.normalization)
    network.initializers.clear()
    graph = ir.Graph(
        inputs,
        [images],
        nodes=ops.nodes,
        initializers=list(ops.initializers.values()),
        opset_imports=dict(network.opset_imports),
        name="sampler",
    )
    sampler = ir.Model(graph, ir_version=model.ir_version)
    sampler.meta.update(model.meta)
    return sampler


def _nothing_yet(ops: _Ops, start: Any) -> tuple[list[Any], Any]:
    """The nodes that make a tensor of zeros like x_T, and that tensor: no row reads it."""
    ir = ops.ir
    shape, zeros = (ir.Value(name=f"{_PREFIX}{name}") for name in ("shape_of_x", "nothing_yet"))
    zero = ops.constant("zero", np.array(0.0, np.float32))
    nodes = [
        ir.node("Shape", [start], outputs=[shape], name=shape.name),
        ir.node("Expand", [zero, shape], outputs=[zeros], name=zeros.name),
    ]
    return nodes, zeros


class _Ops:
    """Nodes in the order they are asked for, and the constants they read."""

    def __init__(self, ir: Any, initializers: Sequence[Any]) -> None:
        self.ir, self.nodes = ir, list[Any]()
        self.initializers = {value.name: value for value in initializers}

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        name = f"{_PREFIX}{kind}_{len(self.nodes)}"
        output = self.ir.Value(name=name)
        node = self.ir.node(kind, inputs, attributes, outputs=[output], name=name)
        self.nodes.append(node)
        return output

    def value(self, name: str, dtype: Any, shape: Sequence[int | str]) -> Any:
        """An input or output."""
        return self.ir.Value(name=name, type=self.ir.TensorType(dtype), shape=self.ir.Shape(shape))

    def constant(self, name: str, content: Any) -> Any:
        """The initializer of that name, made where it is not there."""
        name = f"{_PREFIX}{name}"
        if name not in self.initializers:
            tensor = self.ir.Tensor(np.asarray(content), name=name)
            value = self.value(name, tensor.dtype, tensor.shape)
            value.const_value = tensor
            self.initializers[name] = value
        return self.initializers[name]

    def number(self, value: int) -> Any:
        """[value], int64, as Slice wants it."""
        return self.constant(str(value), np.array([value], np.int64))

    def cut(self, value: Any, start: Any, stop: Any, axis: int) -> Any:
        """value[..., start:stop, ...]."""
        return self("Slice", value, start, stop, self.number(axis))


def _body(
    ops: _Ops,
    network: Any,
    loop: Loop,
    shape: Sequence[int | str],
    conditions: Sequence[Any],
    noise: Any,
) -> Any:
    """One turn: (step, go on?, x, h_0 ...) -> (go on?, x_next, h_0' ...), named as in the table."""
    ir, channels = ops.ir, int(shape[1])
    step = ops.value(f"{_PREFIX}step", ir.DataType.INT64, [])
    going = ops.value(f"{_PREFIX}continue", ir.DataType.BOOL, [])
    x = ops.value(f"{_PREFIX}x", ir.DataType.FLOAT, shape)

    held = [ops.value(f"{_PREFIX}held_{k}", ir.DataType.FLOAT, shape) for k in range(loop.slots)]

    def row(column: Column | HistoryColumn) -> Any:
        table = loop.table if isinstance(column, Column) else loop.history
        assert table is not None
        numbers = table[:, column].to(torch.float32).numpy()
        return ops("Gather", ops.constant(column.name.lower(), numbers), step)

    def times(column: Column | HistoryColumn, value: Any) -> Any:
        return ops("Mul", row(column), value)

    timesteps = np.array(loop.timesteps, np.int64)
    t = ops("Gather", ops.constant("timesteps", timesteps), step)
    output, uncond, total = _evaluated(ops, network, loop, x, t, conditions)

    def half(value: Any, first: int) -> Any:
        if total == channels:
            return value
        return ops.cut(value, ops.number(first * channels), ops.number((first + 1) * channels), 1)

    o = half(output, 0)
    if uncond is not None:
        uncond = half(uncond, 0)
        o = ops("Add", uncond, times(Column.GUIDANCE, ops("Sub", o, uncond)))
    x0 = ops("Add", times(Column.P_X, x), times(Column.P_O, o))
    clip = row(Column.CLIP)
    x0 = ops("Max", ops("Min", x0, clip), ops("Neg", clip))
    mean = ops("Add", times(Column.C_X, x), times(Column.C_O, o))
    x_next = ops("Add", mean, times(Column.C_0, x0))
    for slot, h in enumerate(held):
        x_next = ops("Add", x_next, times(HistoryColumn(HistoryColumn.C_H0 + slot), h))
    if noise is not None:
        std = row(Column.SIGMA)
        if loop.learned_variance:
            log_variance = ops("Add", row(Column.L_0), times(Column.L_1, half(output, 1)))
            one_half = ops.constant("half", np.array(0.5, np.float32))
            std = ops("Mul", std, ops("Exp", ops("Mul", one_half, log_variance)))
        x_next = ops("Add", x_next, ops("Mul", std, ops("Gather", noise, step)))
    remembered = _remembered(ops, times, row, held, x, o, x0)
    for value in (x_next, *remembered):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    still = ops("Identity", going)
    still.type, still.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    return ir.Graph(
        [step, going, x, *held], [still, x_next, *remembered], nodes=ops.nodes, name="step"
    )


def _remembered(
    ops: _Ops, times: Any, row: Any, held: Sequence[Any], x: Any, o: Any, x0: Any
) -> list[Any]:
    """What is held after the turn: H_X x + H_O o + H_0 x0 in one place, else what was there."""
    if not held:
        return []
    new = ops("Add", times(HistoryColumn.H_X, x), times(HistoryColumn.H_O, o))
    new = ops("Add", new, times(HistoryColumn.H_0, x0))
    write = row(HistoryColumn.WRITE)
    slots = [ops.constant(f"slot_{k}", np.array(k, np.float32)) for k in range(len(held))]
    return [
        ops("Where", ops("Equal", write, slot), new, h) for slot, h in zip(slots, held, strict=True)
    ]


def _decoded(
    ops: _Ops, samples: Any, shape: Sequence[int | str], normalization: Normalization | None
) -> Any:
    """clamp(2 (mean + std x) - 1, -1, 1), the output "images"; the samples where it is None."""
    if normalization is None:
        return samples
    samples.name = f"{_PREFIX}samples"

    def column(values: Sequence[float]) -> Any:
        return np.array(values, np.float32).reshape(-1, *[1] * (len(shape) - 2))

    scale = ops.constant("std", 2 * column(normalization.std))
    shift = ops.constant("mean", 2 * column(normalization.mean) - 1)
    most, least = (
        ops.constant(n, np.array(v, np.float32)) for n, v in (("most", 1), ("least", -1))
    )
    x = ops("Add", ops("Mul", samples, scale), shift)
    images = ops("Max", ops("Min", x, most), least)
    images.name = "images"
    images.type, images.shape = samples.type, samples.shape
    return images


def _evaluated(
    ops: _Ops, network: Any, loop: Loop, x: Any, t: Any, conditions: Sequence[Any]
) -> tuple[Any, Any, int]:
    """The network's output for (x, t, condition), the unconditional one or None, its channels."""
    arguments = list(conditions)
    count = ops.cut(ops("Shape", x), ops.number(0), ops.number(1), 0)
    if loop.unconditional is not None:
        x = ops("Concat", x, x, axis=0)
        for i, value in enumerate(conditions):
            other = value
            if value.name in loop.unconditional:
                content = loop.unconditional[value.name].numpy()
                constant = ops.constant(f"unconditional_{value.name}", content)
                other = ops("Expand", constant, ops("Shape", value))
            arguments[i] = ops("Concat", value, other, axis=0)
    t = ops("Expand", t, ops.cut(ops("Shape", x), ops.number(0), ops.number(1), 0))
    (output,) = network.outputs
    for old, new in zip(network.inputs, (x, t, *arguments), strict=True):
        ops.ir.convenience.replace_all_uses_with(old, new)
    nodes = list(network)
    network.outputs.clear()
    network.remove(nodes)
    ops.nodes.extend(nodes)
    channels = int(output.shape[1])
    if loop.unconditional is None:
        return output, None, channels
    cond = ops.cut(output, ops.number(0), count, 0)
    rest = ops.cut(output, count, ops.number(np.iinfo(np.int64).max), 0)
    return cond, rest, channels


def _image_shape(network: Any, loop: Loop) -> list[int | str]:
    """Of x_T: that of the network's x, half of its batch where both halves go through at once."""
    batch, *rest = sizes(network.inputs[0])
    if loop.unconditional is not None and isinstance(batch, int):
        batch //= 2
    return [batch, *rest]
