"""Host 1: the ``insightface`` package. What its model zoo makes of a file, and our classes in its place.

With :mod:`.face_aligner` the only module that imports ``insightface``. Nothing is patched before :func:`register` is
called.
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

from .deployment.detector_export import DFA_DETECTOR
from .deployment.onnx_export import read_metadata
from .face_aligner import FaceAligner
from .geometry import CANONICAL_KEYPOINTS, SCORE_THRESHOLD, align_face

logger = logging.getLogger(__name__)

# Where a pack keeps what only this package uses: the stock loader does not look into sub-folders. There lies the
# two-input twin of its recognition model, under the same name, and perhaps the aligner that refines keypoints.
KEYPOINT_FOLDER = "keypoints"
ALIGNER_FILE = "dfa.onnx"
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
    """A two-input KPRPE model as InsightFace's recognition model: the face's landmarks become its keypoints.

    Args:
        model_file: ONNX file with inputs ``images`` and ``keypoints``.
        session: an onnxruntime session of it.
        aligner: refines the detector's landmarks first; None: they are taken as they are.
    """

    def __init__(self, model_file: str, session, aligner: FaceAligner | None = None) -> None:
        super().__init__(model_file, session)
        self.keypoint_name = self.session.get_inputs()[1].name
        self.aligner = aligner

    def prepare(self, ctx_id: int, **kwargs) -> None:
        """Choose the device, as insightface does: the CPU where ``ctx_id`` is negative."""
        super().prepare(ctx_id, **kwargs)
        if self.aligner is not None:
            self.aligner.prepare(ctx_id)

    def get(self, img: np.ndarray, face) -> np.ndarray:
        """Embed one detected face; with an aligner, by ``face.dfa_kps`` where ``face.dfa_score`` is high enough.

        Args:
            img: (H, W, 3) uint8 BGR picture.
            face: insightface's ``Face`` with ``kps`` (5, 2) in pixels of ``img``, or with an aligner ``bbox``.

        Returns:
            (D,) float32, also stored as ``face.embedding``.

        Raises:
            ValueError: the face has no landmarks.
        """
        landmarks = face.kps
        if self.aligner is not None:
            refined = self.aligner.get(img, face)
            landmarks = refined if face.dfa_score >= SCORE_THRESHOLD or landmarks is None else landmarks
        if landmarks is None:
            raise ValueError("face.kps must be (5, 2) landmarks, got None; the pack's detector gives no landmarks")
        crop, keypoints = align_face(img, landmarks, self.input_size[0])
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
    """The stock ``get_model``, except that our own files get :class:`KeypointRecognizer` and :class:`FaceAligner`."""
    path = Path(str(name)).expanduser()
    if path.suffix != ".onnx" or not path.is_file() or kwargs.get("model_task") is not None:
        return _stock_get_model(name, **kwargs)
    metadata = read_metadata(path)
    if metadata.get("detector") == DFA_DETECTOR:
        return FaceAligner(str(path), _session(path, kwargs))
    inputs = metadata.get("inputs")
    folder = path.parent / KEYPOINT_FOLDER
    twin = path if inputs == "images+keypoints" else folder / path.name
    if inputs is None or not twin.is_file():
        return _stock_get_model(name, **kwargs)
    aligner = folder / ALIGNER_FILE
    refiner = FaceAligner(str(aligner), _session(aligner, kwargs)) if aligner.is_file() else None
    logger.info("%s: keypoint-relative recognition from %s", path.name, twin)
    return KeypointRecognizer(str(twin), _session(twin, kwargs), refiner)


def _session(path: Path, kwargs: dict) -> PickableInferenceSession:
    """An onnxruntime session with those of ``get_model``'s arguments that are meant for it."""
    given = {key: kwargs[key] for key in _SESSION_ARGUMENTS if kwargs.get(key) is not None}
    return PickableInferenceSession(str(path), **given)


def register() -> None:
    """Make ``FaceAnalysis`` and ``insightface.model_zoo`` use the classes of this package for files exported by it.

    A two-input recognition model becomes a :class:`KeypointRecognizer`, a DFA a :class:`FaceAligner`.

    Other models are loaded as before. Calling it twice does no harm; :func:`unregister` takes it back.
    """
    zoo_module.get_model = zoo.get_model = _get_model


def unregister() -> None:
    """Restore the stock model zoo; models loaded before keep working."""
    zoo_module.get_model = zoo.get_model = _stock_get_model
