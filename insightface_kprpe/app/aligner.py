"""A DFA in ONNX as a model of the ``insightface`` package: detector of crops, batch aligner, refiner of keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from insightface.model_zoo.scrfd import SCRFD

from ..data.face_dataset import to_network_input
from ..dfa.aligner import canonical_keypoints, fit_to_square, square_to_crop
from ..dfa.anchors import STRIDES
from ..geometry import CANONICAL_KEYPOINTS, align_face, estimate_alignment, transform_points, warp_smoothly

MIN_SIDE = 8  # pixels; five points of a smaller face are less than two pixels apart
BOX_PADDING = 0.1  # on every side, as a fraction of the box's longer side: how the network saw faces in training
_ALIGNED_SIZE = 112
_WARP_LIMIT = 32_000  # pixels; OpenCV cannot warp a picture with a side above 32,766
_STRIDE = STRIDES[0]  # the file's only face is the first anchor of the finest level


class AlignedCrops(NamedTuple):
    """One face per crop; without a face, the canonical keypoints, the whole crop as box, and score 0.

    Attributes:
        keypoints: (B, 5, 2) float32 xy in [0, 1] of each crop.
        score: (B,) float32 in [0, 1].
        bbox: (B, 4) float32 x1, y1, x2, y2 in [0, 1] of each crop; a face cut by the crop's edge reaches beyond.
        aligned: (B, 112, 112, 3) uint8 BGR, the faces moved onto the template.
        aligned_keypoints: (B, 5, 2) float32 xy in [0, 1] of the aligned crops.
    """

    keypoints: np.ndarray
    score: np.ndarray
    bbox: np.ndarray
    aligned: np.ndarray
    aligned_keypoints: np.ndarray


class FaceAligner(SCRFD):
    """What ``insightface.model_zoo.get_model("dfa.onnx")`` returns after ``register()``.

    As a pack's detector it behaves like SCRFD for crops of one face; it also aligns crops in batches, and refines the
    keypoints of faces found by another detector.

    Args:
        model_file: written by ``export_detector`` from a DFA.
        session: an onnxruntime session of it.
    """

    def detect(self, img: np.ndarray, *args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
        """The face of a crop, in SCRFD's format; none if the crop is empty, below ``MIN_SIDE`` or a thin strip.

        Args:
            img: (H, W, 3) uint8 BGR.

        Returns:
            (N, 5) float32 x1, y1, x2, y2, score and (N, 5, 2) float32 landmarks, in pixels; N is 0 or 1.
        """
        short, long = sorted(img.shape[:2])
        if short < MIN_SIDE or long > short * self.static_input_size[0]:
            return np.empty((0, 5), np.float32), np.empty((0, 5, 2), np.float32)
        return super().detect(img, *args, **kwargs)

    def align(self, crops: Sequence[np.ndarray], batch_size: int = 64) -> AlignedCrops:
        """Find and align the face of each crop; gives the same numbers as ``DFA()(crop)``.

        Args:
            crops: (H, W, 3) uint8 BGR each, of any sizes; one that is empty or below ``MIN_SIDE`` has no face.
            batch_size: crops per forward pass.

        Raises:
            ValueError: a crop has another shape or type.
        """
        keypoints, score, bbox = _no_faces([crop.shape[1::-1] for crop in map(_checked, crops)])
        large = [i for i, crop in enumerate(crops) if min(crop.shape[:2]) >= MIN_SIDE]
        for start in range(0, len(large), batch_size):
            batch = large[start : start + batch_size]
            squares = torch.cat([fit_to_square(_to_tensor(crops[i]), self.static_input_size[0]) for i in batch])
            for i, *face in zip(batch, *self._run(squares), strict=True):
                if face[1] > 0:
                    height, width = crops[i].shape[:2]
                    keypoints[i] = square_to_crop(face[0], width, height, 0.0)
                    bbox[i] = square_to_crop(face[2].view(2, 2), width, height, 0.0).flatten()
                    score[i] = face[1]
        aligned = [_align(crop, points) for crop, points in zip(crops, keypoints, strict=True)]
        empty = np.empty((0, _ALIGNED_SIZE, _ALIGNED_SIZE, 3), np.uint8), np.empty((0, 5, 2), np.float32)
        return AlignedCrops(keypoints, score, bbox, *(map(np.stack, zip(*aligned, strict=True)) if aligned else empty))

    def get(self, img: np.ndarray, face) -> np.ndarray:
        """Refine the keypoints of one face, as insightface calls it; see :meth:`refine`.

        Returns:
            ``face.dfa_kps``.
        """
        self.refine(img, [face])
        return face.dfa_kps

    def refine(self, img: np.ndarray, faces: Sequence) -> None:
        """Find the keypoints of faces that another detector has found.

        Each face gets ``dfa_kps``, (5, 2) float32 in pixels of the image, and ``dfa_score``, float in [0, 1]; where
        DFA sees no face, the score is 0 and ``dfa_kps`` the template in the middle of the box.

        Args:
            img: (H, W, 3) uint8 BGR image.
            faces: insightface's ``Face`` with ``bbox``, x1, y1, x2, y2 in pixels of ``img``.
        """
        self.refine_all([(img, face) for face in faces])

    def refine_all(self, faces: Sequence[tuple[np.ndarray, Any]]) -> None:
        """What :meth:`refine` does, for faces of several images in few forward passes.

        Args:
            faces: pairs of image and face.
        """
        size = self.static_input_size[0]
        cut = [cut_box(img, face.bbox, size, BOX_PADDING, MIN_SIDE) for img, face in faces]
        found = self.align([crop for crop, _ in cut])
        for (_, face), (_, matrix), keypoints, score in zip(faces, cut, found.keypoints, found.score, strict=True):
            face.dfa_kps = ((keypoints * size - matrix[:, 2]) / matrix[0, 0]).astype(np.float32)
            face.dfa_score = float(score)

    def _run(self, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) RGB in [-1, 1] -> keypoints (B, 5, 2), score (B,) and bbox (B, 4) in [0, 1] of the squares."""
        blob = (squares * (127.5 / self.input_std)).numpy()
        names = [name for name in self.output_names if name.endswith(f"_{_STRIDE}")]
        outputs = self.session.run(names, {self.input_name: blob})
        score, distances, offsets = (torch.from_numpy(output[:, 0]) for output in outputs)
        unit = _STRIDE / squares.shape[-1]
        bbox = torch.cat([-distances[:, :2], distances[:, 2:]], 1) * unit
        return offsets.view(-1, 5, 2) * unit, score[:, 0], bbox


