"""Landmark networks -> ONNX in the layout of InsightFace's SCRFD, so that the stock model zoo takes them for detectors.

Nine outputs: scores (A, 1), boxes (A, 4) and landmarks (A, 10) of the strides 8, 16 and 32. A box is given as the
distances from an anchor's corner point (column * stride, row * stride) to its left, top, right and bottom side, and a
landmark as its offset from that point; all in strides. Input is (1, 3, S, S) RGB, (pixel - 127.5) / 128.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
import torch.nn as nn

from ..dfa.anchors import STRIDES, decode_boxes, decode_points
from ..dfa.network import ANCHORS_PER_CELL, RetinaFaceNet
from ..files import atomic_path
from .onnx_export import METADATA_PREFIX, OPSET

_SCRFD_STD, _OUR_STD = 128.0, 127.5


class ScrfdLayout(nn.Module):
    """A :class:`RetinaFaceNet` that speaks as SCRFD does: one face or many, every anchor for itself.

    Args:
        net: without aggregator.
    """

    def __init__(self, net: RetinaFaceNet) -> None:
        super().__init__()
        self.net = net
        corners, strides = [], []
        for stride in STRIDES:
            cells = -(-net.image_size // stride)
            y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
            corner = torch.stack([x, y], -1).reshape(-1, 1, 2) * stride
            corners.append(corner.expand(-1, ANCHORS_PER_CELL, -1).reshape(-1, 2))
            strides.append(torch.full((len(corners[-1]), 1), stride))
        self.anchors_per_stride = [len(corner) for corner in corners]
        self.register_buffer("corners", torch.cat(corners).float(), persistent=False)
        self.register_buffer("strides", torch.cat(strides).float(), persistent=False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(1, 3, S, S) RGB, (pixel - 127.5) / 128 -> the nine outputs."""
        out = self.net(image.flip(1) * (_SCRFD_STD / _OUR_STD))
        side, anchors = self.net.image_size, self.net.anchors
        scores = out.class_logits.softmax(-1)[0, :, 1:]
        boxes = decode_boxes(out.bbox_regression, anchors)[0] * side
        points = decode_points(out.landmark_regression, anchors)[0] * side
        distances = torch.cat([self.corners - boxes[:, :2], boxes[:, 2:] - self.corners], 1) / self.strides
        offsets = (points - self.corners.repeat(1, 5)) / self.strides
        split = self.anchors_per_stride
        return (*scores.split(split), *distances.split(split), *offsets.split(split))


def export_detector(net: RetinaFaceNet, path: str | Path, licence: str = "unknown") -> Path:
    """Write a face detector that ``insightface.model_zoo.get_model(path)`` loads.

    Args:
        net: without aggregator; ``net.image_size`` is the fixed side of the input.
        path: ONNX file; appears only when whole.
        licence: of the weights, stored in the file.
    """
    layout = ScrfdLayout(net).eval()
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    example = torch.zeros(1, 3, net.image_size, net.image_size)
    with atomic_path(path) as temporary:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                layout, (example,), dynamo=True, input_names=["image"], output_names=names,
                opset_version=OPSET, verbose=False,
            )  # fmt: skip
        model = program.model_proto
        for key, value in {"inputs": "image", "task": "detection", "licence": licence}.items():
            model.metadata_props.add(key=METADATA_PREFIX + key, value=value)
        onnx.save(model, str(temporary))
    return Path(path)
