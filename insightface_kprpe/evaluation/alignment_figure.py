"""Shows what wrong landmarks do to aligned crops: the paper's Figures 7 and 9 for any faces."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..geometry import estimate_alignment, transform_points, warp_smoothly
from .curves import new_figure
from .figure_faces import FigureFaces
from .landmarks import POINT_NAMES

SIZE = 112  # pixels of the aligned crops
LIMIT = 0.05  # of Fig. 7: errors beyond it are red
_COLUMNS = ("crop", "aligned by the truth", "aligned by the prediction", "both, overlaid", "one point wrong, overlaid")
_CELL = 2.0  # inches


class AlignmentError(NamedTuple):
    """The effect of wrong landmarks on one face.

    Attributes:
        errors: (5,) distance of each predicted point from the true one / sqrt(width * height) of the crop.
        moved: pixels that the aligned crop's content moves, on average over the crop, when all points are predicted.
        moved_by_worst: the same when only the worst one is.
    """

    errors: np.ndarray
    moved: float
    moved_by_worst: float

    @property
    def worst(self) -> int:
        """Number of the point with the largest error."""
        return int(self.errors.argmax())


def measure(truth_px: np.ndarray, predicted_px: np.ndarray, width: int, height: int) -> AlignmentError:
    """Compare two alignments of one face.

    Args:
        truth_px: (5, 2) true landmarks in pixels of the crop.
        predicted_px: (5, 2) predicted ones.
        width, height: of the crop, pixels.
    """
    errors = np.linalg.norm(predicted_px - truth_px, axis=1) / np.sqrt(width * height)
    one_wrong = _with_worst(truth_px, predicted_px)
    right = estimate_alignment(truth_px, SIZE)
    moved, moved_by_worst = (_pixels_moved(right, estimate_alignment(p, SIZE)) for p in (predicted_px, one_wrong))
    return AlignmentError(errors, moved, moved_by_worst)


def _with_worst(truth_px: np.ndarray, predicted_px: np.ndarray) -> np.ndarray:
    """The true landmarks, except for the one whose prediction is worst."""
    worst = np.linalg.norm(predicted_px - truth_px, axis=1).argmax()
    points = truth_px.copy()
    points[worst] = predicted_px[worst]
    return points


def _pixels_moved(right: np.ndarray, wrong: np.ndarray) -> float:
    """Mean distance between the positions that two alignments give each pixel of the first one's crop."""
    inverse = np.linalg.inv(np.vstack([right, [0, 0, 1]]))[:2]
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1).reshape(-1, 2) + 0.0
    return float(np.linalg.norm(transform_points(transform_points(grid, inverse), wrong) - grid, axis=1).mean())


def alignment_figure(truth: FigureFaces, predicted: np.ndarray) -> tuple[Any, list[AlignmentError]]:
    """Draw true (blue) and predicted points (yellow: within 5 %, red: beyond) and the crops that they align to.

    Args:
        truth: faces with their true keypoints.
        predicted: (n, 5, 2) predicted ones, in [0, 1] of the crops.

    Returns:
        The matplotlib figure, one face per row, and the measurements of each.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the faces have no true keypoints.
    """
    if truth.keypoints is None:
        raise ValueError("the faces must have true landmarks; give their file or a model with --truth")
    count = len(truth.images)
    figure = new_figure((_CELL * len(_COLUMNS), _CELL * 1.15 * count + 0.3))
    axes = figure.subplots(count, len(_COLUMNS), squeeze=False)
    measured = []
    for row, name, image, true, found in zip(axes, *truth, predicted, strict=True):
        height, width = image.shape[:2]
        sides = np.array([width, height], dtype=np.float64)
        measured.append(measure(true * sides, found * sides, width, height))
        _draw_row(row, f"face {name}", image, true * sides, found * sides, measured[-1])
    for cell, title in zip(axes[0], _COLUMNS, strict=True):
        cell.set_title(title, fontsize="small")
    return figure, measured


def _draw_row(
    row: np.ndarray, name: str, image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, error: AlignmentError
) -> None:
    matrices = [estimate_alignment(points, SIZE) for points in (truth, predicted, _with_worst(truth, predicted))]
    crops = [warp_smoothly(image, matrix, SIZE) for matrix in matrices]
    over, over_one = (crops[0] // 2 + crop // 2 for crop in crops[1:])
    for cell, picture in zip(row, (image, *crops[:2], over, over_one), strict=True):
        cell.imshow(picture)
        cell.set(xticks=[], yticks=[])
    _draw_points(row[0], truth, predicted, error)
    for cell, matrix in zip(row[1:3], matrices[:2], strict=True):
        _draw_points(cell, transform_points(truth, matrix), transform_points(predicted, matrix), error)
        # Where an aligned face has its eyes, and where they are here.
        eyes = transform_points(truth[:2], matrix)
        cell.axhline(transform_points(truth[:2], matrices[0])[:, 1].mean(), color="white", linewidth=0.7, linestyle=":")
        cell.plot(*eyes.T, color="white", linewidth=1.0)
    row[0].set_ylabel(name, fontsize="small")
    row[0].set_xlabel(f"worst: {POINT_NAMES[error.worst]}, {100 * error.errors.max():.1f} %", fontsize="x-small")
    row[3].set_xlabel(f"pixels move by {error.moved:.1f}", fontsize="x-small")
    row[4].set_xlabel(f"pixels move by {error.moved_by_worst:.1f}", fontsize="x-small")


def _draw_points(cell: Any, truth: np.ndarray, predicted: np.ndarray, error: AlignmentError) -> None:
    colors = ["red" if value > LIMIT else "yellow" for value in error.errors]
    cell.scatter(*truth.T, s=18, color="#2060ff", edgecolors="white", linewidths=0.5)
    cell.scatter(*predicted.T, s=14, c=colors, edgecolors="black", linewidths=0.5)
