"""Five points, similarities and warps, each by its definition."""

from __future__ import annotations

import numpy as np

TEMPLATE = (
    np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]) / 112
)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(2, 3): the rotation, scale and shift (a, b, x, y) that leave the smallest squared error, by least squares.

    Args:
        source: (P, 2).
        target: (P, 2).
    """
    rows = [([x, -y, 1, 0], [y, x, 0, 1]) for x, y in source]
    (a, b, x, y), *_ = np.linalg.lstsq(np.array(rows, dtype=np.float64).reshape(-1, 4), target.reshape(-1), rcond=None)
    return np.array([[a, -b, x], [b, a, y]])


def sampling_matrix(matrix: np.ndarray, width: int, height: int, size: int) -> np.ndarray:
    """(2, 3) from [-1, 1] of the target to [-1, 1] of the source, by inverting a chain of 3x3 matrices.

    Args:
        matrix: (2, 3) from pixels of the source to pixels of the target.
        width: of the source.
        height: of the source.
        size: side of the target.
    """
    to_unit = np.array([[2 / width, 0, -1], [0, 2 / height, -1], [0, 0, 1]])
    target_to_unit = np.array([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]])
    return (to_unit @ np.linalg.inv(target_to_unit @ np.vstack([matrix, [0, 0, 1]])))[:2]


def read(image: np.ndarray, x: float, y: float, outside: float) -> np.ndarray:
    """(C,) bilinear value of a (C, H, W) image at a place in pixels (0 is the middle of the first one)."""
    value = np.zeros(len(image))
    for column in (int(np.floor(x)), int(np.floor(x)) + 1):
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            inside = 0 <= row < image.shape[1] and 0 <= column < image.shape[2]
            share = (1 - abs(x - column)) * (1 - abs(y - row))
            value += share * (image[:, row, column] if inside else outside)
    return value


def warp(image: np.ndarray, theta: np.ndarray, size: int, outside: float = -1.0) -> np.ndarray:
    """(C, size, size): the image where ``theta`` says; -1 and 1 are the middles of the first and last pixels."""
    out = np.empty((len(image), size, size))
    for row in range(size):
        for column in range(size):
            x, y = theta @ np.array([2 * column / (size - 1) - 1, 2 * row / (size - 1) - 1, 1])
            place = (x + 1) / 2 * (image.shape[2] - 1), (y + 1) / 2 * (image.shape[1] - 1)
            out[:, row, column] = read(image, *place, outside)
    return out


def padding(width: int, height: int, ratio: float) -> tuple[int, int, int]:
    """Black pixels on the left and on the top, and the side of the square."""
    side = max(width, height) + 2 * int(max(width, height) * ratio)
    longer = int(max(width, height) * ratio)
    return longer + (max(width, height) - width) // 2, longer + (max(width, height) - height) // 2, side


def fit_to_square(image: np.ndarray, size: int, ratio: float) -> np.ndarray:
    """(C, size, size): the (C, H, W) image in the middle of a black square, corners on corners."""
    left, top, side = padding(image.shape[2], image.shape[1], ratio)
    square = np.full((len(image), side, side), -1.0)
    square[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return warp(square, np.eye(3)[:2], size)


def from_square(points: np.ndarray, width: int, height: int, ratio: float) -> np.ndarray:
    """(P, 2) places in [0, 1] of the black square to [0, 1] of the crop inside it."""
    left, top, side = padding(width, height, ratio)
    return (points * side - [left, top]) / [width, height]
