"""Images -> embeddings, in batches, for whatever maps crops to vectors: a torch network or an ONNX session."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..data.face_dataset import to_network_input
from ..geometry import mirror_keypoints

# (images (B, 3, 112, 112) float RGB in [-1, 1], keypoints (B, 5, 2) in [0, 1]) -> (B, D)
Embedder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TorchEmbedder:
    """A network as an :data:`Embedder`: in eval mode, on its own device, without gradients.

    Args:
        net: a backbone ``(images, keypoints) -> embeddings``; one that finds the keypoints itself does so.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.device = next(net.parameters()).device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        """Embed one batch; the network is put back into the mode it was in."""
        was_training = self.net.training
        self.net.eval()
        try:
            keypoints = None if getattr(self.net, "finds_keypoints", False) else keypoints.to(self.device)
            return self.net(images.to(self.device), keypoints).float().cpu()
        finally:
            self.net.train(was_training)


def embed_images(
    embed: Embedder,
    images: Sequence[np.ndarray],
    keypoints: np.ndarray,
    batch_size: int = 64,
    flip: bool = True,
    label: str = "embedding",
) -> np.ndarray:
    """Embed crops.

    Args:
        embed: the model.
        images: N crops (112, 112, 3) uint8 RGB; anything with ``len`` and ``[i]``, decoded when needed.
        keypoints: (N, 5, 2) float in [0, 1] of the crops.
        batch_size: crops a call of the model (twice that with ``flip``).
        flip: add the embedding of the mirrored crop, as InsightFace's verification does.
        label: what the progress bar says.

    Returns:
        (N, D) float32, not normalised.

    Raises:
        ValueError: there is not one set of keypoints for each image.
    """
    if len(images) != len(keypoints):
        raise ValueError(f"keypoints must be ({len(images)}, 5, 2), one set for each image, got {np.shape(keypoints)}")
    parts = []
    for start in tqdm(range(0, len(images), batch_size), desc=label, leave=False, disable=None):
        stop = min(start + batch_size, len(images))
        crops = np.stack([np.asarray(images[i]) for i in range(start, stop)])
        batch = to_network_input(torch.from_numpy(crops).permute(0, 3, 1, 2))
        points = torch.tensor(np.asarray(keypoints[start:stop]), dtype=torch.float32)
        embeddings = embed(batch, points)
        if flip:
            embeddings = embeddings + embed(batch.flip(-1), mirror_keypoints(points))
        parts.append(np.asarray(embeddings, dtype=np.float32))
    return np.concatenate(parts)
