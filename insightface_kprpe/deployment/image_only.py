"""Images + keypoints -> embedding as an ONNX file for hosts that pass only images.

The graph stays the same, but gets its keypoints internally: the template's, or those that an aligner finds. That takes
a fraction of a second, while a second export would take as long as the first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn as nn
from onnx import helper, numpy_helper

from ..backbones import Backbone
from ..geometry import CANONICAL_KEYPOINTS
from ..packs.metadata import load_onnx, save_onnx, set_metadata
from .onnx_export import (
    MINIMAL_COSINE,
    WITHOUT_KEYPOINTS,
    ExportError,
    eval_on_cpu,
    example_inputs,
    save_graph,
    smallest_cosine,
)

_IMAGES, _KEYPOINTS = "images", "keypoints"


class KeypointFinder(nn.Module):
    """What a self-aligned network does first: images -> keypoints.

    Args:
        net: with ``finds_keypoints``.
    """

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float RGB in [-1, 1] -> (B, 5, 2) in [0, 1]."""
        return self.net.find_keypoints(images)


def write_image_only(source: str | Path, target: str | Path, net: Backbone | None = None) -> None:
    """Write the image-only version of a file with two inputs, and check that both give the same embeddings.

    Args:
        source: ONNX file of this package with the inputs ``images`` and ``keypoints``, in any precision.
        target: file to write; appears only when checked.
        net: the network of the file, if it finds keypoints itself; None: every face gets the template's.

    Raises:
        ExportError: the two files embed differently.
    """
    model = load_onnx(source, weights=True)
    graph = model.graph
    kept = [value for value in graph.input if value.name != _KEYPOINTS]
    del graph.input[:]
    graph.input.extend(kept)
    if net is None:
        _put_in_front(graph, _template_nodes(), [numpy_helper.from_array(CANONICAL_KEYPOINTS[None], "template")])
    else:
        with tempfile.TemporaryDirectory() as folder, eval_on_cpu(net):
            finder = Path(folder) / "finder.onnx"
            images = example_inputs(2, net.img_size)[:1]
            save_graph(KeypointFinder(net).eval(), images, finder, [_IMAGES], [_KEYPOINTS], {})
            located = _with_prefix(load_onnx(finder, weights=True).graph, "finder_")
        _put_in_front(graph, located.node, located.initializer)
    way = "template" if net is None else "dfa"
    entries = {"inputs": _IMAGES, "keypoint_source": way, "keypoint_convention": f"none: {WITHOUT_KEYPOINTS[way]}"}
    entries |= {"dfa_threshold": None if net is None else net.dfa_threshold}
    set_metadata(model, entries | {"evaluation": None, "change": None})  # measured on the other version
    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        written = Path(folder) / "image_only.onnx"
        save_onnx(model, written)
        _check(Path(source), written, net)
        written.replace(target)


def _template_nodes() -> list[onnx.NodeProto]:
    """The template, repeated for each image."""
    constant = numpy_helper.from_array(np.array([5, 2]), "points")
    return [
        helper.make_node("Shape", [_IMAGES], ["batch_of_images"], name="template_batch", start=0, end=1),
        helper.make_node("Constant", [], ["points_of_template"], name="template_points", value=constant),
        helper.make_node(
            "Concat", ["batch_of_images", "points_of_template"], ["shape_of_keypoints"], name="template_shape", axis=0
        ),
        helper.make_node("Expand", ["template", "shape_of_keypoints"], [_KEYPOINTS], name="template_keypoints"),
    ]


def _put_in_front(graph: onnx.GraphProto, nodes: list, initializers: list) -> None:
    behind = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *behind])
    graph.initializer.extend(initializers)


def _with_prefix(graph: onnx.GraphProto, prefix: str) -> onnx.GraphProto:
    """The same graph with other names for all but its input and output."""

    def renamed(name: str) -> str:
        return name if name in ("", _IMAGES, _KEYPOINTS) else prefix + name

    for node in graph.node:
        node.name = prefix + node.name
        for names in (node.input, node.output):
            names[:] = [renamed(name) for name in names]
    for initializer in graph.initializer:
        initializer.name = renamed(initializer.name)
    return graph


def _check(source: Path, written: Path, net: Backbone | None) -> None:
    """Compare the files on a few faces; the one with two inputs is fed the keypoints that the other must find."""
    two, one = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (source, written)
    )
    images, _ = example_inputs(3, two.get_inputs()[0].shape[-1])
    if net is None:
        keypoints = torch.tensor(CANONICAL_KEYPOINTS).expand(len(images), -1, -1)
    else:
        with torch.no_grad(), eval_on_cpu(net):
            keypoints = net.find_keypoints(images)
    expected = two.run(None, {_IMAGES: images.numpy(), _KEYPOINTS: keypoints.numpy()})[0]
    cosine = smallest_cosine(one.run(None, {_IMAGES: images.numpy()})[0], expected)
    if not cosine >= MINIMAL_COSINE:
        raise ExportError(
            f"{source}: without its keypoints input the file gives other embeddings: cosine {cosine:.6f}, expected at "
            "least "
            f"{MINIMAL_COSINE}"
        )
