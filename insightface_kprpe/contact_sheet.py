"""Contact sheets: many faces in one image for people to look at, with points and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from .files import write_atomically

CELL = 144  # pixels of one face
_COLORS = ((80, 80, 255), (80, 255, 80), (255, 255, 80), (255, 80, 255), (80, 255, 255))  # BGR, one per point


def face_cell(image: np.ndarray, keypoints: np.ndarray | None = None, caption: str = "") -> np.ndarray:
    """A crop in the middle of a cell, with its points and a caption.

    Args:
        image: (H, W, 3) uint8 RGB.
        keypoints: (5, 2) xy in [0, 1] of the crop.
        caption: drawn in the lower left corner.

    Returns:
        (CELL, CELL, 3) uint8 BGR.
    """
    height, width = image.shape[:2]
    scale = CELL / max(width, height)
    new = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    left, top = (CELL - new[0]) // 2, (CELL - new[1]) // 2
    cell = np.zeros((CELL, CELL, 3), np.uint8)
    cell[top : top + new[1], left : left + new[0]] = cv2.resize(image[..., ::-1], new, interpolation=smooth)
    points = () if keypoints is None else zip(keypoints, _COLORS, strict=True)
    for (x, y), color in points:
        center = round(left + float(x) * new[0]), round(top + float(y) * new[1])
        cv2.circle(cell, center, 3, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(cell, center, 2, color, -1, cv2.LINE_AA)
    _write(cell, caption, CELL - 6)
    return cell


def title_bar(text: str, width: int) -> np.ndarray:
    """A line of text as wide as a sheet: (24, width, 3) uint8 BGR."""
    bar = np.full((24, width, 3), 48, np.uint8)
    _write(bar, text, 16)
    return bar


def arrange(cells: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Put cells of one size (h, w, 3) side by side and below each other; empty cells are black.

    Args:
        cells: one or more.
        columns: how many side by side.
    """
    height, width = cells[0].shape[:2]
    sheet = np.zeros((-(-len(cells) // columns) * height, columns * width, 3), np.uint8)
    for place, cell in enumerate(cells):
        row, column = divmod(place, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = cell
    return sheet


def write_sheet(path: str | Path, sheet: np.ndarray) -> None:
    """Write (H, W, 3) uint8 BGR as PNG."""
    write_atomically(path, cv2.imencode(".png", sheet)[1].tobytes())


def _write(picture: np.ndarray, text: str, baseline: int) -> None:
    """White text with a black outline. (A thicker stroke below would not work: it may make the letters wider.)"""
    rim = [(x, y, (0, 0, 0)) for x in (3, 4, 5) for y in (-1, 0, 1)]
    for x, y, color in [*rim, (4, 0, (255, 255, 255))]:
        cv2.putText(picture, text, (x, baseline + y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, color, 1, cv2.LINE_AA)
