"""Where a face's five points are, and how they move: template, similarity transform, crop, mirroring.

Two units are used and never mixed. ``landmarks_px`` are pixels of some image. ``keypoints`` are xy in [0, 1] of the
exact crop that a network sees (pixel / side). The order is left eye, right eye, nose, left mouth corner, right mouth
corner *as seen in the image*.
"""

from __future__ import annotations

import numpy as np
import torch

# The five points that InsightFace aligns every face to, in pixels of a 112x112 crop.
ARCFACE_TEMPLATE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)
# The same as keypoints: those of an aligned crop whose landmarks are unknown.
CANONICAL_KEYPOINTS = ARCFACE_TEMPLATE_112 / 112.0
CANONICAL_KEYPOINTS.setflags(write=False)
ARCFACE_TEMPLATE_112.setflags(write=False)

# Below this DFA score, the landmarks are not trusted, and the canonical keypoints are used instead.
SCORE_THRESHOLD = 0.5
# A keypoint may lie outside its crop, but a value beyond this is in pixels, or nonsense.
KEYPOINT_LIMIT = 4.0

# Which keypoint each one becomes when the image is mirrored.
MIRROR_ORDER = (1, 0, 2, 4, 3)

# How similar to the template's shape (0 to 1, invariant to position, size and rotation) five points must be to be a
# face's: the lowest of 11,000 in-the-wild faces has 0.64, a full profile seen from below 0.46, the median of random
# points 0.2.
_FACE_LIKENESS = 0.25
_COINCIDE = 1e-3  # of a crop's side, or of the largest coordinate: points closer to each other than this coincide


