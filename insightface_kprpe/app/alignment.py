"""Faces cut out of a photo: which of those that a detector finds, and how."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from ..data.face_list import ListedFace, faces_by_photo, read_faces
from ..data.image_codec import CROP_SIZE, encode_jpeg, fit_crop
from ..data.photos import PhotoFiles, VideoFrames
from ..geometry import KEYPOINT_LIMIT, known_landmarks, transform_points
from .aligner import cut_aligned, cut_box
from .detection import Detected, find_faces, open_detector

_LISTED_FROM = 0.3  # a face with this score is listed, though too low to be cut out

Crop = tuple[np.ndarray, np.ndarray]  # (112, 112, 3) uint8, (5, 2) float32 keypoints in [0, 1] of it


@dataclass(frozen=True)
class AlignOptions:
    """What is cut out of photos.

    Attributes:
        mode: "aligned": onto InsightFace's template; "box": the square around the detector's box, as it is; "whole":
            the photo itself, squeezed into a square.
        faces: of those that count, the "largest", the one nearest to the middle ("central"), or "all".
        max_faces: of "all" only so many, the largest; 0: no limit.
        det_thresh: score from which on a face counts, in [0, 1].
        min_size: pixels that the shorter side of its box must have.
        quality: of the JPEG files, 1 to 100.
    """

    mode: Literal["aligned", "box", "whole"] = "aligned"
    faces: Literal["largest", "central", "all"] = "largest"
    max_faces: int = 0
    det_thresh: float = 0.5
    min_size: float = 0.0
    quality: int = 95

    def __post_init__(self) -> None:
        if self.mode not in CUTS:
            raise ValueError(f"mode must be {', '.join(CUTS)}, got {self.mode!r}")
        if self.faces not in ("largest", "central", "all"):
            raise ValueError(f"faces must be largest, central or all, got {self.faces!r}")
        if self.max_faces < 0 or (self.max_faces and self.faces != "all"):
            raise ValueError(f"max_faces must be 0 or more, and goes with faces=all only, got {self.max_faces}")
        if not 0 < self.det_thresh <= 1:
            raise ValueError(f"det_thresh must be above 0 and at most 1, got {self.det_thresh}")
        if not 0 <= self.min_size < float("inf"):
            raise ValueError(f"min_size must be 0 or more pixels, got {self.min_size}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be in 1 to 100, got {self.quality}")


class CutPhoto(NamedTuple):
    """What became of a photo: a row for each face, and the JPEG files of those that were cut out, in their order."""

    faces: list[ListedFace]
    files: list[bytes]


def aligned(image: np.ndarray, box: np.ndarray, landmarks_px: np.ndarray) -> Crop:
    """A face turned onto the template."""
    return cut_aligned(image, landmarks_px, CROP_SIZE)


def boxed(image: np.ndarray, box: np.ndarray, landmarks_px: np.ndarray) -> Crop:
    """The square around the box, as it is."""
    crop, matrix = cut_box(image, box, CROP_SIZE)
    return crop, (transform_points(landmarks_px, matrix) / CROP_SIZE).astype(np.float32)


def whole(image: np.ndarray, box: np.ndarray, landmarks_px: np.ndarray) -> Crop:
    """The whole picture, for crops that are to stay as they are."""
    return fit_crop(image), (landmarks_px / image.shape[1::-1]).astype(np.float32)


CUTS = {"aligned": aligned, "box": boxed, "whole": whole}


def choose_faces(found: Detected, size: tuple[int, int], options: AlignOptions) -> tuple[list[int], dict[int, str]]:
    """Which faces of a photo are cut out, and why the others are not.

    Args:
        found: the faces.
        size: width and height of the photo.
        options: which ones count.

    Returns:
        Numbers of those to cut out, the first choice first, and the reason for each of the others.
    """
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    reasons, left = {}, []
    known = known_landmarks(found.landmarks_px) if len(sides) else ()
    for face, score in enumerate(found.scores):
        if score < options.det_thresh:
            reasons[face] = f"score below {options.det_thresh:g}"
        elif sides[face].min() < options.min_size:
            reasons[face] = f"smaller than {options.min_size:g} pixels"
        elif not known[face]:
            reasons[face] = "its landmarks are no face's"
        else:
            left.append(face)
    if options.faces == "central":
        off = np.linalg.norm((found.boxes[:, :2] + found.boxes[:, 2:]) / 2 - np.array(size) / 2, axis=1)
        left.sort(key=lambda face: off[face])
    else:
        left.sort(key=lambda face: -sides[face].prod())
    count = (options.max_faces or len(left)) if options.faces == "all" else 1
    why = f"not of the {count} largest" if options.faces == "all" else f"not the {_NAMES[options.faces]} face"
    return left[:count], reasons | dict.fromkeys(left[count:], why)


_NAMES = {"largest": "largest", "central": "most central"}


def listed_faces(faces: Sequence[ListedFace]) -> Detected:
    """What a list says of a photo, as if it had just been found."""
    faces = [face for face in faces if not np.isnan(face.score)]
    return Detected(
        np.array([face.box for face in faces]).reshape(-1, 4),
        np.array([face.score for face in faces]),
        np.array([face.landmarks_px for face in faces]).reshape(-1, 5, 2),
        np.array([face.with_border for face in faces], bool),
    )


class FaceCutter:
    """Index of a photo -> its faces: what worker processes do, each with a detector of its own.

    Args:
        photos: to look at.
        crops: path of each photo's crop, without number and suffix.
        detector: ONNX file, see :func:`~.detection.detector_file`; or a list of faces, which are cut out again.
        options: what to cut out.
        threads: of the detector; None: as onnxruntime likes.
    """

    def __init__(
        self,
        photos: PhotoFiles | VideoFrames,
        crops: Sequence[str],
        detector: Path,
        options: AlignOptions,
        threads: int | None = None,
    ) -> None:
        self.photos, self.crops, self.detector, self.options = photos, crops, detector, options
        self.threads = threads
        self.listed = faces_by_photo(read_faces(detector)) if detector.suffix == ".csv" else None
        self._session: tuple[int, Any] | None = None

    def __call__(self, index: int) -> CutPhoto:
        """Find and cut; a photo that cannot be read is a row of its own."""
        photo, stamp = self.photos.names[index], (0, 0)
        try:
            stamp = self.photos.stamp(index)
            image = cv2.cvtColor(self.photos[index], cv2.COLOR_RGB2BGR)
        except (ValueError, OSError) as error:
            return CutPhoto([ListedFace(photo, stamp, left_out=f"unreadable: {error}")], [])
        found = self._find(photo, image)
        if not len(found.scores):
            return CutPhoto([ListedFace(photo, stamp, left_out="no face found")], [])
        chosen, reasons = choose_faces(found, image.shape[1::-1], self.options)
        faces, files = [], []
        for number, face in enumerate((*chosen, *reasons)):
            listed = ListedFace(
                photo,
                stamp,
                left_out=reasons.get(face, ""),
                with_border=bool(found.with_border[face]),
                score=float(found.scores[face]),
                box=found.boxes[face],
                landmarks_px=found.landmarks_px[face],
            )
            if face not in reasons:
                crop, keypoints = CUTS[self.options.mode](image, listed.box, listed.landmarks_px)
                if np.abs(keypoints).max() > KEYPOINT_LIMIT:
                    listed = listed._replace(left_out="its landmarks are far outside its box")
                else:
                    name = f"{self.crops[index]}_face{number}" if self.options.faces == "all" else self.crops[index]
                    listed = listed._replace(crop=f"{name}.jpg", keypoints=keypoints)
                    files.append(encode_jpeg(crop[..., ::-1], self.options.quality))
            faces.append(listed)
        return CutPhoto(faces, files)

    def _find(self, photo: str, image: np.ndarray) -> Detected:
        if self.listed is not None:
            return listed_faces(self.listed.get(photo, []))
        return find_faces(self._detector(), image, self.options.det_thresh)

    def _detector(self) -> Any:
        # Sessions do not outlive a fork.
        if self._session is None or self._session[0] != os.getpid():
            threshold = min(_LISTED_FROM, self.options.det_thresh)
            self._session = os.getpid(), open_detector(self.detector, threshold, self.threads)
        return self._session[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_session": None}
