"""Predicts the landmarks of a whole set of crops: the file next to it, and a contact sheet to check."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..contact_sheet import arrange, face_cell
from ..data.crops import Crops
from ..data.face_dataset import to_network_input
from ..data.landmark_csv import write_landmark_csv
from ..dfa.aligner import DFA, canonical_keypoints, fit_to_square, square_to_crop
from ..distributed import barrier, rank_and_world_size
from ..fingerprint import fingerprint
from ..geometry import KEYPOINT_LIMIT
from .chunks import run_blocks
from .stores import FolderStore


def predict_landmarks(
    crops: Crops,
    dfa: DFA,
    out: str | Path | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Path:
    """Write the landmarks and face scores of a set of crops in the format of :mod:`.data.landmark_csv`.

    All ranks of a process group split the work. Results are kept in a hidden folder next to the file until it is
    complete: a run that is restarted with the same weights, on any number of ranks, resumes where the last one stopped,
    and repeats images that have changed.

    Args:
        crops: what :func:`open_crops` returned.
        dfa: finds the landmarks; is put in eval mode on the device.
        out: the file; None: where training and evaluation look for it.
        batch_size: crops per forward pass.
        num_workers: processes per rank that read the images.
        device: where to compute.

    Returns:
        The file.

    Raises:
        ValueError: the file already exists, or an image is damaged.
    """
    out = Path(out or crops.landmark_file)
    if out.exists():
        if rank_and_world_size()[0] == 0:
            _sweep(out)
        raise ValueError(f"{out} already exists; remove it, or choose another file")
    dfa.to(device).eval()
    weights = fingerprint(*dfa.state_dict().values(), dfa.anchors, dfa.input_shift)
    identity = {"aligner": weights, "padding": dfa.padding_ratio, "images": crops.count}
    folder = out.with_name(f".{out.name}.{fingerprint(str(identity))}.parts")
    columns = {"landmarks": ((10,), np.float32), "scores": ((), np.float32)}
    files = crops.paths or [crops.container]
    store = FolderStore(folder, columns, crops.count, identity, files, all_ranks=True)
    reading = {"batch_size": batch_size, "num_workers": num_workers, "label": "landmarks"}
    squares = _Squares(crops, dfa.image_size)
    for block, rows in run_blocks(squares, store.pending(), lambda batch: _locate(dfa, *batch, device), **reading):
        store.write(block, rows)
    landmarks, scores = store.finish()
    if rank_and_world_size()[0] == 0:
        write_landmark_csv(out, landmarks.reshape(-1, 5, 2), scores)
        _sweep(out)
    barrier()
    return out


def _sweep(out: Path) -> None:
    """Remove what was kept until the file was whole."""
    for leftover in out.parent.glob(f".{out.name}.*.parts"):
        shutil.rmtree(leftover)


@torch.inference_mode()
def _locate(
    dfa: DFA, squares: torch.Tensor, sizes: torch.Tensor, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 10) float32 coordinates and (n,) scores of a batch."""
    keypoints, scores, _ = dfa.locate(squares.to(device))
    found = zip(keypoints.float().cpu(), scores.float().cpu(), sizes.tolist(), strict=True)
    rows = np.stack([_row(points, score, *size) for points, score, size in found])
    return rows[:, :10], rows[:, 10]


class _Squares(Dataset):
    """Crops as network input, all of one size: (3, S, S) float RGB in [-1, 1], and their (width, height)."""

    def __init__(self, crops: Crops, size: int) -> None:
        self.crops, self.size = crops, size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.crops.read(index)
        square = fit_to_square(to_network_input(torch.from_numpy(image).permute(2, 0, 1)[None]), self.size)[0]
        return square, torch.tensor([image.shape[1], image.shape[0]])


def _row(keypoints: torch.Tensor, score: torch.Tensor, width: int, height: int) -> np.ndarray:
    """(11,) float32 from (5, 2) keypoints in [0, 1] of the square that the crop was fitted to."""
    keypoints = square_to_crop(keypoints, width, height, 0.0)
    if not keypoints.abs().max() <= KEYPOINT_LIMIT:  # far outside a narrow crop: no face
        keypoints, score = canonical_keypoints(width, height), torch.zeros(())
    return torch.cat([keypoints.flatten(), score[None]]).numpy()


def contact_sheet(crops: Crops, keypoints: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """An image of some crops, evenly spread over the set, with their points, numbers and scores.

    Args:
        crops: the set.
        keypoints: (N, 5, 2) xy in [0, 1] of the crops.
        scores: (N,) in [0, 1].
        count: how many to show; all, if there are fewer.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    shown = np.unique(np.linspace(0, crops.count - 1, min(count, crops.count)).round().astype(int))
    cells = [face_cell(crops.read(i), keypoints[i], f"{i}  {scores[i]:.2f}") for i in shown]
    return arrange(cells, columns=math.ceil(math.sqrt(len(cells))))


def locate_in(crops: Crops, indices: Sequence[int], dfa: DFA) -> np.ndarray:
    """(n, 5, 2) float32 keypoints in [0, 1] of some crops, as :func:`predict_landmarks` would write them."""
    squares, sizes = zip(*(_Squares(crops, dfa.image_size)[index] for index in indices), strict=True)
    return _locate(dfa.eval(), torch.stack(squares), torch.stack(sizes), "cpu")[0].reshape(-1, 5, 2)
