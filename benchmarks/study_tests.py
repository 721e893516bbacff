"""What the study of KPRPE tests networks on: pairs as they are, moved, shrunk, and with wrong keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from insightface_kprpe.data.augmentation import move_keypoints, warp_images
from insightface_kprpe.data.face_dataset import to_network_input
from insightface_kprpe.data.image_codec import decode_image
from insightface_kprpe.data.verification_bin import read_verification_bin
from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.evaluation.metrics import kfold_accuracy, unit_rows
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, align_face
from insightface_kprpe.inference.embedding import embed_images
from insightface_kprpe.inference.models import Embedder

SIZE = 112
ALIGNED = ("lfw_aligned", "drawn_val_aligned", "ytf_val")  # one of these is moved
# How a test is made harder. Every crop is moved by the same amount in a direction of its own.
MOVES = {
    "rotation": (15.0, 30.0, 45.0),  # degrees, either way
    "scale": (1.2, 1.4),  # times, larger or smaller
    "shift": (0.1, 0.2),  # of the side, any way
}
RESOLUTIONS = (32, 24, 16)  # pixels that the crop is shrunk to and enlarged from
NOISE = (0.02, 0.05, 0.1)  # of the side, deviation of each coordinate
DRIFT = (0.05, 0.1)  # alpha of Eq. 12 (supplement, section 2.3): L + alpha L


@dataclass(frozen=True, eq=False)
class SetOfPairs:
    """Pairs of crops, each crop once.

    Attributes:
        name: of the set.
        images: (U, 112, 112, 3) uint8 RGB.
        keypoints: (U, 5, 2) float32 in [0, 1] of the crops.
        pairs: (P, 2) rows of ``images``.
        is_same: (P,) bool.
        people: (P, 2) who is on the images; where that is not known, each pair is a person of its own.
    """

    name: str
    images: np.ndarray
    keypoints: np.ndarray
    pairs: np.ndarray
    is_same: np.ndarray
    people: np.ndarray

    @classmethod
    def open(cls, path: Path) -> SetOfPairs:
        """Read a ``.bin`` set with its landmarks, and its people where study_data.py wrote them."""
        files = read_verification_bin(path).images
        tested = open_verification(str(path))
        number: dict[tuple[bytes, bytes], int] = {}
        rows = [number.setdefault((file, tested.keypoints[i].tobytes()), len(number)) for i, file in enumerate(files)]
        first = np.unique(rows, return_index=True)[1]
        images = np.stack([decode_image(files[i]) for i in first])
        people_file = path.with_name(f"{path.stem}_people.npy")
        people = np.load(people_file) if people_file.is_file() else np.repeat(np.arange(len(files) // 2), 2)
        pairs = np.reshape(rows, (-1, 2))
        return cls(path.stem, images, tested.keypoints[first], pairs, tested.is_same, people.reshape(-1, 2))

    @property
    def folds(self) -> int:
        """Five of LFW's ten official folds are here; other sets are cut in ten."""
        return 5 if self.name.startswith("lfw") else 10