def similarity_transform(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least-squares similarity (rotation, uniform scale, shift; no reflection) from one point set to another.

    Closed form: with centered points as complex numbers, scale and rotation are one complex quotient.

    Args:
        source: (..., P, 2) float, P >= 2 points.
        target: float, broadcastable to ``source``, in any unit.

    Returns:
        (..., 2, 3) float matrix M with ``target ~ M[:, :2] @ source + M[:, 2]``. Where all source points coincide there
        is no scale or rotation to find: M then shrinks everything to the mean of ``target``, finite but not invertible.
    """
    source_mean, target_mean = source.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    x, y = (source - source_mean).unbind(-1)
    u, v = (target - target_mean).unbind(-1)
    spread = (x * x + y * y).sum(-1).clamp_min(torch.finfo(source.dtype).tiny)
    a = (x * u + y * v).sum(-1) / spread
    b = (x * v - y * u).sum(-1) / spread
    linear = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)  # (..., 2, 2)
    shift = target_mean.squeeze(-2) - (linear @ source_mean.squeeze(-2).unsqueeze(-1)).squeeze(-1)
    return torch.cat([linear, shift.unsqueeze(-1)], -1)


def theta_from_similarity(
    similarity: torch.Tensor, source_size: int | tuple[int, int], target_size: int
) -> torch.Tensor:
    """The matrix that ``affine_grid`` needs to warp by a similarity: its inverse, in units of half the image.

    Args:
        similarity: (..., 2, 3) float, from pixels of the source to pixels of the target.
        source_size: side of the source in pixels, or its (width, height).
        target_size: side of the square target in pixels.

    Returns:
        (..., 2, 3) float, from [-1, 1] of the target to [-1, 1] of the source, where -1 and 1 are the edges (0 and 1
        of a keypoint). A similarity without scale has no inverse; the result is then finite but means nothing.
    """
    width, height = (source_size, source_size) if isinstance(source_size, int) else source_size
    a, b = similarity[..., 0, 0], similarity[..., 1, 0]
    squared_scale = (a * a + b * b).clamp_min(torch.finfo(similarity.dtype).tiny)
    a, b = a / squared_scale, b / squared_scale  # the inverse is [[a, b], [-b, a]]
    x, y = target_size / 2 - similarity[..., 0, 2], target_size / 2 - similarity[..., 1, 2]
    row_x = [a * target_size / width, b * target_size / width, 2 * (a * x + b * y) / width - 1]
    row_y = [-b * target_size / height, a * target_size / height, 2 * (a * y - b * x) / height - 1]
    return torch.stack([torch.stack(row_x, -1), torch.stack(row_y, -1)], -2)


def sampling_grid(theta: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """What ``grid_sample`` reads, several times as fast as ``affine_grid`` on a CPU: rows and columns are added up.

    Args:
        theta: (B, 2, 3) float, from [-1, 1] of the target to [-1, 1] of the source.
        axis: (S,) where the pixels of a target's row, and of its column, lie in [-1, 1].

    Returns:
        (B, S, S, 2), in memory (B, 2, S, S), which is no slower to read.
    """
    along_x = theta[:, :, :1] * axis  # (B, 2, S)
    along_y = theta[:, :, 1:2] * axis + theta[:, :, 2:]
    return (along_x[:, :, None] + along_y[..., None]).permute(0, 2, 3, 1)


def estimate_alignment(landmarks_px: np.ndarray, size: int = 112) -> np.ndarray:
    """The matrix that InsightFace's ``norm_crop`` warps with.

    Args:
        landmarks_px: (5, 2) landmarks in pixels of the image.
        size: side of the crop in pixels; the template scales with it.

    Returns:
        (2, 3) float64 matrix from image pixels to crop pixels.

    Raises:
        ValueError: the landmarks are not (5, 2) finite numbers.
    """
    landmarks_px = np.asarray(landmarks_px, dtype=np.float64)
    if landmarks_px.shape != (5, 2) or not np.isfinite(landmarks_px).all():
        raise ValueError(f"landmarks_px must be (5, 2) finite pixels of the image, got shape {landmarks_px.shape}")
    template = torch.from_numpy(ARCFACE_TEMPLATE_112.astype(np.float64) * (size / 112.0))
    return similarity_transform(torch.from_numpy(landmarks_px), template).numpy()


def align_face(image: np.ndarray, landmarks_px: np.ndarray, size: int = 112) -> tuple[np.ndarray, np.ndarray]:
    """Warp a face onto the template.

    Args:
        image: (H, W, 3) uint8.
        landmarks_px: (5, 2) landmarks in pixels of ``image``.
        size: side of the crop in pixels.

    Returns:
        The (size, size, 3) uint8 crop (black outside the image), and the landmarks as (5, 2) float32 keypoints in
        [0, 1] of that crop.
    """
    import cv2

    matrix = estimate_alignment(landmarks_px, size)
    crop = cv2.warpAffine(image, matrix, (size, size), borderValue=0.0)
    return crop, (transform_points(landmarks_px, matrix) / size).astype(np.float32)


def warp_smoothly(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Warp without aliasing: a large face is first averaged down to the scale of its crop.

    Args:
        image: (H, W, 3) uint8.
        matrix: (2, 3) from image pixels to crop pixels.
        size: side of the crop in pixels.

    Returns:
        The (size, size, 3) uint8 crop, black outside the image.
    """
    import cv2

    scale = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if scale < 0.7:
        old = np.array(image.shape[1::-1])
        new = np.maximum(np.rint(old * scale).astype(int), 1)
        image = cv2.resize(image, tuple(int(side) for side in new), interpolation=cv2.INTER_AREA)
        ratio = old / new  # old = (new + 0.5) * ratio - 0.5
        matrix = np.column_stack([matrix[:, :2] * ratio, matrix[:, 2] + matrix[:, :2] @ (ratio / 2 - 0.5)])
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map (..., 2) points through a (2, 3) matrix (both in the same unit)."""
    return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]


def distinct_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """Where five points are distinct, so that a face can be aligned by them, correctly or not.

    Args:
        landmarks: (..., 5, 2) float in any unit.

    Returns:
        (...) bool; False where points coincide, as zeros and -1 do, or are not finite.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    finite = np.isfinite(points).all((-2, -1))
    points = np.where(finite[..., None, None], points, 0.0)
    spread = ((points - points.mean(-2, keepdims=True)) ** 2).sum((-2, -1))
    return finite & (spread > 5 * (_COINCIDE * np.maximum(np.abs(points).max((-2, -1)), 1.0)) ** 2)


def known_landmarks(landmarks: np.ndarray) -> np.ndarray:
    """Where five points can be a face's, as opposed to values that mean "unknown", or nothing.

    Args:
        landmarks: (..., 5, 2) float in any unit.

    Returns:
        (...) bool; False where points are not distinct, or are arranged as no face's can be.
    """
    distinct = distinct_landmarks(landmarks)
    points = np.where(distinct[..., None, None], np.asarray(landmarks, dtype=np.float64), 0.0)
    template = ARCFACE_TEMPLATE_112.astype(np.float64)
    points, template = ((values - values.mean(-2, keepdims=True)) @ np.array([1, 1j]) for values in (points, template))
    # The squared correlation of the two shapes as complex numbers, which is invariant to rotation, scale and shift.
    shared = np.abs((points.conj() * template).sum(-1)) ** 2
    possible = (np.abs(points) ** 2).sum(-1) * (np.abs(template) ** 2).sum()
    return distinct & (shared >= _FACE_LIKENESS * possible)


def mirror_keypoints(keypoints):
    """Keypoints of the mirrored crop: x becomes 1 - x, and left and right points are swapped.

    Args:
        keypoints: (..., 5, 2) float tensor or array, xy in [0, 1] of the crop.

    Returns:
        A new tensor or array of the same kind and shape.
    """
    mirrored = keypoints[..., list(MIRROR_ORDER), :]  # advanced indexing copies
    mirrored[..., 0] = 1 - mirrored[..., 0]
    return mirrored
