"""Concatenate nothing where a convolution can read two images.

    a ──┐                             a ──► convolve(a, ..., beside=b)
        ├─► cat ───► convolve             ╱
    b ──┘       └──► convolve         b ─┴► convolve(a, ..., beside=b)

A U-Net's decoder concatenates what it has with what the encoder kept, for one block to read: its
first convolution, with the norm before it, and its shortcut. `convolve` gathers pixels before it
multiplies anyway, and takes them from either image; a 1x1 convolution of two images of the same
width reads both where they lie, as two terms of its sum. The same numbers are added in the same
order, so that the result is the same to the bit.

An image stays concatenated where anything else reads it, and where an image's channels do not fill
whole vectors.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from stepfuse.engine.compile.graph import PassContext, PassReport, calls, finish, is_call, value
from stepfuse.kernels.concatenate import OP as CONCATENATE
from stepfuse.kernels.convolve import OP as CONVOLVE
from stepfuse.kernels.convolve import ConvolveCall
from stepfuse.kernels.products import whole_vectors


def read_side_by_side(gm: GraphModule, context: PassContext) -> PassReport:
    """Let every `convolve` that reads two images side by side read the two."""
    report = PassReport("read_side_by_side")
    for node in calls(gm, CONCATENATE):
        if report.count(_problem(node)):
            first, second = _images(node)
            for reader in list(node.users):
                found = ConvolveCall.of(reader.args)
                reader.args = replace(found, x=first, beside=second).arguments()
    finish(gm)
    return report


def _images(node: Node) -> list[Node]:
    images = node.args[0]
    assert isinstance(images, (list, tuple))
    return [image for image in images if isinstance(image, Node)]


def _problem(node: Node) -> str:
    images = _images(node)
    if len(images) != 2:
        return "not two images"
    if not whole_vectors(*(value(image).shape[1] for image in images)):
        return "channels not in whole vectors"
    if not all(_reads_only_as_image(reader, node) for reader in node.users):
        return "not only read by convolutions of ours"
    return ""


def _reads_only_as_image(reader: Node, node: Node) -> bool:
    if not is_call(reader, CONVOLVE):
        return False
    found = ConvolveCall.of(reader.args)
    reads = sum(argument is node for argument in found.arguments())
    return found.x is node and found.beside is None and reads == 1
