"""Landmark accuracy: normalized mean error (NME), failure rate, cumulative error curve, robustness.

NME is the mean over the five points of their distance to the truth, divided by the square root of the area of the
ground-truth box: "KeyPoint Relative Position Encoding for Face Recognition" (CVPR 2024), supplementary section 3.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.landmark_augmentation import gaussian_blur, lower_resolution, to_float
from ..data.landmark_dataset import LandmarkDataset
from ..data.reading import start_worker
from ..files import write_atomically
from .curves import new_figure, save_figure
from .metrics import to_numpy

POINT_NAMES = ("left eye", "right eye", "nose", "left mouth", "right mouth")
FAILURE_THRESHOLD = 0.1  # an image above this NME counts as a failure; the curve ends there, as in the paper's Fig. 8
CURVE_THRESHOLDS = np.linspace(0, FAILURE_THRESHOLD, 101)

# (B, 3, S, S) float RGB in [-1, 1] -> keypoints (B, 5, 2) in [0, 1] of the crop, score (B,)
Predict = Callable[[torch.Tensor], tuple]
Degrade = Callable[[torch.Tensor], torch.Tensor]


class LandmarkResult(NamedTuple):
    """Accuracy of one model on one set; errors are fractions of sqrt(box area).

    Attributes:
        nme: mean over images and points.
        failure_rate: fraction of images whose mean error exceeds ``FAILURE_THRESHOLD``.
        auc: normalized area under the cumulative curve up to that threshold.
        point_errors: (5,) mean error of each of ``POINT_NAMES``.
        curve: (101,) fraction of images with at most each of ``CURVE_THRESHOLDS``.
        score: mean face score.
        images: how many.
    """

    nme: float
    failure_rate: float
    auc: float
    point_errors: np.ndarray
    curve: np.ndarray
    score: float
    images: int

    def as_dict(self) -> dict:
        """Plain numbers and lists for JSON, rates in percent as in tables."""
        values = self._asdict() | {"curve": (100 * self.curve).tolist()}
        values |= {"failure_rate": 100 * self.failure_rate, "auc": 100 * self.auc}
        return values | {"point_errors": dict(zip(POINT_NAMES, self.point_errors.tolist(), strict=True))}


def nme(keypoints: np.ndarray, truth: np.ndarray, bbox: np.ndarray) -> np.ndarray:
    """Error of every point of every face, normalized; ``.mean()`` of it is the NME.

    Args:
        keypoints: (N, 5, 2) predicted, in any unit that is the same for x and y, as in a square crop.
        truth: (N, 5, 2) labeled, same unit.
        bbox: (N, 4) ground-truth boxes x1, y1, x2, y2, same unit.

    Returns:
        (N, 5) float64 distances / sqrt(width * height).

    Raises:
        ValueError: shapes do not fit, a box has no area, or a prediction is not finite.
    """
    keypoints, truth, bbox = (to_numpy(values).astype(np.float64) for values in (keypoints, truth, bbox))
    if keypoints.shape != truth.shape or keypoints.shape[1:] != (5, 2) or bbox.shape != (len(truth), 4):
        raise ValueError(
            f"keypoints and truth must be (N, 5, 2) and bbox (N, 4), got {keypoints.shape}, {truth.shape}, {bbox.shape}"
        )
    sides = bbox[:, 2:] - bbox[:, :2]
    if not (sides > 0).all():
        raise ValueError(f"bbox must be x1, y1, x2, y2 with a positive area, box {np.argmin(sides.min(1))} has none")
    if not np.isfinite(keypoints).all():
        bad = int((~np.isfinite(keypoints)).any((1, 2)).sum())
        raise ValueError(f"keypoints must be finite, got NaN or Inf for {bad} of {len(keypoints)} faces")
    return np.linalg.norm(keypoints - truth, axis=-1) / np.sqrt(sides.prod(1))[:, None]


def summarize(errors: np.ndarray, scores: np.ndarray) -> LandmarkResult:
    """The figures of a set from the (N, 5) errors of ``nme`` and the (N,) face scores."""
    errors, scores = to_numpy(errors), to_numpy(scores)
    of_image = errors.mean(1)
    curve = np.searchsorted(np.sort(of_image), CURVE_THRESHOLDS, side="right") / len(of_image)
    return LandmarkResult(
        nme=float(of_image.mean()),
        failure_rate=float((of_image > FAILURE_THRESHOLD).mean()),
        auc=float((curve[1:] + curve[:-1]).mean() / 2),
        point_errors=errors.mean(0),
        curve=curve,
        score=float(np.mean(scores)),
        images=len(of_image),
    )


def evaluate_landmarks(
    predict: Predict,
    dataset: LandmarkDataset,
    *,
    degrade: Degrade | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    workers: int = 0,
    description: str = "landmarks",
) -> LandmarkResult:
    """Measure one model.

    Args:
        predict: e.g. ``lambda images: dfa(images)[:2]``; may return tensors or arrays.
        dataset: made with ``labeled_only=True``.
        degrade: applied to the (B, 3, S, S) images in [-1, 1] first.
        batch_size: faces per batch.
        device: where ``predict`` wants its images.
        workers: processes that read images.
        description: of the progress bar.
    """
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, worker_init_fn=start_worker)
    errors, scores = [], []
    for batch in tqdm(loader, desc=description, disable=None, leave=False):
        images = to_float(batch.image.to(device))
        with torch.inference_mode():
            keypoints, score = predict(degrade(images) if degrade else images)
        errors.append(nme(to_numpy(keypoints), batch.keypoints.numpy(), batch.bbox.numpy()))
        scores.append(to_numpy(score).reshape(-1))
    return summarize(np.concatenate(errors), np.concatenate(scores))


def robustness(predict: Predict, dataset: LandmarkDataset, **options) -> dict[str, LandmarkResult]:
    """Measure one model under degraded images and displaced crops.

    Blur (Gaussian, pixels of the crop) and down-sampling (to n x n pixels and back) change the image; rotation
    (degrees) and shift (fraction of the crop's side) take another crop of the image.

    Args:
        predict: see ``evaluate_landmarks``.
        dataset: made with ``labeled_only=True``.
        **options: passed to ``evaluate_landmarks``.

    Returns:
        Results by condition, the first being "clean".
    """
    conditions: dict[str, tuple[LandmarkDataset, Degrade | None]] = {"clean": (dataset, None)}
    for sigma in (1, 2, 4):
        conditions[f"blur {sigma} px"] = dataset, lambda images, sigma=sigma: gaussian_blur(images, sigma)
    for side in (32, 24, 16):
        conditions[f"down-sampled to {side} px"] = dataset, lambda images, side=side: lower_resolution(images, side)
    for angle in (-30, -15, 15, 30):
        conditions[f"rotated {angle:+} degrees"] = dataset.recropped(rotation=angle), None
    for shift in ((-0.1, 0.0), (0.1, 0.0), (0.0, -0.1), (0.0, 0.1), (0.2, 0.2)):
        conditions["shifted x {:+.0%}, y {:+.0%}".format(*shift)] = dataset.recropped(shift=shift), None
    return {
        name: evaluate_landmarks(predict, variant, degrade=degrade, description=name, **options)
        for name, (variant, degrade) in conditions.items()
    }


def write_report(
    results: Mapping[str, LandmarkResult],
    folder: str | Path,
    conditions: Mapping[str, Mapping[str, LandmarkResult]] | None = None,
) -> None:
    """Write ``landmarks.json`` (all figures) and ``landmarks.png`` (the cumulative curves of all models).

    Args:
        results: by model.
        folder: created if missing.
        conditions: ``robustness`` of each model, by the same names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    document = {
        "unit": "errors are fractions of sqrt(box width * box height); rates and curves are in percent of images",
        "curve_thresholds": CURVE_THRESHOLDS.tolist(),
        "models": {name: result.as_dict() for name, result in results.items()},
        "robustness": {
            name: {condition: result.as_dict() for condition, result in table.items()}
            for name, table in (conditions or {}).items()
        },
    }
    write_atomically(Path(folder) / "landmarks.json", (json.dumps(document, indent=1) + "\n").encode())
    plot_curves(results, Path(folder) / "landmarks.png")


def plot_curves(results: Mapping[str, LandmarkResult], path: str | Path) -> None:
    """Draw the cumulative error curves of several models in one figure (the paper's Fig. 8).

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure((6, 4.5))
    axes = figure.subplots()
    for name, result in results.items():
        axes.plot(CURVE_THRESHOLDS, 100 * result.curve, label=f"{name}: NME {result.nme:.4f}")
    axes.set(xlabel="NME", ylabel="images (%)", xlim=(0, FAILURE_THRESHOLD), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)
