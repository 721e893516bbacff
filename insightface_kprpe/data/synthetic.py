"""Faces drawn from a seed: people with an identity, images of them with five exact landmarks, and group photos.

Every image depends only on (seed, identity, instance): person 7 of seed 0 is the same person in every data
set, whatever the order of access and the number of workers. Identity is in the shapes; the colors of people are
similar, and the light, exposure and white balance of each image blur them further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from ..geometry import estimate_alignment, transform_points
from .synthetic_drawing import (
    Head,
    build_head,
    draw_background,
    draw_body,
    draw_head,
    lose_detail,
    photograph,
    pose_head,
)
from .synthetic_people import Appearance, sample_appearance, sample_identity, sample_light

_PERSON, _PICTURE, _SCENE, _PAIRS = range(4)  # kinds of random streams


@dataclass(frozen=True)
class SyntheticScene:
    """A group photo of F people, from the back row to the front; boxes reach from the hairline to the chin."""

    image: np.ndarray  # (H, W, 3) uint8 RGB; FaceAnalysis takes BGR: image[:, :, ::-1]
    boxes: np.ndarray  # (F, 4) float32, xyxy in pixels
    landmarks_px: np.ndarray  # (F, 5, 2) float32
    identities: np.ndarray  # (F,) int64


class _Placed(NamedTuple):
    """Someone in a scene: who, how, where; ``cover`` is the box of all that the head hides, hair and neck included."""

    identity: int
    head: Head
    look: Appearance
    posed: np.ndarray
    matrix: np.ndarray
    box: np.ndarray
    cover: np.ndarray


class SyntheticFaces:
    """A map-style data set of drawn faces: ``[i] -> (image, label, keypoints)``.

    Args:
        num_identities: how many people.
        images_per_identity: images of each.
        seed: another seed gives other people.
        aligned: True: crops aligned with InsightFace's template, as after a detector; False: loose turned boxes.
        size: side of the crop in pixels.
        first_identity: number of the first person, so that one seed can give sets with different people.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(
        self,
        num_identities: int,
        images_per_identity: int,
        seed: int = 0,
        aligned: bool = True,
        size: int = 112,
        first_identity: int = 0,
    ) -> None:
        _check_at_least(1, num_identities=num_identities, images_per_identity=images_per_identity)
        _check_at_least(0, seed=seed, first_identity=first_identity)
        _check_at_least(16, size=size)
        self.seed, self.aligned, self.size, self.first_identity = seed, aligned, size, first_identity
        self.num_identities, self.images_per_identity = num_identities, images_per_identity
        self.labels = np.repeat(np.arange(num_identities, dtype=np.int64), images_per_identity)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Draw one face: (size, size, 3) uint8 RGB, label from 0, (5, 2) float32 keypoints in [0, 1] of the crop."""
        label = int(self.labels[index])  # raises IndexError past the end
        instance = int(index) % self.images_per_identity
        image, keypoints = draw_face(
            self.first_identity + label, instance, self.seed, aligned=self.aligned, size=self.size
        )
        return image, label, keypoints


def draw_face(
    identity: int, instance: int, seed: int = 0, aligned: bool = True, size: int = 112
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image of one person.

    Args:
        identity: which person, from 0.
        instance: which of the person's images, from 0; decides pose, expression, light, background and crop.
        seed: seed of the people.
        aligned: as in :class:`SyntheticFaces`.
        size: side of the crop in pixels.

    Returns:
        The (size, size, 3) uint8 RGB crop and (5, 2) float32 keypoints in [0, 1] of it.

    Raises:
        ValueError: a number is negative or ``size`` below 16.
    """
    _check_at_least(0, identity=identity, instance=instance, seed=seed)
    _check_at_least(16, size=size)
    rng = np.random.default_rng([seed, _PICTURE, identity, instance])
    head, look = _person(seed, identity), sample_appearance(rng)
    posed = pose_head(head, look)
    points = posed[head.landmarks]
    if aligned:
        matrix = estimate_alignment(points + rng.normal(0, 0.02, (5, 2)), size)
    else:
        matrix = _loose_crop(rng, _face(head, posed), size)
    canvas = draw_background(rng, size, size)
    draw_body(canvas, head, look, matrix)
    draw_head(canvas, head, look, posed, matrix)
    return photograph(rng, lose_detail(rng, canvas)), (transform_points(points, matrix) / size).astype(np.float32)


def draw_scene(
    identities: Sequence[int],
    size: tuple[int, int] = (320, 320),
    seed: int = 0,
    face_size: tuple[float, float] = (24.0, 120.0),
    instance: int = 0,
) -> SyntheticScene:
    """Draw a group photo: people of various sizes whose faces do not cover each other.

    Args:
        identities: which people. People for whom there is no room are left out.
        size: height and width in pixels.
        seed: seed of the people.
        face_size: least and greatest height of a face's box in pixels.
        instance: which photo of these people.

    Returns:
        The photo, and where the faces are in it.

    Raises:
        ValueError: a number is negative, the photo is smaller than 32 pixels or ``face_size`` is not such a range.
    """
    height, width = size
    _check_at_least(32, height=height, width=width)
    _check_at_least(0, seed=seed, instance=instance, identities=min(identities, default=0))
    if not 8 <= face_size[0] <= face_size[1]:
        raise ValueError(
            f"face_size must be (least, greatest) height in pixels with 8 <= least <= greatest, got {face_size}"
        )
    rng = np.random.default_rng([seed, _SCENE, instance, *identities])
    canvas = draw_background(rng, height, width)
    lamp = sample_light(rng)
    placed: list[_Placed] = []
    for identity in identities:
        found = _place(rng, identity, _person(seed, identity), lamp, placed, size, face_size)
        if found is not None:
            placed.append(found)
    placed.sort(key=lambda person: person.box[3])  # people lower in the image are in front
    for person in placed:
        draw_body(canvas, person.head, person.look, person.matrix)
        _draw_head_in_scene(canvas, person)
    points = [transform_points(person.posed[person.head.landmarks], person.matrix) for person in placed]
    return SyntheticScene(
        photograph(rng, canvas),
        np.array([person.box for person in placed], dtype=np.float32).reshape(-1, 4),
        np.array(points, dtype=np.float32).reshape(-1, 5, 2),
        np.array([person.identity for person in placed], dtype=np.int64),
    )