def measure(
    embed: Embedder, tests: Sequence[SetOfPairs], uses_keypoints: bool
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Verification accuracy in percent by test, and the cosine of every pair.

    Next to the cosines, ``SET/is_same`` and ``SET/people`` are the pairs of each set.

    The first set is also tested with wrong keypoints, where the network uses them; for other networks, with its crops
    turned onto the template by right and noisy ones. The second is shrunk, the aligned one moved.
    """
    accuracy, scores = {}, {}

    def test(name: str, tested: SetOfPairs) -> None:
        rows = embed_images(embed, tested.images, tested.keypoints, flip=False)[tested.pairs]
        accuracy[name] = round(100 * kfold_accuracy(rows[:, 0], rows[:, 1], tested.is_same, tested.folds).accuracy, 3)
        scores[name] = (unit_rows(rows[:, 0]) * unit_rows(rows[:, 1])).sum(1).astype(np.float32)

    for tested in tests:
        test(tested.name, tested)
        scores |= {f"{tested.name}/is_same": tested.is_same, f"{tested.name}/people": tested.people}
    first = tests[0]
    if uses_keypoints:
        for name, keypoints in wrong_keypoints(first.keypoints).items():
            test(f"{first.name}, {name}", replace(first, keypoints=keypoints))
    else:
        test(f"{first.name}, aligned first", align(first))
        for name, keypoints in noisy(first.keypoints).items():
            test(f"{first.name}, aligned first, {name}", align(replace(first, keypoints=keypoints)))
    for side in RESOLUTIONS:
        test(f"{tests[1].name}, {side} px", replace(tests[1], images=shrink(tests[1].images, side)))
    aligned = next(tested for tested in tests if tested.name in ALIGNED)
    for kind, amounts in MOVES.items():
        for amount in amounts:
            test(f"{aligned.name}, {kind} {amount:g}", move(aligned, kind, amount))
    return accuracy, scores


def wrong_keypoints(keypoints: np.ndarray) -> dict[str, np.ndarray]:
    """By name: keypoints that are off, by little or altogether."""
    wrong = noisy(keypoints)
    wrong |= {f"keypoint drift {alpha:g}": keypoints * (1 + np.float32(alpha)) for alpha in DRIFT}
    wrong["the template's keypoints"] = np.tile(CANONICAL_KEYPOINTS, (len(keypoints), 1, 1))
    wrong["another face's keypoints"] = keypoints[np.random.default_rng(3).permutation(len(keypoints))]
    return wrong


def noisy(keypoints: np.ndarray) -> dict[str, np.ndarray]:
    """By name: keypoints with noise of several strengths, in the same directions."""
    error = np.random.default_rng(2).normal(size=keypoints.shape).astype(np.float32)
    return {f"keypoint noise {size:g}": keypoints + size * error for size in NOISE}


def align(tested: SetOfPairs) -> SetOfPairs:
    """Turn every crop onto the template by its keypoints."""
    crops = [align_face(image, points * SIZE) for image, points in zip(tested.images, tested.keypoints, strict=True)]
    images, keypoints = zip(*crops, strict=True)
    return replace(tested, images=np.stack(images), keypoints=np.stack(keypoints))


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Crops that lost their resolution: shrunk to ``side`` pixels and enlarged to what they were."""
    small = (cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images)
    return np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for image in small])


def move(tested: SetOfPairs, kind: str, amount: float, seed: int = 1) -> SetOfPairs:
    """Move every crop about its center, its keypoints along with it, by one amount each in a random direction."""
    matrix = move_matrix(len(tested.images), kind, amount, seed)
    images = to_network_input(torch.from_numpy(tested.images).permute(0, 3, 1, 2))
    parts = zip(images.split(64), matrix.split(64), strict=True)
    moved = torch.cat([warp_images(some, part).add(1).mul(127.5).round().clamp(0, 255).byte() for some, part in parts])
    keypoints = move_keypoints(torch.tensor(tested.keypoints, dtype=torch.float32), matrix)
    return replace(tested, images=moved.permute(0, 2, 3, 1).numpy(), keypoints=keypoints.numpy())


def move_matrix(count: int, kind: str, amount: float, seed: int) -> torch.Tensor:
    """(count, 2, 3) matrices from [0, 1] of the old crops to [0, 1] of the new ones."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    direction = torch.rand(count, generator=generator) * 2 * torch.pi
    angle = sign * np.deg2rad(amount) if kind == "rotation" else torch.zeros(count)
    zoom = amount**sign if kind == "scale" else torch.ones(count)
    length = amount if kind == "shift" else 0.0
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    offset = 0.5 - linear.sum(-1) * 0.5 + length * torch.stack([direction.cos(), direction.sin()], -1)
    return torch.cat([linear, offset.unsqueeze(-1)], -1)
