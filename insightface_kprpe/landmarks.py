"""Landmarks predicted for a whole set of crops: the file that lies beside it, and a contact sheet to look at."""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .data.face_dataset import IMAGE_SUFFIXES, LANDMARK_FILE, list_people, read_image_file, to_network_input
from .data.landmark_csv import write_landmark_csv
from .data.recordio import RecordReader
from .data.verification_bin import read_verification_bin
from .dfa.aligner import DFA, canonical_keypoints, fit_to_square, square_to_crop
from .files import atomic_path, write_atomically
from .geometry import KEYPOINT_LIMIT
from .partial_fc import rank_and_world_size
from .training.checkpoint import barrier

_CHUNK = 2048  # images whose results are saved together; what an interrupted run loses at most, on every rank
_CELL = 144  # pixels of one face on a contact sheet
_COLOURS = ((80, 80, 255), (80, 255, 80), (255, 255, 80), (255, 80, 255), (80, 255, 255))  # BGR, one a point


class Crops(NamedTuple):
    """A set of face crops.

    Attributes:
        count: how many.
        read: index -> (H, W, 3) uint8 RGB.
        landmark_file: where data sets and evaluators look for the landmarks.
    """

    count: int
    read: Callable[[int], np.ndarray]
    landmark_file: Path


def open_crops(source: str | Path) -> Crops:
    """Open a set of crops in the order in which its landmark file numbers them.

    Args:
        source: a folder with ``train.rec``, a ``.rec`` file, a ``.bin`` verification set, a folder with one sub-folder
            of images a person, or a folder of images.

    Raises:
        ValueError: it is none of these, or damaged.
    """
    source = Path(source)
    if source.suffix == ".rec" or (source / "train.rec").is_file():
        reader = RecordReader(source)
        read = functools.partial(_read_record, reader, reader.image_keys)
        return Crops(len(reader.image_keys), read, reader.path.parent / LANDMARK_FILE)
    if source.suffix == ".bin" and source.is_file():
        pairs = read_verification_bin(source)
        return Crops(len(pairs.images), pairs.image, source.with_name(f"{source.stem}_{LANDMARK_FILE}"))
    if not source.is_dir():
        raise ValueError(f"source must be a .rec or .bin file, or a folder of images or with train.rec, got {source}")
    paths = [path for files in list_people(source) for path in files]
    paths = paths or sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"source must be a folder of images or with train.rec, got {source} without any")
    return Crops(len(paths), functools.partial(_read_path, paths), source / LANDMARK_FILE)


def _read_record(reader: RecordReader, keys: np.ndarray, index: int) -> np.ndarray:
    return reader.read_image(int(keys[index]))[1]


def _read_path(paths: list[Path], index: int) -> np.ndarray:
    return read_image_file(paths[index])


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
    starts = range(0, crops.count, _CHUNK)
    mine = [start for start in starts[rank::world_size] if not _part(parts, start).is_file()]
    for start, rows in _predict(crops, dfa, mine, batch_size, num_workers, device):
        with atomic_path(_part(parts, start)) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)
    barrier()
    if rank == 0:
        rows = np.concatenate([np.load(_part(parts, start), allow_pickle=False) for start in starts])
        write_landmark_csv(out, rows[:, :10].reshape(-1, 5, 2), rows[:, 10])
        for leftover in out.parent.glob(f".{out.name}.*.parts"):
            shutil.rmtree(leftover)
    barrier()
    return out


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.npy"


def _fingerprint(dfa: DFA, crops: Crops) -> str:
    """Tells results of other weights, or of another set, apart."""
    digest = hashlib.sha256(f"{crops.count} {dfa.padding_ratio}".encode())
    for tensor in [*dfa.state_dict().values(), dfa.anchors, dfa.input_shift]:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _predict(
    crops: Crops, dfa: DFA, starts: list[int], batch_size: int, num_workers: int, device: str | torch.device
) -> Iterator[tuple[int, np.ndarray]]:
    """Chunk by chunk, its first image and (n, 11) float32 rows: ten coordinates and the score."""
    chunks = [range(start, min(start + _CHUNK, crops.count)) for start in starts]
    batches = [list(chunk[i : i + batch_size]) for chunk in chunks for i in range(0, len(chunk), batch_size)]
    loader = DataLoader(_Squares(crops, dfa.image_size), batch_sampler=batches, num_workers=num_workers)
    results = iter(loader)
    hidden = None if rank_and_world_size()[0] == 0 else True
    with torch.inference_mode(), tqdm(total=sum(map(len, chunks)), desc="landmarks", disable=hidden) as progress:
        for chunk in chunks:
            rows: list[np.ndarray] = []
            while len(rows) < len(chunk):
                squares, sizes = next(results)
                keypoints, scores, _ = dfa.locate(squares.to(device))
                found = zip(keypoints.float().cpu(), scores.float().cpu(), sizes.tolist(), strict=True)
                rows += [_row(points, score, *size) for points, score, size in found]
                progress.update(len(squares))
            yield chunk.start, np.stack(rows)


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
    columns = math.ceil(math.sqrt(len(shown)))
    sheet = np.zeros((math.ceil(len(shown) / columns) * _CELL, columns * _CELL, 3), np.uint8)
    for place, index in enumerate(shown):
        cell = _draw_face(crops.read(index), keypoints[index])
        label = f"{index}  {scores[index]:.2f}"
        for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(cell, label, (4, _CELL - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, colour, width, cv2.LINE_AA)
        row, column = divmod(place, columns)
        sheet[row * _CELL : (row + 1) * _CELL, column * _CELL : (column + 1) * _CELL] = cell
    return sheet


def _draw_face(image: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """A crop (RGB) in the middle of a cell (BGR), with its points."""
    height, width = image.shape[:2]
    scale = _CELL / max(width, height)
    new = max(1, round(width * scale)), max(1, round(height * scale))
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    left, top = (_CELL - new[0]) // 2, (_CELL - new[1]) // 2
    cell = np.zeros((_CELL, _CELL, 3), np.uint8)
    cell[top : top + new[1], left : left + new[0]] = cv2.resize(image[..., ::-1], new, interpolation=smooth)
    for (x, y), colour in zip(keypoints, _COLOURS, strict=True):
        centre = round(left + float(x) * new[0]), round(top + float(y) * new[1])
        cv2.circle(cell, centre, 3, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(cell, centre, 2, colour, -1, cv2.LINE_AA)
    return cell


def write_contact_sheet(path: str | Path, sheet: np.ndarray) -> None:
    """Write (H, W, 3) uint8 BGR as PNG."""
    write_atomically(path, cv2.imencode(".png", sheet)[1].tobytes())
