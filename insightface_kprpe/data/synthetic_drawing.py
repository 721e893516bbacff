"""Puts a drawn head on an image: anti-aliased polygons, then relief shading; and the room and camera around it."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from .synthetic_anatomy import drop_jaw, lay_out
from .synthetic_people import EXPRESSIONS, Appearance, Color, Identity

_SHIFT = 5  # OpenCV draws polygons with this many fractional bits
_GRID_X = np.linspace(-2.0, 2.0, 48, dtype=np.float32)  # where light is computed, in face units
_GRID_Y = np.linspace(-2.6, 2.6, 56, dtype=np.float32)
_GRID_TO_FACE = np.array(
    [[_GRID_X[1] - _GRID_X[0], 0, _GRID_X[0]], [0, _GRID_Y[1] - _GRID_Y[0], _GRID_Y[0]], [0, 0, 1]], dtype=np.float64
)
# Shadows on skin are warmer than light: red falls less than blue. Rows: light on the grid; columns: canvas channels.
_LEVEL = np.arange(256)[:, None]
_WARMTH = np.rint(128 + (_LEVEL - 128) * [0.88, 1.0, 1.06, 0.0]).clip(0, 255).astype(np.uint8)[None]


class Head(NamedTuple):
    """A person's head, ready to be posed and drawn."""

    identity: Identity
    points: np.ndarray  # (N, 4) float32, see synthetic_anatomy
    movement: np.ndarray  # (6, 4 M) float32: what each expression adds to the first M points
    shapes: list[tuple[list[slice], Color, float]]  # polygons as slices of points, color, thickness
    landmarks: slice
    outline: slice
    hills: slice
    relief: np.ndarray  # (K, 4) float32
    chin_y: float


def build_head(person: Identity) -> Head:
    """Gather all of a person's shapes in one array, those that expressions move first."""
    anatomy = lay_out(person)
    hill_centers, relief = _hills(person, anatomy.mouth_y, anatomy.chin_y)
    polygons = [anatomy.landmarks, anatomy.outline, hill_centers]
    polygons += [polygon for shape in anatomy.shapes for polygon in shape.polygons]
    order = sorted(range(len(polygons)), key=lambda i: polygons[i].ndim == 2)
    ends = np.cumsum([polygons[i].shape[-2] for i in order]).tolist()
    place = {i: slice(end - polygons[i].shape[-2], end) for i, end in zip(order, ends, strict=True)}
    places = iter(place[i] for i in range(len(polygons)))
    landmarks, outline, hills = next(places), next(places), next(places)
    moving = np.concatenate([polygon for polygon in polygons if polygon.ndim == 3], 1)
    return Head(
        identity=person,
        points=np.concatenate([moving[0], *[polygon for polygon in polygons if polygon.ndim == 2]]).astype(np.float32),
        movement=(moving[1:] - moving[0]).reshape(len(EXPRESSIONS), -1).astype(np.float32),
        shapes=[([next(places) for _ in shape.polygons], shape.color, shape.width) for shape in anatomy.shapes],
        landmarks=landmarks,
        outline=outline,
        hills=hills,
        relief=relief,
        chin_y=anatomy.chin_y,
    )


