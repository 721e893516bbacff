"""What one model measured on one protocol."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """One model on one protocol, one way.

    Attributes:
        model: what tables call the model.
        protocol: e.g. "IJB-C 1:1".
        metrics: name -> value; rates in percent (``tpr_at_fpr_0.0001``, ``rank_1``), thresholds as cosines.
        settings: everything that is needed to get the numbers again (alignment, flip, fusion, source of the keypoints,
            threshold rule, counts), as one reads it.
        variant: what tells this result from others of the same model and protocol, e.g. the fusion.
        roc: false and true positive rates, fractions, both ascending; None where the protocol has none.
        cmc: (R,) identification rate in percent at rank 1 to R; None where the protocol has none.
    """

    model: str
    protocol: str
    metrics: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    roc: tuple[np.ndarray, np.ndarray] | None = None
    cmc: np.ndarray | None = None

    @property
    def name(self) -> str:
        """Model and variant."""
        return f"{self.model}, {self.variant}" if self.variant else self.model
