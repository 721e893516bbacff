"""Faces in a picture, by any detector, opened by name or file, and asked again about faces that it overlooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..deployment.detector_export import export_detector
from ..deployment.pack_sources import find_detector
from ..dfa import load_dfa
from ..dfa.weights import holds_dfa
from ..packs.layout import PackError
from ..packs.routing import stock_model
from .border import WithBorder, is_stripe
from .registration import register

_OVERLAP = 0.4  # of the union, from which on two boxes are of one face, as insightface has it
_INPUT = (640, 640)  # of detectors that take any size, as FaceAnalysis has it


class Detected(NamedTuple):
    """The faces of a picture.

    Attributes:
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the picture.
        scores: (N,) float32 in [0, 1].
        landmarks_px: (N, 5, 2) float32.
        with_border: (N,) bool, found with a black border around the picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks_px: np.ndarray
    with_border: np.ndarray


def detector_file(detector: str | Path, root: str | Path, cache: Path) -> Path:
    """The ONNX file of a detector with landmarks.

    Args:
        detector: an ONNX file of SCRFD's layout, the name or folder of a pack, or a DFA: weights, or the output folder
            of ``train-dfa``.
        root: InsightFace's root folder, where named packs are.
        cache: ONNX file to write, where the detector is a DFA that was not exported yet.

    Raises:
        PackError: there is none, or it gives no landmarks.
    """
    path = Path(detector).expanduser()
    if path.suffix != ".onnx" and holds_dfa(path):
        return export_detector(load_dfa(path), cache)
    path = find_detector(detector, root).path
    model = stock_model(path)
    if getattr(model, "taskname", None) != "detection" or not getattr(model, "use_kps", False):
        raise PackError(f"detector must be one that finds faces and their landmarks (SCRFD, or a DFA), {path} is not")
    return path


def open_detector(path: Path, threshold: float, threads: int | None = None) -> Any:
    """A detector of insightface, ready to :func:`find_faces`.

    Args:
        path: of :func:`detector_file`.
        threshold: score from which on it tells of a face.
        threads: of onnxruntime; None: as it likes.
    """
    import onnxruntime
    from insightface.model_zoo import model_zoo

    register()
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    detector = model_zoo.get_model(str(path), sess_options=options)
    detector.prepare(0, det_thresh=threshold, input_size=_INPUT)
    return detector


def find_faces(detector: Any, image: np.ndarray, threshold: float = 0.0) -> Detected:
    """The faces of a picture, also one that nearly fills it, which detectors overlook: they see it too large.

    Such a face lies over the middle of the picture. Where no face that counts does, the picture is looked at again with
    a border around it, and of what overlaps the higher score stays.

    Args:
        detector: of :func:`open_detector`, whose own threshold may be lower.
        image: (H, W, 3) uint8 BGR.
        threshold: score from which on a face counts.
    """
    if is_stripe(image):
        return Detected(*(np.empty(shape, np.float32) for shape in ((0, 4), 0, (0, 5, 2))), np.empty(0, bool))
    faces, landmarks = detector.detect(image)
    with_border = np.zeros(len(faces), bool)
    if not _over_the_middle(faces[faces[:, 4] >= threshold], image):
        wider, points = WithBorder(detector).detect(image)
        with_border = np.repeat([False, True], [len(faces), len(wider)])
        faces, landmarks = np.concatenate([faces, wider]), np.concatenate([landmarks, points])
        sides = np.column_stack([faces[:, :2], faces[:, 2:4] - faces[:, :2]])
        kept = np.array(cv2.dnn.NMSBoxes(sides.tolist(), faces[:, 4].tolist(), 0.0, _OVERLAP), int).reshape(-1)
        faces, landmarks, with_border = faces[kept], landmarks[kept], with_border[kept]
    return Detected(faces[:, :4], faces[:, 4], landmarks, with_border)


def _over_the_middle(faces: np.ndarray, image: np.ndarray) -> bool:
    """Whether the box of one of the faces has the middle of the picture in it."""
    x, y = image.shape[1] / 2, image.shape[0] / 2
    left, top, right, bottom = faces[:, :4].T
    return bool(((left <= x) & (x <= right) & (top <= y) & (y <= bottom)).any())