def verification_pairs(
    num_identities: int, pairs: int, seed: int = 0, first_identity: int = 0, aligned: bool = True, size: int = 112
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw pairs of faces, by turns of the same person and of two people.

    Args:
        num_identities: how many people take part, at least 2.
        pairs: P, even, so that both kinds are equally many.
        seed: seed of the people.
        first_identity: number of the first person.
        aligned: as in :class:`SyntheticFaces`.
        size: side of the crops in pixels.

    Returns:
        Images (2P, size, size, 3) uint8 RGB, pair i being images 2i and 2i + 1; is_same (P,) bool; keypoints
        (2P, 5, 2) float32 in [0, 1].

    Raises:
        ValueError: there are fewer than two people, or ``pairs`` is odd.
    """
    _check_at_least(2, num_identities=num_identities, pairs=pairs)
    if pairs % 2:
        raise ValueError(f"pairs must be even (half same person, half different), got {pairs}")
    rng = np.random.default_rng([seed, _PAIRS, first_identity])
    is_same = np.arange(pairs) % 2 == 0
    first = rng.integers(num_identities, size=pairs)
    second = np.where(is_same, first, (first + rng.integers(1, num_identities, size=pairs)) % num_identities)
    people = first_identity + np.stack([first, second], 1).reshape(-1)
    drawn = [draw_face(int(p), 1_000_000 + i, seed, aligned=aligned, size=size) for i, p in enumerate(people)]
    return np.stack([image for image, _ in drawn]), is_same, np.stack([keypoints for _, keypoints in drawn])


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@lru_cache(maxsize=1024)
def _person(seed: int, identity: int) -> Head:
    return build_head(sample_identity(np.random.default_rng([seed, _PERSON, identity])))


def _face(head: Head, posed: np.ndarray) -> np.ndarray:
    """Contour of a posed face from the hairline to the chin, (n, 2): what a detector's box encloses."""
    contour = posed[head.outline].astype(np.float64)
    contour[:, 1] = np.maximum(contour[:, 1], -head.identity.hairline)
    return contour


def _loose_crop(rng: np.random.Generator, outline: np.ndarray, size: int) -> np.ndarray:
    """A square around the face's box, shifted, scaled by 0.8 to 1.25 and turned by up to 30 degrees."""
    low, high = outline.min(0), outline.max(0)
    zoom = size / (1.3 * (high - low).max()) * rng.uniform(0.8, 1.25)
    target = size * (0.5 + rng.uniform(-0.05, 0.05, 2))
    return _similarity(zoom, np.deg2rad(rng.uniform(-30, 30)), 0.5 * (low + high), target)


def _similarity(zoom: float, angle: float, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([linear, target - linear @ source])


def _place(
    rng: np.random.Generator,
    identity: int,
    head: Head,
    lamp: tuple[float, float, float],
    others: list[_Placed],
    size: tuple[int, int],
    face_size: tuple[float, float],
) -> _Placed | None:
    """Find room for a head where it and the others leave each other's face free: smaller and smaller, 60 tries."""
    look = sample_appearance(rng, lamp)
    posed = pose_head(head, look)
    turn = _similarity(1.0, np.deg2rad(np.clip(rng.normal(0, 9), -25, 25)), np.zeros(2), np.zeros(2))
    face, whole = (_bounds(transform_points(points, turn)) for points in (_face(head, posed), posed))
    extent = face[2:] - face[:2]
    for shrink in np.linspace(1, 0.4, 60):
        zoom = max(face_size[0], shrink * np.exp(rng.uniform(*np.log(face_size)))) / extent[1]
        room = np.array(size[::-1]) - zoom * extent - 2
        if (room < 0).any():
            continue
        shift = 1 + rng.random(2) * room - zoom * face[:2]
        box, cover = zoom * face + np.tile(shift, 2), zoom * whole + np.tile(shift, 2)
        if all(_apart(box, other.cover) and _apart(cover, other.box) for other in others):
            return _Placed(identity, head, look, posed, np.column_stack([zoom * turn[:, :2], shift]), box, cover)
    return None


def _bounds(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points.min(0), points.max(0)])


def _apart(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1])


def _draw_head_in_scene(canvas: np.ndarray, person: _Placed) -> None:
    """Draw within a window around the head; small heads are drawn larger and shrunk, for lines of less than a pixel."""
    scale = np.hypot(*person.matrix[:, 0])
    low = np.maximum(np.floor(person.cover[:2]).astype(int) - 2, 0)
    high = np.minimum(np.ceil(person.cover[2:]).astype(int) + 3, canvas.shape[1::-1])
    window = canvas[low[1] : high[1], low[0] : high[0]]
    zoom = 1 if scale > 25 else 2 if scale > 12 else 3
    enlarged = cv2.resize(window, None, fx=zoom, fy=zoom) if zoom > 1 else window.copy()
    shift = np.column_stack([np.zeros((2, 2)), low - 0.5 * (1 - 1 / zoom)])  # the center of a pixel stays where it is
    draw_head(enlarged, person.head, person.look, person.posed, zoom * (person.matrix - shift))
    window[:] = cv2.resize(enlarged, window.shape[1::-1], interpolation=cv2.INTER_AREA)
