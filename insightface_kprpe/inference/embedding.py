"""Images -> embeddings, for every protocol: in batches, split among ranks, in memory or in a resumable folder.

Any callable may map crops to vectors; :mod:`.models` creates one from torch weights or an ONNX file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.face_dataset import to_network_input
from ..dfa.aligner import DFA
from ..fingerprint import fingerprint
from ..geometry import CANONICAL_KEYPOINTS, SCORE_THRESHOLD, mirror_keypoints
from .chunks import run_blocks
from .models import Embedder, EmbedFunction, as_embedder
from .stores import Columns, FolderStore, MemoryStore

logger = logging.getLogger(__name__)

SIZE = 112
_SHOWN = 5  # unreadable images that a warning names


class Embeddings(NamedTuple):
    """The results for N images; where ``readable`` is False, the other values are zeros.

    Attributes:
        embeddings: (N, D) float32, not normalized; with flip test the sum of both. A memory map if requested.
        norms: (N,) float32, their lengths.
        keypoints: (N, 5, 2) float32 in [0, 1] of the crops: where the aligner found them, or those that were given.
            NaN if the network does not report them.
        scores: (N,) float32, face score of the aligner in [0, 1]; NaN where there is no aligner.
        readable: (N,) bool.
    """

    embeddings: np.ndarray
    norms: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray
    readable: np.ndarray


@dataclass(frozen=True)
class EmbedOptions:
    """How to embed, whatever the protocol.

    Attributes:
        batch_size: crops per call of the model; it is called a second time for the mirrored crops.
        flip: add the embedding of the mirrored crop, as InsightFace's evaluations do.
        num_workers: processes per rank that read images ahead; 0: none.
        aligner: finds the keypoints of every crop, instead of those given.
        aligner_name: its name in reports.
        missing: what to do about an image that is missing or damaged: "fail", or "skip" it and count it.
        cache: folder in which every set gets one for its embeddings, as memory maps that an interrupted run resumes;
            None: they are kept in memory.
        all_ranks: all ranks of the process group make the same call and split the work; False: this rank does all of
            it.
    """

    batch_size: int = 64
    flip: bool = True
    num_workers: int = 0
    aligner: DFA | None = None
    aligner_name: str = "DFA"
    missing: Literal["fail", "skip"] = "fail"
    cache: Path | None = None
    all_ranks: bool = False


def embed_faces(
    embed: Embedder | EmbedFunction,
    images: Sequence[np.ndarray | None],
    keypoints: np.ndarray | None = None,
    options: EmbedOptions | None = None,
    *,
    name: str = "images",
    source: str = "",
    files: Sequence[Path] | None = None,
) -> Embeddings:
    """Embed crops; used by all protocols.

    The network uses the first of these keypoints: those that it finds itself, those of ``options.aligner``, those
    given, the canonical ones. An aligner's keypoints with a score below 0.5 are reported but not used.

    Args:
        embed: the model.
        images: N crops (112, 112, 3) uint8 RGB; anything with ``len`` and ``[i]``, decoded when needed. An image that
            is None, or raises ValueError or OSError, is a missing one.
        keypoints: (N, 5, 2) float in [0, 1] of the crops.
        options: how; None: the defaults.
        name: of the set, for the progress bar, errors and the folder in ``options.cache``.
        source: text that identifies this set of images; a cached result of another one is refused.
        files: the image files, one for each image, or the one file with all of them: those that have changed since are
            embedded again. None if ``source`` identifies the content.

    Raises:
        ValueError: shapes do not fit, an image is missing and ``options.missing`` is "fail", or the cache holds
            embeddings of something else.
    """
    embed, options = as_embedder(embed), options or EmbedOptions()
    if options.missing not in ("fail", "skip"):
        raise ValueError(f"missing must be 'fail' or 'skip', got {options.missing!r}")
    if not len(images) or (keypoints is not None and np.shape(keypoints) != (len(images), 5, 2)):
        raise ValueError(
            f"{name}: keypoints must be ({len(images)}, 5, 2), one set per image, and at least one image, got "
            f"{np.shape(keypoints)}"
        )
    store = _open_store(embed, len(images), keypoints, options, name, source, files)
    embed_batch = _EmbedBatch(embed, keypoints, options, name)
    reading = {"batch_size": options.batch_size, "num_workers": options.num_workers, "label": f"embedding {name}"}
    for block, rows in run_blocks(_Crops(images), store.pending(), embed_batch, **reading):
        store.write(block, rows)
    result = Embeddings(*store.finish())
    missing = np.flatnonzero(~result.readable)
    if len(missing) == len(images) or (len(missing) and options.missing == "fail"):
        raise ValueError(
            f"{name}: {len(missing)} of {len(images)} images could not be read (first: number {missing[0]})"
        )
    if len(missing):
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        logger.warning(
            "%s: %d of %d images could not be read and are left out: %s", name, len(missing), len(images), shown
        )
    return result


def embed_images(
    embed: Embedder | EmbedFunction,
    images: Sequence[np.ndarray],
    keypoints: np.ndarray,
    batch_size: int = 64,
    flip: bool = True,
    label: str = "images",
) -> np.ndarray:
    """(N, D) float32 embeddings alone, in memory and by this process; arguments as for :func:`embed_faces`."""
    return embed_faces(embed, images, keypoints, EmbedOptions(batch_size, flip), name=label).embeddings


class _Crops(Dataset):
    """Index -> (crop, index, what is wrong with it): faults are sent as text, as workers garble exceptions."""

    def __init__(self, images: Sequence[np.ndarray | None]) -> None:
        self.images = images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, str]:
        blank = np.zeros((SIZE, SIZE, 3), np.uint8)
        try:
            image = self.images[index]
        except (ValueError, OSError) as error:
            return blank, index, str(error) or type(error).__name__
        if image is None:
            return blank, index, "file not found"
        image = np.asarray(image)
        if image.shape != blank.shape or image.dtype != np.uint8:
            return blank, index, f"it must be (112, 112, 3) uint8 RGB, got {image.shape} {image.dtype}"
        return image, index, ""


class _EmbedBatch:
    """A batch of crops -> its rows of :class:`Embeddings`."""

    def __init__(self, embed: Embedder, keypoints: np.ndarray | None, options: EmbedOptions, name: str) -> None:
        self.embed, self.keypoints, self.options, self.name = embed, keypoints, options, name
        self.any_readable = False

    @torch.inference_mode()
    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor, list[str]]) -> tuple[np.ndarray, ...]:
        crops, indices, faults = batch
        faulty = np.array([bool(fault) for fault in faults])
        self.any_readable |= not faulty.all()
        if faulty.any() and self.options.missing == "fail":
            first = int(faulty.argmax())
            remedy = "; or choose to skip such images" if self.any_readable else "; no image could be read so far"
            raise ValueError(f"{self.name}: image {int(indices[first])}: {faults[first]}{remedy}")
        images = to_network_input(crops.to(self.embed.device).permute(0, 3, 1, 2))
        given = None if self.keypoints is None else np.asarray(self.keypoints[indices.numpy()], dtype=np.float32)
        used, reported, scores = self._keypoints(images, given)
        embeddings = self.embed(images, used)
        if self.options.flip:
            mirrored = images.flip(-1)
            aligner = self.options.aligner
            seen = mirror_keypoints(used) if aligner is None else _trusted(*aligner.locate(mirrored)[:2])
            embeddings = embeddings + self.embed(mirrored, seen)
        embeddings = embeddings.float().cpu().numpy().copy()  # the model may not report its own
        rows = (embeddings, np.linalg.norm(embeddings, axis=1), reported, scores)
        for values in rows:
            values[faulty] = 0
        return *rows, ~faulty

    def _keypoints(self, images: torch.Tensor, given: np.ndarray | None) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Keypoints for the network, keypoints to report, and scores."""
        aligner = self.options.aligner
        locate = self.embed.locate if aligner is None else aligner.locate
        if locate is not None:
            located, scores = locate(images)[:2]
            return _trusted(located, scores), located.float().cpu().numpy(), scores.float().cpu().numpy()
        used = np.tile(CANONICAL_KEYPOINTS, (len(images), 1, 1)) if given is None else given
        reported = np.full_like(used, np.nan) if self.embed.finds_keypoints else used.copy()
        return torch.from_numpy(used).to(images.device), reported, np.full(len(images), np.nan, np.float32)


