"""Describes weights and their origin, for manifests and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Description:
    """A network and its origin.

    Attributes:
        source: file or folder, or "hf:owner/name@commit".
        format: of the source.
        task: "recognition" or "aligner".
        architecture: as text.
        config: what ``load_run`` (or ``load_dfa``) needs to build the network.
        color_order: of the images that the network takes.
        keypoint_convention: of the keypoints that it takes, or finds.
        parameters: how many.
        sha256: of the weights file.
        licence: of the weights.
    """

    source: str
    format: str
    task: str
    architecture: str
    config: dict[str, Any] = field(repr=False)
    color_order: str
    keypoint_convention: str
    parameters: int
    sha256: str
    licence: str = "unknown"

    def text(self) -> str:
        """Several lines of text."""
        return "\n".join(
            f"{name:<12} {value}"
            for name, value in (
                ("source", self.source),
                ("format", self.format),
                ("task", self.task),
                ("architecture", self.architecture),
                ("network", self.config.get("network", "DFA")),
                ("parameters", f"{self.parameters:,}"),
                ("colors", self.color_order),
                ("keypoints", self.keypoint_convention),
                ("sha256", self.sha256),
                ("licence", self.licence),
            )
        )