def _hills(p: Identity, mouth_y: float, chin_y: float) -> tuple[np.ndarray, np.ndarray]:
    """Relief as Gaussian hills, and shadows with them: centers (7, K, 4); width, height, relief, darkness (K, 4)."""
    e, nl, nw, n = 0.5 * p.eye_distance, p.nose_length, p.nose_width, p.nose_relief
    pairs = [
        (e, -0.8 * p.brow_height, 0.95, 0.3, 0.11, 0.09, 0.0),  # brow ridge
        (e, 0.02, 0.9, 0.62 * p.eye_width, 0.17, -0.1, 0.12),  # eye socket
        (e * 0.45, 0.0, 0.9, 0.1, 0.14, -0.05, 0.1),  # inner corner
        (e, 0.30, 0.92, 0.2, 0.05, -0.02, 0.05),  # under the eye
        (0.72, 0.48, 0.8, 0.26, 0.22, 0.16 * p.cheekbone, 0.0),
        (0.66 * p.head_width, 1.0, 0.75, 0.2, 0.3, -0.08 * p.cheekbone, 0.0),  # hollow below it
        (0.8 * nw, nl + 0.05, 1.1, 0.09, 0.09, 0.08 * n, 0.0),  # wings of the nose
        (0.9 * p.head_width, -0.45, 0.5, 0.2, 0.35, -0.07, 0.0),  # temples
    ]
    middle = [
        (0.0, 0.05, 1.05, p.nose_bridge, 0.22, 0.08 * n, 0.0),
        (0.5 * p.nose_shift, 0.5 * nl, 1.2, p.nose_bridge + 0.02, 0.22, 0.12 * n, 0.0),
        (p.nose_shift, nl - 0.02, 1.34, 0.55 * nw + 0.02, 0.13, 0.2 * n, 0.0),
        (p.nose_shift, nl + 0.2, 1.12, 0.9 * nw, 0.05, 0.0, 0.16),  # its shadow
        (0.0, mouth_y - 0.16, 1.1, 0.05, 0.08, -0.02, 0.03),  # philtrum
        (0.0, mouth_y + 0.6 * p.lower_lip, 1.1, 0.25, 0.05, 0.05, 0.0),
        (0.0, mouth_y + p.lower_lip + 0.1, 1.05, 0.24, 0.06, -0.05, 0.12),  # below the lips
        (0.0, chin_y - 0.24, 1.0, 0.24, 0.17, 0.1, 0.0),
        (0.0, -1.0, 0.95, 0.55, 0.35, 0.06, 0.0),  # forehead
        (0.0, chin_y + 0.32, 0.3, 1.0, 0.2, 0.0, 0.35),  # the head's shadow on the neck
    ]
    hills = np.array([*pairs, *[(-row[0], *row[1:]) for row in pairs], *middle])
    centers = np.column_stack([hills[:, :3], np.ones(len(hills))])
    return drop_jaw(centers), hills[:, 3:].astype(np.float32)


def pose_head(head: Head, look: Appearance) -> np.ndarray:
    """Where all points of a head are seen from the front: (N, 2) float32 in face units."""
    points = head.points.copy()
    moving = head.movement.shape[1] // 4
    points[:moving] += (look.expression @ head.movement).reshape(moving, 4)
    cos_yaw, sin_yaw = math.cos(look.yaw), math.sin(look.yaw)
    x, y, z, s = points.T
    posed = np.empty((len(points), 2), np.float32)
    posed[:, 0] = x * (1 + s * (cos_yaw - 1)) + z * sin_yaw
    posed[:, 1] = y * (1 + s * (math.cos(look.pitch) - 1)) + (z * cos_yaw - s * x * sin_yaw) * math.sin(look.pitch)
    return posed


def draw_body(canvas: np.ndarray, head: Head, look: Appearance, matrix: np.ndarray) -> None:
    """Draw upright shoulders down to the lower edge; arguments as in :func:`draw_head`, to be called before it."""
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    w = head.identity.head_width
    x = np.array([0.5, 0.75, 1.3 * w, 1.9 * w, 2.3 * w, 2.55 * w, 2.68 * w, 2.75 * w, 2.8 * w])
    half = np.column_stack([x, [0.3, 0.45, 0.68, 0.86, 1.05, 1.35, 1.8, 3.0, 60.0]])
    body = np.concatenate([half, half[::-1] * (-1, 1)]) * scale + matrix @ (0.0, head.chin_y, 1.0)
    cv2.fillPoly(canvas, [_fixed_point(body)], (*look.clothes, 0), cv2.LINE_AA, _SHIFT)


def draw_head(canvas: np.ndarray, head: Head, look: Appearance, posed: np.ndarray, matrix: np.ndarray) -> None:
    """Draw a person's head and neck over an image.

    Args:
        canvas: (H, W, 4) uint8 RGB and a scratch channel, changed in place; the image is the background.
        head: who.
        look: how.
        posed: (N, 2) points of the head, from ``pose_head(head, look)``.
        matrix: (2, 3) similarity from face units to pixels of ``canvas``.
    """
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    pixels = _fixed_point(posed @ matrix[:, :2].T + matrix[:, 2])
    canvas[..., 3] = 0
    *shaded, catch_lights = head.shapes
    for where, color, width in shaded:
        _draw(canvas, [pixels[at] for at in where], (*color, 255), width * scale)
    light = cv2.LUT(cv2.merge([_light_map(head, look, posed[head.hills])] * 4), _WARMTH)
    light = cv2.warpAffine(light, matrix @ _GRID_TO_FACE, canvas.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    person = cv2.compare(cv2.extractChannel(canvas, 3), 128, cv2.CMP_GE)
    cv2.copyTo(cv2.multiply(canvas, light, scale=1 / 128), person, canvas)
    where, color, _ = catch_lights
    _draw(canvas, [pixels[at] for at in where], (*color, 255), 0)


def _fixed_point(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, -9999, 9999) * (1 << _SHIFT)).astype(np.int32)


