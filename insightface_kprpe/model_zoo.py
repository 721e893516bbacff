"""Host 1: the ``insightface`` package. What its model zoo makes of a file, and our recogniser in its place.

The only module that imports ``insightface``. Nothing is patched before :func:`register` is called.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import cv2
import insightface.model_zoo as zoo
import numpy as np
from insightface.model_zoo import model_zoo as zoo_module
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.model_zoo.model_zoo import PickableInferenceSession

from .deployment.onnx_export import read_metadata
from .geometry import CANONICAL_KEYPOINTS, align_face

logger = logging.getLogger(__name__)

# Where a pack keeps the two-input twin of its recognition model: the stock loader does not look into sub-folders.
KEYPOINT_FOLDER = "keypoints"
_SESSION_ARGUMENTS = ("providers", "provider_options", "sess_options")
_stock_get_model = zoo_module.get_model


class Route(NamedTuple):
    """What the stock model zoo makes of an ONNX file."""

    task: str | None  # "detection", "recognition", ...; None: the file is ignored
    kind: str  # name of insightface's class
    input_mean: float
    input_std: float
    outputs: int


def stock_model(path: str | Path):
    """What the stock ``insightface.model_zoo`` makes of an ONNX file, on the CPU; None if it ignores it."""
    return _stock_get_model(str(path), providers=["CPUExecutionProvider"])


def stock_route(path: str | Path) -> Route:
    """Load a file through the stock ``insightface.model_zoo`` and say what it was taken for."""
    model = stock_model(path)
    if model is None:
        return Route(None, "nothing", 0.0, 0.0, 0)
    return Route(
        model.taskname, type(model).__name__, model.input_mean, model.input_std, len(model.session.get_outputs())
    )


class KeypointRecognizer(ArcFaceONNX):
    """A two-input KPRPE model as InsightFace's recognition model: ``face.kps`` become its keypoints.

    Args:
        model_file: ONNX file with inputs ``images`` and ``keypoints``.
        session: an onnxruntime session of it.
    """

    def __init__(self, model_file: str, session) -> None:
        super().__init__(model_file, session)
        self.keypoint_name = self.session.get_inputs()[1].name

    def get(self, img: np.ndarray, face) -> np.ndarray:
        """Embed one detected face.

        Args:
            img: (H, W, 3) uint8 BGR picture.
            face: insightface's ``Face`` with ``kps`` (5, 2) in pixels of ``img``.

        Returns:
            (D,) float32, also stored as ``face.embedding``.

        Raises:
            ValueError: the face has no landmarks.
        """
        if face.kps is None:
            raise ValueError("face.kps must be (5, 2) landmarks, got None; the pack's detector gives no landmarks")
        crop, keypoints = align_face(img, face.kps, self.input_size[0])
        face.embedding = self.get_feat(crop, keypoints[None]).flatten()
        return face.embedding

    def get_feat(self, imgs: np.ndarray | list[np.ndarray], keypoints: np.ndarray | None = None) -> np.ndarray:
        """Embed aligned crops.

        Args:
            imgs: one (112, 112, 3) uint8 BGR crop or a list of B.
            keypoints: (B, 5, 2) in [0, 1] of the crops; None: the canonical template.

        Returns:
            (B, D) float32.
        """
        imgs = imgs if isinstance(imgs, list) else [imgs]
        if keypoints is None:
            keypoints = np.repeat(CANONICAL_KEYPOINTS[None], len(imgs), axis=0)
        mean = (self.input_mean,) * 3
        blob = cv2.dnn.blobFromImages(imgs, 1.0 / self.input_std, self.input_size, mean, swapRB=True)
        feeds = {self.input_name: blob, self.keypoint_name: np.asarray(keypoints, dtype=np.float32)}
        return self.session.run(self.output_names, feeds)[0]


def _get_model(name, **kwargs):
    """The stock ``get_model``, except that our recognition files get :class:`KeypointRecognizer`."""
    path = Path(str(name)).expanduser()
    if path.suffix != ".onnx" or not path.is_file() or kwargs.get("model_task") is not None:
        return _stock_get_model(name, **kwargs)
    inputs = read_metadata(path).get("inputs")
    twin = path if inputs == "images+keypoints" else path.parent / KEYPOINT_FOLDER / path.name
    if inputs is None or not twin.is_file():
        return _stock_get_model(name, **kwargs)
    session_arguments = {key: kwargs[key] for key in _SESSION_ARGUMENTS if kwargs.get(key) is not None}
    logger.info("%s: keypoint-relative recognition from %s", path.name, twin)
    return KeypointRecognizer(str(twin), PickableInferenceSession(str(twin), **session_arguments))


def register() -> None:
    """Make ``FaceAnalysis`` and ``insightface.model_zoo`` use keypoints in models exported by this package.

    Other models are loaded as before. Calling it twice does no harm; :func:`unregister` takes it back.
    """
    zoo_module.get_model = zoo.get_model = _get_model


def unregister() -> None:
    """Restore the stock model zoo; models loaded before keep working."""
    zoo_module.get_model = zoo.get_model = _stock_get_model
