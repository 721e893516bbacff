"""Landmarks predicted for a whole set of crops: the file that lies beside it, and a contact sheet to look at."""

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
from ..files import atomic_path
from ..fingerprint import fingerprint
from ..geometry import KEYPOINT_LIMIT
from .chunks import cut_into_blocks, run_blocks

_CHUNK = 2048  # images whose results are saved together; what an interrupted run loses at most, on every rank


def predict_landmarks(
    crops: Crops,
    dfa: DFA,
    out: str | Path | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Path:
    """Write the landmarks and face scores of a set of crops as :mod:`.data.landmark_csv` has them.

    All ranks of a process group share the work. Results are kept in a hidden folder beside the file until all are
    there: a run that is started again with the same weights, on any number of ranks, goes on where the last one
    stopped.

    Args:
        crops: what :func:`open_crops` returned.
        dfa: finds the landmarks; is put in eval mode on the device.
        out: the file; None: where data sets and evaluators look for it.
        batch_size: crops a forward pass.
        num_workers: processes that read the images, on every rank.
        device: where to compute.

    Returns:
        The file.

    Raises:
        ValueError: the file exists already, or an image is damaged.
    """
    out = Path(out or crops.landmark_file)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it, or name another file to write to")
    dfa.to(device).eval()
    parts = out.with_name(f".{out.name}.{_fingerprint(dfa, crops)}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    rank, world_size = rank_and_world_size()
    blocks = cut_into_blocks(crops.count, _CHUNK)
    mine = [block for block in blocks[rank::world_size] if not _part(parts, block).is_file()]
    reading = {"batch_size": batch_size, "num_workers": num_workers, "label": "landmarks"}
    squares = _Squares(crops, dfa.image_size)
    for block, (rows,) in run_blocks(squares, mine, lambda batch: (_locate(dfa, *batch, device),), **reading):
        with atomic_path(_part(parts, block)) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)
    barrier()
    if rank == 0:
        rows = np.concatenate([np.load(_part(parts, block), allow_pickle=False) for block in blocks])
        write_landmark_csv(out, rows[:, :10].reshape(-1, 5, 2), rows[:, 10])
        for leftover in out.parent.glob(f".{out.name}.*.parts"):
            shutil.rmtree(leftover)
    barrier()
    return out


def _part(folder: Path, block: range) -> Path:
    return folder / f"{block.start:09d}.npy"


def _fingerprint(dfa: DFA, crops: Crops) -> str:
    """Tells results of other weights, or of another set, apart."""
    weights = [*dfa.state_dict().values(), dfa.anchors, dfa.input_shift]
    return fingerprint(f"{crops.count} {dfa.padding_ratio}", *weights)


@torch.inference_mode()
def _locate(dfa: DFA, squares: torch.Tensor, sizes: torch.Tensor, device: str | torch.device) -> np.ndarray:
    """(n, 11) float32 rows of a batch: ten coordinates and the score."""
    keypoints, scores, _ = dfa.locate(squares.to(device))
    found = zip(keypoints.float().cpu(), scores.float().cpu(), sizes.tolist(), strict=True)
    return np.stack([_row(points, score, *size) for points, score, size in found])


class _Squares(Dataset):
    """Crops as the network wants them, all of one size: (3, S, S) float RGB in [-1, 1], and their (width, height)."""

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
    """A picture of some crops, evenly spread over the set, with their points, numbers and scores.

    Args:
        crops: the set.
        keypoints: (N, 5, 2) xy in [0, 1] of the crops.
        scores: (N,) in [0, 1].
        count: how many to show; all, where there are fewer.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    shown = np.unique(np.linspace(0, crops.count - 1, min(count, crops.count)).round().astype(int))
    cells = [face_cell(crops.read(i), keypoints[i], f"{i}  {scores[i]:.2f}") for i in shown]
    return arrange(cells, columns=math.ceil(math.sqrt(len(cells))))


def locate_in(crops: Crops, indices: Sequence[int], dfa: DFA) -> np.ndarray:
    """(n, 5, 2) float32 keypoints in [0, 1] of some crops, as :func:`predict_landmarks` would write them."""
    squares, sizes = zip(*(_Squares(crops, dfa.image_size)[index] for index in indices), strict=True)
    return _locate(dfa.eval(), torch.stack(squares), torch.stack(sizes), "cpu")[:, :10].reshape(-1, 5, 2)
