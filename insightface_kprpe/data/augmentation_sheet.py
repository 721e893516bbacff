"""A contact sheet of what an augmentation does to faces and their keypoints, to check before a long run."""

from __future__ import annotations

import numpy as np
import torch

from ..contact_sheet import arrange, face_cell
from .augmentation import Augmentation
from .face_dataset import FaceDataset


def augmentation_sheet(
    faces: FaceDataset, augment: Augmentation, count: int = 10, versions: int = 9, seed: int = 0
) -> np.ndarray:
    """Draw some faces, evenly spread over the set, one per row: the original, then several augmented versions.

    Args:
        faces: where they come from.
        augment: what to show.
        count: rows; fewer if there are fewer faces.
        versions: augmented ones in a row.
        seed: of the choices.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    chosen = np.unique(np.linspace(0, len(faces) - 1, min(count, len(faces))).round().astype(int))
    generator = torch.Generator().manual_seed(seed)
    cells = []
    for index in chosen.tolist():
        image, _, keypoints = faces[index]
        cells.append(face_cell(image.permute(1, 2, 0).numpy(), keypoints.numpy(), str(index)))
        batch = image.expand(versions, -1, -1, -1), keypoints.expand(versions, -1, -1)
        for moved, points in zip(*augment(*batch, generator), strict=True):
            pixels = ((moved + 1) * 127.5).round().to(torch.uint8)
            cells.append(face_cell(pixels.permute(1, 2, 0).numpy(), points.numpy()))
    return arrange(cells, versions + 1)
