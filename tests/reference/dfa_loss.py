"""What DFA learns from, image by image and anchor by anchor: RetinaFace's multibox loss and the aggregated face."""

from __future__ import annotations

import math

import numpy as np

UNIT = 0.05  # in which coordinates of the aggregated face are compared


def smooth_l1(difference: np.ndarray) -> float:
    """Summed: half the square below 1, the distance less a half beyond."""
    size = np.abs(difference)
    return float(np.where(size < 1, 0.5 * size**2, size - 0.5).sum())


def overlap(box: np.ndarray, anchor: np.ndarray) -> float:
    """Intersection over union of x1, y1, x2, y2 and center x, center y, width, height."""
    x, y, w, h = anchor
    wide = min(box[2], x + w / 2) - max(box[0], x - w / 2)
    high = min(box[3], y + h / 2) - max(box[1], y - h / 2)
    shared = max(wide, 0) * max(high, 0)
    return shared / ((box[2] - box[0]) * (box[3] - box[1]) + w * h - shared)


def encode_box(box: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """The four numbers that a box is to an anchor."""
    x, y, w, h = anchor
    offsets = ((box[0] + box[2]) / 2 - x) / (0.1 * w), ((box[1] + box[3]) / 2 - y) / (0.1 * h)
    return np.array([*offsets, math.log((box[2] - box[0]) / w) / 0.2, math.log((box[3] - box[1]) / h) / 0.2])


def encode_points(points: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """The ten numbers that five points (5, 2) are to an anchor."""
    return ((points - anchor[:2]) / (0.1 * anchor[2:])).reshape(-1)


def loss_parts(
    output: dict[str, np.ndarray],
    anchors: np.ndarray,
    keypoints: np.ndarray,
    bbox: np.ndarray,
    threshold: float = 0.35,
    ratio: int = 7,
) -> dict[str, float]:
    """The six parts by the names of ``LossParts``.

    Args:
        output: (B, ...) arrays by the names of ``NetworkOutput``.
        anchors: (A, 4).
        keypoints: (B, 5, 2), -1 where not labeled.
        bbox: (B, 4), -1 where there is no face.
        threshold: overlap from which an anchor is matched; the best one always is.
        ratio: background anchors for each matched one, the hardest first.
    """
    sums = dict.fromkeys(("box", "score", "landmark", "face_box", "face_score", "face_landmark"), 0.0)
    matches = labeled_matches = faces = labeled_faces = 0
    for i, (box, points) in enumerate(zip(bbox, keypoints, strict=True)):
        face, labeled = box[0] != -1, points[0, 0] != -1
        positive = set()
        if face:
            overlaps = [overlap(box, anchor) for anchor in anchors]
            positive = {j for j, value in enumerate(overlaps) if value >= threshold} | {overlaps.index(max(overlaps))}
        for j in positive:
            sums["box"] += smooth_l1(output["bbox_regression"][i, j] - encode_box(box, anchors[j]))
            if labeled:
                sums["landmark"] += smooth_l1(output["landmark_regression"][i, j] - encode_points(points, anchors[j]))
        background = []
        for j, (zero, one) in enumerate(output["class_logits"][i]):
            both = math.log(math.exp(zero) + math.exp(one))
            if j in positive:
                sums["score"] += both - one
            else:
                background.append(both - zero)
        sums["score"] += sum(sorted(background)[-ratio * max(len(positive), 1) :])
        sums["face_score"] += smooth_l1(output["score"][i] - face)
        if face:
            sums["face_box"] += smooth_l1((output["bbox"][i] - box) / UNIT)
        if labeled:
            sums["face_landmark"] += smooth_l1((output["keypoints"][i] - points) / UNIT)
        matches, labeled_matches = matches + len(positive), labeled_matches + len(positive) * labeled
        faces, labeled_faces = faces + face, labeled_faces + labeled
    counts = [matches, matches, labeled_matches, faces, len(bbox), labeled_faces]
    return {name: total / max(count, 1) for (name, total), count in zip(sums.items(), counts, strict=True)}
