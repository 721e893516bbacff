"""The result of one model on one protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """The result of one model on one protocol, in one variant.

    Attributes:
        model: what tables call the model.
        protocol: e.g. "IJB-C 1:1".
        metrics: name -> value; rates as fractions (``tpr_at_fpr_0.0001``, ``rank_1``), thresholds as cosines (with
            "thresh" in their names), counts as int.
        settings: everything that is needed to get the numbers again (alignment, flip, fusion, source of the keypoints,
            threshold rule, counts), as text.
        variant: distinguishes this result from others of the same model and protocol, e.g. the fusion.
        roc: false and true positive rates, fractions, both ascending; None if the protocol has none.
        cmc: (R,) identification rate, a fraction, at rank 1 to R; None if the protocol has none.
    """

    model: str
    protocol: str
    metrics: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    roc: tuple[np.ndarray, np.ndarray] | None = None
    cmc: np.ndarray | None = None

    @property
    def percent(self) -> dict[str, float]:
        """The metrics as shown in tables and ``report.json``: rates in percent, everything else unchanged."""
        return {
            name: value if "thresh" in name or isinstance(value, int) else round(100 * value, 10)
            for name, value in self.metrics.items()
        }

    @property
    def name(self) -> str:
        """Model and variant."""
        return f"{self.model}, {self.variant}" if self.variant else self.model