def _checked(crop: np.ndarray) -> np.ndarray:
    if not isinstance(crop, np.ndarray) or crop.ndim != 3 or crop.shape[2] != 3 or crop.dtype != np.uint8:
        got = f"{crop.shape} {crop.dtype}" if isinstance(crop, np.ndarray) else type(crop).__name__
        raise ValueError(f"crops must be a list of (H, W, 3) uint8 BGR arrays, got one that is {got}")
    return crop


def _no_faces(sizes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keypoints, scores and boxes of crops (width, height) in which there is no face."""
    keypoints = np.empty((len(sizes), 5, 2), np.float32)
    for points, (width, height) in zip(keypoints, sizes, strict=True):
        points[:] = canonical_keypoints(max(width, 1), max(height, 1))
    return keypoints, np.zeros(len(sizes), np.float32), np.tile(np.float32([0, 0, 1, 1]), (len(sizes), 1))


def _to_tensor(crop: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 BGR -> (1, 3, H, W) float RGB in [-1, 1]."""
    return to_network_input(torch.from_numpy(crop[..., ::-1].copy()).permute(2, 0, 1)[None])


def _align(crop: np.ndarray, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The aligned crop and its keypoints; black where there is nothing to align."""
    if not crop.size:
        return np.zeros((_ALIGNED_SIZE, _ALIGNED_SIZE, 3), np.uint8), CANONICAL_KEYPOINTS
    return align_face(crop, keypoints * crop.shape[1::-1], _ALIGNED_SIZE)


def cut_box(
    img: np.ndarray, bbox: np.ndarray, size: int, padding: float = 0.0, min_side: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square around a face's box, without turning it.

    Args:
        img: (H, W, 3) uint8 image.
        bbox: x1, y1, x2, y2 in pixels of ``img``.
        size: side of the result in pixels.
        padding: on every side, as a fraction of the box's longer side.
        min_side: a box with a shorter side than this, in pixels, gives black.

    Returns:
        The (size, size, 3) uint8 crop, black outside the image, and the (2, 3) matrix from image to crop.
    """
    x1, y1, x2, y2 = np.asarray(bbox, dtype=np.float64)[:4]
    width, height = x2 - x1, y2 - y1
    side = max(width, height, 1.0) * (1 + 2 * padding)
    scale = size / side
    left, top = (x1 + x2 - side) / 2, (y1 + y2 - side) / 2
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    if not min(width, height) >= min_side:
        return np.zeros((size, size, 3), np.uint8), matrix
    # Only the region near the face, as averaging down a large image takes time.
    column, row = max(0, int(left) - 2), max(0, int(top) - 2)
    near = img[row : max(0, int(top + side) + 2), column : max(0, int(left + side) + 2)]
    if not near.size:
        return np.zeros((size, size, 3), np.uint8), matrix
    near_matrix = np.column_stack([matrix[:, :2], matrix[:, 2] + scale * np.array([column, row])])
    return warp_smoothly(near, near_matrix, size), matrix


def cut_aligned(img: np.ndarray, landmarks_px: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Move a face onto the template, as InsightFace does; also out of pictures that are too large for OpenCV to warp.

    Args:
        img: (H, W, 3) uint8 picture.
        landmarks_px: (5, 2) in pixels of ``img``.
        size: side of the result in pixels.

    Returns:
        The (size, size, 3) uint8 crop, black outside the picture, and its (5, 2) float32 keypoints in [0, 1].
    """
    return align_face(*_near(img, landmarks_px, size), size)


def _near(img: np.ndarray, landmarks: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a picture too large for OpenCV to warp, the part that the aligned crop shows, and the landmarks in it."""
    if max(img.shape[:2]) <= _WARP_LIMIT:
        return img, landmarks
    matrix = np.vstack([estimate_alignment(landmarks, size), [0, 0, 1]])
    corners = transform_points(size * np.array([[0, 0], [1, 0], [0, 1], [1, 1]]), np.linalg.inv(matrix)[:2])
    left, top = np.maximum(corners.min(0).astype(int) - 2, 0)
    right, bottom = np.maximum(corners.max(0).astype(int) + 3, (left + 1, top + 1))
    part = img[top:bottom, left:right]
    return (part if part.size else img[:1, :1]), landmarks - np.array([left, top])
