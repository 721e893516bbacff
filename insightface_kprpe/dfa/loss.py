"""What DFA learns from: RetinaFace's multibox loss on the anchors, and the aggregated face itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .anchors import encode_boxes, encode_points, overlap
from .network import NetworkOutput

# Aggregated coordinates are compared in the unit in which the anchors' are: variance 0.1 of an anchor that is about
# half the crop.
COORDINATE_UNIT = 0.05


class LossParts(NamedTuple):
    """Scalars; ``total`` is the weighted sum of the others.

    Attributes:
        total: what to call ``backward`` on.
        box: smooth-L1 of the matched anchors' boxes, mean over matched anchors.
        score: cross-entropy of matched anchors and the hardest others, summed, per matched anchor.
        landmark: smooth-L1 of the matched anchors' landmarks, mean over matched anchors with landmarks.
        face_box: smooth-L1 of the aggregated box, mean over faces.
        face_score: smooth-L1 of the aggregated score, mean over images.
        face_landmark: smooth-L1 of the aggregated landmarks, mean over labeled faces.
    """

    total: torch.Tensor
    box: torch.Tensor
    score: torch.Tensor
    landmark: torch.Tensor
    face_box: torch.Tensor
    face_score: torch.Tensor
    face_landmark: torch.Tensor


class DFALoss(nn.Module):
    """Multibox loss with hard negative mining, plus smooth-L1 on the one face that the network reads.

    An anchor is matched when its overlap with the face's box is large enough; the best one always is. An image without
    a face contributes its hardest anchors as background, as many as one matched anchor would bring, and a score of 0.

    Args:
        overlap_threshold: intersection over union from which an anchor is matched.
        negatives_per_positive: how many background anchors count for each matched one, the most face-like first.
        box_weight: of the anchors' boxes; scores and landmarks weigh 1.
        face_weight: of the three losses of the aggregated face; 0 for plain RetinaFace.
    """

    def __init__(
        self,
        overlap_threshold: float = 0.35,
        negatives_per_positive: int = 7,
        box_weight: float = 2.0,
        face_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.overlap_threshold = overlap_threshold
        self.negatives_per_positive = negatives_per_positive
        self.box_weight, self.face_weight = box_weight, face_weight

    def forward(
        self, output: NetworkOutput, anchors: torch.Tensor, keypoints: torch.Tensor, bbox: torch.Tensor
    ) -> LossParts:
        """Compare a batch with its labels.

        Args:
            output: of ``RetinaFaceNet`` for B images.
            anchors: (A, 4), the network's.
            keypoints: (B, 5, 2) xy in [0, 1] of the crop; all -1 where not labeled.
            bbox: (B, 4) x1, y1, x2, y2 in [0, 1] of the crop; all -1 where the image shows no face.

        Raises:
            ValueError: shapes do not fit.
        """
        count = len(output.score)
        if keypoints.shape != (count, 5, 2) or bbox.shape != (count, 4):
            raise ValueError(
                f"keypoints must be ({count}, 5, 2) and bbox ({count}, 4), got {tuple(keypoints.shape)} "
                f"and {tuple(bbox.shape)}"
            )
        is_face = (bbox != -1).any(1)
        labeled = is_face & (keypoints != -1).flatten(1).any(1)
        bbox = torch.where(is_face[:, None], bbox, bbox.new_tensor([0.0, 0.0, 1.0, 1.0]))  # any box: it is masked
        points = keypoints.flatten(1)

        matched = self._match(bbox, anchors) & is_face[:, None]  # (B, A)
        box = _masked_smooth_l1(output.bbox_regression, encode_boxes(bbox[:, None], anchors), matched)
        landmark = _masked_smooth_l1(
            output.landmark_regression, encode_points(points[:, None], anchors), matched & labeled[:, None]
        )
        score = self._mined_cross_entropy(output.class_logits, matched)
        face_box = _masked_smooth_l1(output.bbox / COORDINATE_UNIT, bbox / COORDINATE_UNIT, is_face)
        face_landmark = _masked_smooth_l1(
            output.keypoints.flatten(1) / COORDINATE_UNIT, points / COORDINATE_UNIT, labeled
        )
        face_score = F.smooth_l1_loss(output.score, is_face.to(output.score))
        total = self.box_weight * box + score + landmark + self.face_weight * (face_box + face_score + face_landmark)
        return LossParts(total, box, score, landmark, face_box, face_score, face_landmark)

    def _match(self, bbox: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """(B, A) bool: anchors that overlap the face enough, and the one that overlaps it most."""
        overlaps = overlap(bbox, anchors)
        best = F.one_hot(overlaps.argmax(1), overlaps.shape[1]).bool()
        return best | (overlaps >= self.overlap_threshold)

    def _mined_cross_entropy(self, logits: torch.Tensor, matched: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over matched anchors and, image by image, the background anchors it is largest for."""
        losses = F.cross_entropy(logits.flatten(0, 1), matched.flatten().long(), reduction="none").view_as(matched)
        hardness = losses.detach().masked_fill(matched, -torch.inf)
        rank = hardness.argsort(1, descending=True).argsort(1)  # 0 is the hardest
        positives = matched.sum(1)
        hard = (rank < self.negatives_per_positive * positives.clamp_min(1)[:, None]) & ~matched
        return (losses * (matched | hard)).sum() / positives.sum().clamp_min(1)


def _masked_smooth_l1(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Smooth-L1 summed over the last dimension, mean over the mask; 0 where the mask is empty."""
    losses = F.smooth_l1_loss(predicted, target.expand_as(predicted), reduction="none").sum(-1)
    return torch.where(mask, losses, 0.0).sum() / mask.sum().clamp_min(1)
