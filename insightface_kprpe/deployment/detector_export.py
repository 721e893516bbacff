"""Landmark networks -> ONNX in the layout of InsightFace's SCRFD, so that the stock model zoo loads them as detectors.

Nine outputs: scores (A, 1), boxes (A, 4) and landmarks (A, 10) of the strides 8, 16 and 32. A box is given as the
distances from an anchor's corner point (column * stride, row * stride) to its left, top, right and bottom side, and a
landmark as its offset from that point; all in strides. Input is RGB, (pixel - 127.5) / 128: an image of any size that
the loader has shrunk or enlarged to fit into the square, black on the right or at the bottom.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..data.synthetic import SyntheticFaces
from ..dfa.aligner import DFA
from ..dfa.anchors import STRIDES, decode_boxes, decode_points
from ..dfa.network import ANCHORS_PER_CELL, RetinaFaceNet
from ..files import atomic_path
from ..packs.metadata import DFA_DETECTOR
from .onnx_export import ExportError, check_exportable, eval_on_cpu, save_graph

_SCRFD_STD, _OUR_STD = 128.0, 127.5
_NAMES = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
NO_FACE = -1.0  # a score below every threshold, 0 included

# What an image must have to show a face; on 8-bit pixels the first is 2.5 of 255.
MIN_CONTRAST = 0.02  # standard deviation of its pixels in [-1, 1]
# A file cannot know how many pixels a crop had before the loader enlarged it, but a handful of them leave a smear with
# hardly more detail than a thumbnail of 16x16. Of real faces that were shrunk first, this refuses 99 % at 5 pixels and
# fewer, 25 % at 8, 2 % at 12 and none at 20; and none of TinyFace's.
MIN_DETAIL = 0.035  # mean absolute difference from the thumbnail, as a fraction of the standard deviation
THUMBNAIL = 16  # pixels
TOLERANCE = 0.5  # pixels between the file's landmarks and torch's


class ScrfdLayout(nn.Module):
    """A :class:`RetinaFaceNet` with SCRFD's interface: one face or many, every anchor on its own.

    Args:
        net: without aggregator.
    """

    def __init__(self, net: RetinaFaceNet) -> None:
        super().__init__()
        self.net = net
        corners, strides = [], []
        for stride, count in zip(STRIDES, _anchors_per_stride(net.image_size), strict=True):
            cells = net.image_size // stride
            y, x = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
            corner = torch.stack([x, y], -1).reshape(-1, 1, 2) * stride
            corners.append(corner.expand(-1, ANCHORS_PER_CELL, -1).reshape(-1, 2))
            strides.append(torch.full((count, 1), stride))
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
        split = _anchors_per_stride(side)
        return (*scores.split(split), *distances.split(split), *offsets.split(split))


class OneFaceLayout(nn.Module):
    """A :class:`DFA` with SCRFD's interface: its one face is the first anchor, all others have none.

    The loader puts the image in the upper left corner of the square; it is first moved to the middle, where DFA expects
    it and puts crops itself.

    Args:
        dfa: the aligner.
    """

    def __init__(self, dfa: DFA) -> None:
        super().__init__()
        self.dfa = dfa

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, 3, S, S) RGB, (pixel - 127.5) / 128 -> the nine outputs, each (B, A, 1, 4 or 10)."""
        side = self.dfa.image_size
        images = images * (_SCRFD_STD / _OUR_STD)
        brightest = torch.stack([images.amax((1, 2)), images.amax((1, 3))], 1)  # (B, 2, S) of columns and rows
        start, stop = _extent(brightest > -1 + 1 / _OUR_STD)  # (B, 2) each; the loader's black is exactly -1
        offset = torch.where(start == 0, (side - stop) // 2, 0)  # the loader pads at the end, never at the start
        centered = _shift(images, offset)
        keypoints, score, bbox = self.dfa.locate(centered)
        points = keypoints * side - offset[:, None]
        corners = bbox.unflatten(1, (2, 2)) * side - offset[:, None]
        score = torch.where(has_detail(images, start, stop) & (score > 0), score, NO_FACE)
        # The first anchor's point is the origin.
        distances = torch.cat([-corners[:, 0], corners[:, 1]], 1) / STRIDES[0]
        face = (score[:, None], distances, points.flatten(1) / STRIDES[0])
        return tuple(
            _level(values, empty, stride, count)
            for values, empty in zip(face, (NO_FACE, 0.0, 0.0), strict=True)
            for stride, count in zip(STRIDES, _anchors_per_stride(side), strict=True)
        )


def _level(values: torch.Tensor, empty: float, stride: int, count: int) -> torch.Tensor:
    """(B, count, D) of one stride: all anchors are empty, except for the first of all, which has the (B, D) values."""
    rows = torch.full_like(values, empty)[:, None].expand(-1, count, -1)
    return torch.cat([values[:, None], rows[:, 1:]], 1) if stride == STRIDES[0] else rows


def _anchors_per_stride(side: int) -> list[int]:
    return [(side // stride) ** 2 * ANCHORS_PER_CELL for stride in STRIDES]


def _extent(filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the image in a square starts and stops.

    Args:
        filled: (..., S) bool, which columns (or rows) are not all black.

    Returns:
        Two (...) int64 in 0 to S: the first filled one, and the one after the last; S and 0 if all is black.
    """
    side = filled.shape[-1]
    places = torch.arange(side, device=filled.device)
    return torch.where(filled, places, side).amin(-1), torch.where(filled, places + 1, 0).amax(-1)


def _shift(images: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Each image moved right and down by its (B, 2) pixels; the black that leaves there enters on the other side.

    Pixels are moved once for both axes, as they are moved one by one.
    """
    side = images.shape[-1]
    places = torch.arange(side, device=images.device) - offset[..., None]  # (B, 2, S)
    column, row = torch.where(places < 0, places + side, places).unbind(1)
    place = (row[:, :, None] * side + column[:, None]).flatten(1)
    return images.flatten(2).gather(2, place[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def has_detail(images: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    """Whether there is more than a plain color (``MIN_CONTRAST``) or a smear (``MIN_DETAIL``).

    Args:
        images: (B, 3, S, S) float in [-1, 1].
        start: (B, 2) first column and row of the image in the square.
        stop: (B, 2) the ones after its last.

    Returns:
        (B,) bool.
    """
    side = images.shape[-1]
    cell = side // THUMBNAIL
    thumbnail = F.interpolate(F.avg_pool2d(images, cell), size=(side, side), mode="bilinear")
    # Two cells away from the black around the image, its edge no longer counts as detail of the thumbnail.
    start = torch.where(start > 0, start + 2 * cell, 0)[..., None]
    stop = torch.where(stop < side, stop - 2 * cell, side)[..., None]
    places = torch.arange(side, device=images.device)
    inside = (places >= start) & (places < stop)  # (B, 2, S)
    weight = (inside[:, :1, None] & inside[:, 1:, :, None]).to(images).expand_as(images)
    count = weight.sum((1, 2, 3)).clamp_min(1)
    mean = (images * weight).sum((1, 2, 3), keepdim=True) / count[:, None, None, None]
    contrast = ((images - mean).square() * weight).sum((1, 2, 3)).div(count).sqrt()
    detail = ((images - thumbnail).abs() * weight).sum((1, 2, 3)) / count
    return (contrast > MIN_CONTRAST) & (detail > MIN_DETAIL * contrast)


def export_detector(net: RetinaFaceNet, path: str | Path, licence: str = "unknown") -> Path:
    """Write a face detector that ``insightface.model_zoo.get_model(path)`` loads.

    Args:
        net: a :class:`DFA`, which finds the one face of a crop (dynamic batch), or a plain network without aggregator,
            which finds the faces of an image (batch 1). ``net.image_size`` is the fixed side of the input.
        path: ONNX file; appears only when complete and, for a DFA, only if it finds what torch finds.
        licence: of the weights, stored in the file.

    Returns:
        ``path``.

    Raises:
        ValueError: the side is not a multiple of 32, a plain network has an aggregator, or it is wrapped or not in
            float32.
        ExportError: the file's landmarks differ from torch's.
    """
    check_exportable(net, RetinaFaceNet)
    one_face = isinstance(net, DFA)
    if net.image_size % STRIDES[-1]:
        raise ValueError(f"net.image_size must be a multiple of {STRIDES[-1]} for SCRFD's layout, got {net.image_size}")
    if net.aggregator is not None and not one_face:
        raise ValueError("net must be a DFA, or a RetinaFaceNet with aggregator=False, got one with an aggregator")
    metadata = {"inputs": "image", "task": "detection", "detector": DFA_DETECTOR if one_face else "retinaface"}
    metadata |= {"keypoint_source": "dfa"} if one_face else {}
    with eval_on_cpu(net), atomic_path(path) as temporary:
        layout = (OneFaceLayout(net) if one_face else ScrfdLayout(net)).eval()
        example = torch.zeros(2 if one_face else 1, 3, net.image_size, net.image_size)
        save_graph(layout, (example,), temporary, ["image"], _NAMES, metadata | {"licence": licence}, one_face)
        difference = _difference(net, temporary) if one_face else 0.0
        if not difference <= TOLERANCE:
            raise ExportError(f"landmarks differ from torch by {difference:.2f} pixels, expected at most {TOLERANCE}")
    return Path(path)


def _difference(dfa: DFA, path: Path) -> float:
    """The largest difference, in pixels, of a file's landmarks from torch's, on some drawn faces."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    side = dfa.image_size
    drawn = SyntheticFaces(4, 1, aligned=False, size=side)
    pixels = torch.from_numpy(np.stack([drawn[i][0] for i in range(4)])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected, _, _ = dfa.locate(pixels / _OUR_STD - 1)
    feeds = {"image": ((pixels - 127.5) / _SCRFD_STD).numpy()}
    found = session.run([f"kps_{STRIDES[0]}"], feeds)[0][:, 0].reshape(-1, 5, 2) * STRIDES[0]
    return float(np.abs(found - expected.numpy() * side).max())
