"""A KPRPE network as insightface's recognition model: every face's own landmarks become its keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from insightface.model_zoo.arcface_onnx import ArcFaceONNX

from ..evaluation.fusion import landmark_weights
from ..geometry import CANONICAL_KEYPOINTS, SCORE_THRESHOLD, transform_points
from ..packs.metadata import input_convention, read_metadata
from .aligner import FaceAligner, cut_aligned, cut_box
from .batches import batches, check_crops, check_keypoints
from .pictures import as_bgr


class KeypointRecognizer(ArcFaceONNX):
    """A two-input KPRPE model as InsightFace's recognition model: the face's landmarks become its keypoints.

    Safe to call from several threads, and picklable (the session is opened again from its file).

    Args:
        model_file: ONNX file with inputs ``images`` and ``keypoints``.
        session: an onnxruntime session of it.
        aligner: refines the detector's landmarks first; None: they are used unchanged.
        aligned: True: faces are aligned to the template. False: the network sees the square around the detector's
            box as it is, and the landmarks in it (the paper's second path).
    """

    def __init__(self, model_file: str, session, aligner: FaceAligner | None = None, aligned: bool = True) -> None:
        super().__init__(model_file, session)
        # The parent class guesses from node names whether the file normalizes pixels itself; our files say so.
        metadata = {"mean": str(self.input_mean), "std": str(self.input_std)} | read_metadata(model_file)
        self.input_mean, self.input_std = input_convention(metadata, model_file)
        self.keypoint_name = self.session.get_inputs()[1].name
        self.aligner, self.aligned = aligner, aligned

    def prepare(self, ctx_id: int, **kwargs) -> None:
        """Choose the device, as insightface does: the CPU if ``ctx_id`` is negative."""
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
        """Embed detected faces, of one image or of many, in few forward passes.

        Each face gets ``embedding``, (D,) float32, whose norm is ``embedding_norm``, and ``quality``, float in
        [0, 1]: how close its keypoints are to the template's, times the score of its detector or aligner (paper,
        Eq. 17 and 18). With an aligner, its landmarks ``dfa_kps`` are used if ``dfa_score`` is high enough.

        Args:
            faces: pairs of an image, (H, W, 3) uint8 BGR or what :func:`~.pictures.as_bgr` takes, and insightface's
                ``Face`` with ``kps`` (5, 2) in pixels of it; with an aligner or ``aligned=False`` also ``bbox``.

        Raises:
            ValueError: a face is None or has no landmarks, or an image is empty or none.
        """
        faces = [(as_bgr(img), _checked_face(face)) for img, face in faces]
        if any(not img.size for img, _ in faces):
            raise ValueError("image must not be empty: there is no face in it to embed")
        if self.aligner is not None:
            self.aligner.refine_all(faces)
        crops, keypoints, scores = [], np.empty((len(faces), 5, 2), np.float32), np.empty(len(faces))
        for row, (img, face) in enumerate(faces):
            landmarks, scores[row] = self._landmarks(face)
            crop, keypoints[row] = self._crop(img, face, landmarks)
            crops.append(crop)
        qualities = landmark_weights(keypoints.clip(-1, 2), scores)  # beyond it, a face has weight 0 anyway
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
        keypoints = self._checked_keypoints(keypoints, len(imgs))
        rows = [self._run(imgs[part], keypoints[part]) for part in batches(len(imgs))]
        return np.concatenate(rows) if rows else np.empty((0, self.output_shape[-1]), np.float32)

    def forward(self, batch_data: np.ndarray, keypoints: np.ndarray | None = None) -> np.ndarray:
        """Embed a batch that already has the network's layout, as insightface's models do.

        Args:
            batch_data: (B, 3, 112, 112) RGB in 0 to 255, of any dtype.
            keypoints: (B, 5, 2) in [0, 1] of the crops; None: the canonical template, for aligned crops.

        Returns:
            (B, D) float32.
        """
        blob = ((batch_data - self.input_mean) / self.input_std).astype(np.float32)
        return self._infer(blob, self._checked_keypoints(keypoints, len(blob)))

    def embed_aligned(self, crops: Sequence[np.ndarray], keypoints: np.ndarray | None = None) -> np.ndarray:
        """Embed crops without a detector; see :func:`~.face_analysis.embed_aligned`."""
        return self.get_feat(check_crops(crops, self.input_size), keypoints)

    def crop(self, img: np.ndarray, face: Any) -> tuple[np.ndarray, np.ndarray]:
        """What the network sees of a face that was embedded.

        Args:
            img: (H, W, 3) uint8 BGR, the picture.
            face: as :meth:`embed_faces` has left it.

        Returns:
            (S, S, 3) uint8 BGR, and the landmarks as (5, 2) float32 keypoints in [0, 1] of it.
        """
        return self._crop(img, face, self._landmarks(face)[0])

    def _run(self, imgs: list[np.ndarray], keypoints: np.ndarray) -> np.ndarray:
        mean = (self.input_mean,) * 3
        blob = cv2.dnn.blobFromImages(imgs, 1.0 / self.input_std, self.input_size, mean, swapRB=True)
        return self._infer(blob, keypoints)

    def _infer(self, blob: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
        return self.session.run(self.output_names, {self.input_name: blob, self.keypoint_name: keypoints})[0]

    @staticmethod
    def _checked_keypoints(keypoints: np.ndarray | None, count: int) -> np.ndarray:
        """(count, 5, 2) float32; the template's where none are given."""
        given = np.repeat(CANONICAL_KEYPOINTS[None], count, axis=0) if keypoints is None else keypoints
        return check_keypoints(given, count)

    def _landmarks(self, face) -> tuple[np.ndarray, float]:
        """Landmarks in pixels of the image, and the score of the model that found them."""
        if self.aligner is not None and (face.dfa_score >= SCORE_THRESHOLD or face.kps is None):
            return face.dfa_kps, face.dfa_score
        if face.kps is None:
            raise ValueError("face.kps must be (5, 2) landmarks, got None; the pack's detector gives no landmarks")
        return face.kps, 1.0 if face.det_score is None else float(face.det_score)

    def _crop(self, img: np.ndarray, face, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the network sees of a face, and the landmarks in [0, 1] of it."""
        size = self.input_size[0]
        if self.aligned:
            return cut_aligned(img, landmarks, size)
        crop, matrix = cut_box(img, face.bbox, size)
        return crop, (transform_points(landmarks, matrix) / size).astype(np.float32)


def _checked_face(face):
    if face is None:
        raise ValueError("face must be insightface's Face, got None; skip images in which no face was found")
    return face
