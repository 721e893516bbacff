"""Pictures that detectors fail over: faces that fill them, which a black border makes findable, and mere stripes."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

# A picture this many times longer than wide has no row left in the detector's input.
_THINNEST = 100
# Widths of the longer side, tried in turn: of 150 tight crops SCRFD finds 149 with the first, and the last with both.
_BORDERS = (0.5, 0.875)
_LARGEST_BORDERED = 1280  # pixels a side, twice what detectors see


class WithBorder:
    """A detector that sees a picture with a black border around it, which aligned and tight crops need to be found in.

    What it finds is told in pixels of the picture itself, so that nothing else has to know of the border.
    """

    def __init__(self, detector: Any) -> None:
        self.detector = detector

    def detect(self, img: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray | None]:
        scale = min(1.0, _LARGEST_BORDERED / max(img.shape[:2]))
        if scale < 1:  # detectors shrink it further
            img = cv2.resize(img, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        for ratio in _BORDERS:
            border = round(ratio * max(img.shape[:2]))
            wider = cv2.copyMakeBorder(img, border, border, border, border, cv2.BORDER_CONSTANT)
            boxes, landmarks = self.detector.detect(wider, *args, **kwargs)
            if len(boxes):
                break
        boxes = np.column_stack([(boxes[:, :4] - border) / scale, boxes[:, 4:]]).astype(np.float32)
        return boxes, None if landmarks is None else ((landmarks - border) / scale).astype(np.float32)


def is_stripe(image: np.ndarray) -> bool:
    """Whether a picture is empty, or so thin that detectors fail over it."""
    short, long = sorted(image.shape[:2])
    return not short or long > _THINNEST * short