def _trusted(keypoints: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """An aligner's keypoints, or the canonical ones where its score is low."""
    canonical = torch.tensor(CANONICAL_KEYPOINTS).to(keypoints)
    return torch.where((scores >= SCORE_THRESHOLD)[:, None, None], keypoints, canonical)


def _open_store(
    embed: Embedder,
    count: int,
    keypoints: np.ndarray | None,
    options: EmbedOptions,
    name: str,
    source: str,
    files: Sequence[Path] | None,
) -> MemoryStore | FolderStore:
    if options.cache is None:
        return MemoryStore(count, options.all_ranks)
    model = embed.fingerprint()
    if model is None or not source:
        raise ValueError(
            "to cache embeddings, embed must come from open_model and source must be a fingerprint of the images"
        )
    blank = torch.zeros(1, 3, SIZE, SIZE), torch.tensor(CANONICAL_KEYPOINTS)[None]
    aligner = options.aligner
    identity = {
        "model": f"{embed.name} {model}",
        "precision": embed.precision,
        "images": f"{source} ({count})",
        "keypoints": "none" if keypoints is None else fingerprint(np.asarray(keypoints, np.float32)),
        "aligner": "none" if aligner is None else fingerprint(*aligner.state_dict().values()),
        "flip": options.flip,
    }
    dimension = embed(*blank).shape[1]
    columns: Columns = {
        "embeddings": ((dimension,), np.float32),
        "norms": ((), np.float32),
        "keypoints": ((5, 2), np.float32),
        "scores": ((), np.float32),
        "readable": ((), bool),
    }
    folder = Path(options.cache) / f"{embed.name}-{name}"
    return FolderStore(folder, columns, count, {**identity, "dimension": dimension}, files, options.all_ranks)