def _draw(canvas: np.ndarray, polygons: list[np.ndarray], color: tuple[float, ...], thickness: float) -> None:
    if thickness:
        cv2.polylines(canvas, polygons, False, color, max(1, round(thickness)), cv2.LINE_AA, _SHIFT)
    else:
        cv2.fillPoly(canvas, polygons, color, cv2.LINE_AA, _SHIFT)


def _light_map(head: Head, look: Appearance, hills: np.ndarray) -> np.ndarray:
    """How much light reaches each point of the grid: (56, 48) uint8, 128 is neutral.

    The relief is an ellipsoid plus a sum of Gaussian hills; as those are separable, the sum and its slopes are matrix
    products of what each hill contributes to a column and to a row.
    """
    p = head.identity
    sx, sy, height, dark = head.relief.T[:, :, None]
    dx, dy = (_GRID_X - hills[:, :1]) / sx, (_GRID_Y - hills[:, 1:]) / sy
    gx, gy = (np.exp(np.maximum(-0.5 * offset * offset, -30)) for offset in (dx, dy))  # no slow denormal numbers
    dome_x = (_GRID_X - 0.25 * math.sin(look.yaw)) / (1.22 * p.head_width)
    dome_y = ((_GRID_Y - 0.5 * (head.chin_y - p.head_top)) / (0.62 * (head.chin_y + p.head_top)))[:, None]
    nx = 0.9 * dome_x + (height * gy).T @ (dx / sx * gx)
    ny = 0.7 * dome_y + (height * dy / sy * gy).T @ gx
    nz2 = np.maximum(1 - dome_x * dome_x - dome_y * dome_y, 0.06)
    lx, ly, lz = look.light
    lit = (lx * nx + ly * ny + lz * np.sqrt(nz2)) / np.sqrt(nx * nx + ny * ny + nz2)
    light = (look.ambient + (1.1 - look.ambient) * np.maximum(lit, 0)) * (1 - (dark * gy).T @ gx)
    return np.clip(128 * light, 20, 255).astype(np.uint8)


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An out-of-focus room, soft blobs and a few edges: (height, width, 4) uint8."""
    blobs = rng.uniform(50, 200) + rng.normal(0, 30, (5, 5, 1)) + rng.normal(0, 12, (5, 5, 4))
    room = cv2.resize(np.clip(blobs, 0, 255).astype(np.uint8), (40, 40), interpolation=cv2.INTER_CUBIC)
    corners, extents = rng.integers(-8, 40, (3, 2)), rng.integers(3, 30, (3, 2))
    colors = rng.uniform(30, 210, (3, 1)) + rng.normal(0, 18, (3, 3))
    for corner, extent, color in zip(corners.tolist(), extents.tolist(), colors.tolist(), strict=True):
        cv2.rectangle(room, (*corner, *extent), (*color, 0), -1)
    return cv2.resize(room, (width, height), interpolation=cv2.INTER_CUBIC)


def lose_detail(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """One image in four is enlarged from fewer pixels."""
    if rng.random() > 0.25:
        return image
    ratio = rng.uniform(0.45, 0.9)
    small = cv2.resize(image, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Camera: focus, exposure, white balance, contrast and noise; (H, W, 4) -> (H, W, 3) uint8 RGB."""
    image = cv2.cvtColor(canvas, cv2.COLOR_RGBA2RGB)
    image = cv2.GaussianBlur(image, (5, 5), rng.uniform(0.3, 0.8))
    gain = np.exp(rng.normal(0, 0.18) + rng.normal(0, 0.05, 3))
    gamma = np.exp(rng.normal(0, 0.15))
    curve = np.clip(255 * (gain * np.linspace(0, 1, 256)[:, None]) ** gamma, 0, 255).astype(np.uint8)
    image = cv2.LUT(image, curve[None])
    noise = np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape)
    strength = rng.uniform(0.0, 0.1)
    return cv2.addWeighted(image, 1.0, noise, strength, -127.5 * strength)
