"""Host 1: the ``insightface`` package. What its model zoo makes of a file, and our classes in its place.

With :mod:`.face_aligner` and :mod:`.face_analysis` the only module that imports ``insightface``. Nothing is patched
before :func:`register` is called.
"""

from __future__ import annotations

import copyreg
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import insightface.model_zoo as zoo
import numpy as np
from insightface.app import FaceAnalysis
from insightface.model_zoo import model_zoo as zoo_module
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.model_zoo.model_zoo import PickableInferenceSession

from .app import face_analysis
from .app.face_aligner import FaceAligner, cut_box
from .app.pictures import as_bgr
from .deployment.detector_export import DFA_DETECTOR
from .deployment.installed_packs import load_note
from .deployment.onnx_export import read_metadata
from .deployment.providers import check_session, settle_providers
from .evaluation.fusion import landmark_weights
from .geometry import CANONICAL_KEYPOINTS, SCORE_THRESHOLD, align_face, estimate_alignment, transform_points

logger = logging.getLogger(__name__)

# Where a pack keeps what only this package uses: the stock loader does not look into sub-folders. There lies the
# two-input twin of its recognition model, under the same name, and perhaps the aligner that refines keypoints.
KEYPOINT_FOLDER = "keypoints"
ALIGNER_FILE = "dfa.onnx"
_WARP_LIMIT = 32_000  # pixels; OpenCV cannot warp a picture with a side above 32,766
_SESSION_ARGUMENTS = ("providers", "provider_options", "sess_options")
_stock_get_model = zoo_module.get_model
_stock_get = FaceAnalysis.get


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

    Safe to call from several threads, and picklable (the session is opened again from its file).

    Args:
        model_file: ONNX file with inputs ``images`` and ``keypoints``.
        session: an onnxruntime session of it.
        aligner: refines the detector's landmarks first; None: they are taken as they are.
        aligned: True: faces are turned onto the template. False: the network sees the square around the detector's
            box as it is, and the landmarks in it (the paper's second way).
    """

    def __init__(self, model_file: str, session, aligner: FaceAligner | None = None, aligned: bool = True) -> None:
        super().__init__(model_file, session)
        # The parent guesses from the names of nodes whether the file normalises pixels itself; ours say it.
        metadata = read_metadata(model_file)
        self.input_mean = float(metadata.get("mean", self.input_mean))
        self.input_std = float(metadata.get("std", self.input_std))
        self.keypoint_name = self.session.get_inputs()[1].name
        self.aligner, self.aligned = aligner, aligned

    def prepare(self, ctx_id: int, **kwargs) -> None:
        """Choose the device, as insightface does: the CPU where ``ctx_id`` is negative."""
        super().prepare(ctx_id, **kwargs)
        if self.aligner is not None:
            self.aligner.prepare(ctx_id)

    def get(self, img: np.ndarray, face) -> np.ndarray:
        """Embed one detected face; see :meth:`embed_faces`.

        Returns:
            (D,) float32, also stored as ``face.embedding``.
        """
        self.embed_faces([(img, face)])
        return face.embedding

    def embed_faces(self, faces: Sequence[tuple[np.ndarray, Any]]) -> None:
        """Embed detected faces, of one picture or of many, in few runs of the network.

        Each face gets ``embedding``, (D,) float32, whose length ``embedding_norm`` tells, and ``quality``, float in
        [0, 1]: how close its keypoints are to the template's, times the score of its detector or aligner (paper,
        Eq. 17 and 18). With an aligner its landmarks are taken, ``dfa_kps``, where ``dfa_score`` is high enough.

        Args:
            faces: pairs of a picture, (H, W, 3) uint8 BGR or what :func:`~.pictures.as_bgr` takes, and insightface's
                ``Face`` with ``kps`` (5, 2) in pixels of it; with an aligner or ``aligned=False`` also ``bbox``.

        Raises:
            ValueError: a face is None or has no landmarks, or a picture is empty or none.
        """
        faces = [(as_bgr(img), _checked_face(face)) for img, face in faces]
        if any(not img.size for img, _ in faces):
            raise ValueError("image must have pixels where a face is to be embedded, got an empty one")
        if self.aligner is not None:
            self.aligner.refine_all(faces)
        crops, keypoints, scores = [], np.empty((len(faces), 5, 2), np.float32), np.empty(len(faces))
        for row, (img, face) in enumerate(faces):
            landmarks, scores[row] = self._landmarks(face)
            crop, keypoints[row] = self._crop(img, face, landmarks)
            crops.append(crop)
        qualities = landmark_weights(keypoints.clip(-1, 2), scores)  # beyond, a face counts nothing anyway
        for (_, face), embedding, quality in zip(faces, self.get_feat(crops, keypoints), qualities, strict=True):
            face.embedding, face.quality = embedding, float(quality)

    def get_feat(self, imgs: np.ndarray | Sequence[np.ndarray], keypoints: np.ndarray | None = None) -> np.ndarray:
        """Embed crops.

        Args:
            imgs: one (112, 112, 3) uint8 BGR crop or a list of B.
            keypoints: (B, 5, 2) in [0, 1] of the crops; None: the canonical template, for aligned crops.

        Returns:
            (B, D) float32.
        """
        imgs = [imgs] if isinstance(imgs, np.ndarray) and imgs.ndim == 3 else list(imgs)
        if keypoints is None:
            keypoints = np.repeat(CANONICAL_KEYPOINTS[None], len(imgs), axis=0)
        keypoints = face_analysis.check_keypoints(keypoints, len(imgs))
        rows = [self._run(imgs[part], keypoints[part]) for part in face_analysis.batches(len(imgs))]
        return np.concatenate(rows) if rows else np.empty((0, self.output_shape[-1]), np.float32)

    def embed_aligned(self, crops: Sequence[np.ndarray], keypoints: np.ndarray | None = None) -> np.ndarray:
        """Embed crops without a detector; see :func:`~.face_analysis.embed_aligned`."""
        return face_analysis.embed_crops(self, crops, keypoints)

    def _run(self, imgs: list[np.ndarray], keypoints: np.ndarray) -> np.ndarray:
        mean = (self.input_mean,) * 3
        blob = cv2.dnn.blobFromImages(imgs, 1.0 / self.input_std, self.input_size, mean, swapRB=True)
        return self.session.run(self.output_names, {self.input_name: blob, self.keypoint_name: keypoints})[0]

    def _landmarks(self, face) -> tuple[np.ndarray, float]:
        """Landmarks in pixels of the picture, and the score of who found them."""
        if self.aligner is not None and (face.dfa_score >= SCORE_THRESHOLD or face.kps is None):
            return face.dfa_kps, face.dfa_score
        if face.kps is None:
            raise ValueError("face.kps must be (5, 2) landmarks, got None; the pack's detector gives no landmarks")
        return face.kps, 1.0 if face.det_score is None else float(face.det_score)

    def _crop(self, img: np.ndarray, face, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the network sees of a face, and the landmarks in [0, 1] of it."""
        size = self.input_size[0]
        if self.aligned:
            return align_face(*_near(img, landmarks, size), size)
        crop, matrix = cut_box(img, face.bbox, size)
        return crop, (transform_points(landmarks, matrix) / size).astype(np.float32)


