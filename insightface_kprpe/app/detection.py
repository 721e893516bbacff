"""Faces in a picture, by any detector: opened by name or file, and asked again with a border where it finds none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..deployment.detector_export import export_detector
from ..deployment.pack_sources import find_detector
from ..dfa import load_dfa
from ..dfa.weights import holds_dfa
from ..packs.layout import PackError
from ..packs.routing import stock_model
from .border import WithBorder, is_stripe
from .registration import register

_INPUT = (640, 640)  # of detectors that take any size, as FaceAnalysis has it


class Detected(NamedTuple):
    """The faces of a picture.

    Attributes:
        boxes: (N, 4) float32 x1, y1, x2, y2 in pixels of the picture.
        scores: (N,) float32 in [0, 1].
        landmarks_px: (N, 5, 2) float32.
        with_border: they were only found with a black border around the picture.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks_px: np.ndarray
    with_border: bool


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
    """The faces of a picture; where none has the score, those that are found with a border around it.

    Args:
        detector: of :func:`open_detector`, whose own threshold may be lower.
        image: (H, W, 3) uint8 BGR.
        threshold: score that one face must have, or a border is tried.
    """
    if is_stripe(image):
        return Detected(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty((0, 5, 2), np.float32), False)
    faces, landmarks = detector.detect(image)
    with_border = False
    if not (faces[:, 4] >= threshold).any():
        again = WithBorder(detector).detect(image)
        if len(again[0]) and (not len(faces) or again[0][:, 4].max() >= threshold):
            faces, landmarks, with_border = *again, True
    return Detected(faces[:, :4], faces[:, 4], landmarks, with_border)