def _checked_face(face):
    if face is None:
        raise ValueError("face must be insightface's Face, got None; skip pictures in which no face was found")
    return face


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


def _get_model(name, **kwargs):
    """The stock ``get_model``, except that our own files get :class:`KeypointRecognizer` and :class:`FaceAligner`.

    It takes two more arguments: ``strict_providers`` (True: an execution provider that was asked for and is not there
    is an error), and ``aligned``, of :class:`KeypointRecognizer`.
    """
    aligned, strict = kwargs.pop("aligned", True), kwargs.pop("strict_providers", False)
    kwargs = settle_providers(kwargs, strict)
    path, stock = _file_of(name, kwargs), None
    if path is None:  # a pack's name or folder: let the stock loader find the file
        stock = _stock_get_model(name, **kwargs)
        if stock is None:
            return None
        path = Path(stock.model_file)
    ours = _our_model(path, kwargs, aligned)
    model = ours or stock or _stock_get_model(name, **kwargs)
    if not aligned and ours is None and getattr(model, "taskname", None) == "recognition":
        raise ValueError(f"aligned=False needs a recognition model with a keypoint input, {name} has none")
    if (session := getattr(model, "session", None)) is not None:
        check_session(session, kwargs.get("providers"), strict)
    return model


def _file_of(name, kwargs: dict[str, Any]) -> Path | None:
    """The ONNX file that ``get_model``'s arguments name outright: by its path, or through a manifest's entry."""
    descriptor = kwargs.get("model_descriptor")
    if descriptor is not None:
        from insightface.model_zoo.package_manifest import verify_model_artifact  # there since insightface 2.0

        return Path(verify_model_artifact(descriptor))
    path = Path(str(name)).expanduser()
    return path if path.suffix == ".onnx" and path.is_file() else None


def _our_model(path: Path, kwargs: dict[str, Any], aligned: bool) -> KeypointRecognizer | FaceAligner | None:
    """A model of this package for a file exported by it; None for others."""
    metadata = read_metadata(path)
    if metadata.get("detector") == DFA_DETECTOR:
        return FaceAligner(str(path), _session(path, kwargs))
    inputs = metadata.get("inputs")
    folder = path.parent / KEYPOINT_FOLDER
    twin = path if inputs == "images+keypoints" else folder / path.name
    if inputs is None or not twin.is_file():
        return None
    aligner = folder / ALIGNER_FILE
    refiner = FaceAligner(str(aligner), _session(aligner, kwargs)) if aligner.is_file() else None
    note = load_note(twin) or f"licence {metadata.get('licence', 'unknown')}"
    logger.info("%s: keypoint-relative recognition from %s (%s)", path.name, twin, note)
    return KeypointRecognizer(str(twin), _session(twin, kwargs), refiner, aligned)


def _session(path: Path, kwargs: dict[str, Any]) -> PickableInferenceSession:
    """An onnxruntime session with those of ``get_model``'s arguments that are meant for it."""
    given = {key: kwargs[key] for key in _SESSION_ARGUMENTS if kwargs.get(key) is not None}
    return PickableInferenceSession(str(path), **given)


def register() -> None:
    """Make ``FaceAnalysis`` and ``insightface.model_zoo`` use the classes of this package for files exported by it.

    A two-input recognition model becomes a :class:`KeypointRecognizer`, a DFA a :class:`FaceAligner`; ``FaceAnalysis``
    takes grey, BGRA and 16-bit pictures, ``aligned`` and ``strict_providers``, and gets the methods ``get_batch`` and
    ``embed_aligned`` (:mod:`.face_analysis`). Other models are loaded as before. Calling it twice does no harm;
    :func:`unregister` takes it back.
    """
    zoo_module.get_model = zoo.get_model = _get_model
    FaceAnalysis.get = functools.wraps(_stock_get)(face_analysis.checked_get(_stock_get))
    FaceAnalysis.get_batch, FaceAnalysis.embed_aligned = face_analysis.get_batch, face_analysis.embed_aligned
    # Models of a pack with a manifest keep parts of it in read-only dicts, which pickle does not know.
    copyreg.pickle(MappingProxyType, _reduce_read_only_dict)


def unregister() -> None:
    """Restore the stock package; models loaded before keep working."""
    zoo_module.get_model = zoo.get_model = _stock_get_model
    FaceAnalysis.get = _stock_get
    copyreg.dispatch_table.pop(MappingProxyType, None)
    for name in ("get_batch", "embed_aligned"):
        if name in vars(FaceAnalysis):
            delattr(FaceAnalysis, name)


def _reduce_read_only_dict(values: MappingProxyType) -> tuple:
    return _read_only_dict, (dict(values),)


def _read_only_dict(values: dict) -> MappingProxyType:
    return MappingProxyType(values)
