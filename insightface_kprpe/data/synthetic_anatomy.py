"""The shapes of a drawn head: polygons in 3D and, for each expression, where their points move to.

Face units: the mean distance between the eyes is 1; x points right in the image, y down, z toward the viewer; the
origin lies between the eyes in the middle of the head. A point has four numbers (x, y, z, s): ``s`` is 1 where the
surface turns with the head and 0 on the silhouette, which keeps its width when an ellipsoid turns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .synthetic_people import Color, Identity

# Every shape is laid out for no expression and for each one alone: (7, 1) each, to broadcast with the points.
_SMILE, _OPEN, _RAISE, _WAKE, _GAZE_X, _GAZE_Y = np.eye(7, 6, -1).T[:, :, None]
_CIRCLE = np.linspace(0, 2 * np.pi, 14, endpoint=False)
_CIRCLE_X, _CIRCLE_Y = np.cos(_CIRCLE), np.sin(_CIRCLE)
_MIRROR = np.array([-1.0, 1.0, 1.0, 1.0])


class Shape(NamedTuple):
    """Polygons of one color."""

    polygons: list[np.ndarray]  # each (n, 4), or (7, n, 4) where expressions move it
    color: Color
    width: float = 0.0  # 0: filled; else the thickness of an open line


class Anatomy(NamedTuple):
    """All that is drawn of a person, and the points to find again in the image."""

    shapes: list[Shape]  # in the order of drawing; the last one, the light in the eyes, is never in shade
    landmarks: np.ndarray  # (7, 5, 4)
    outline: np.ndarray  # (7, n, 4) contour of the face
    mouth_y: float
    chin_y: float


def lay_out(person: Identity) -> Anatomy:
    """Work out a person's shapes."""
    mouth_y = person.nose_length + person.philtrum
    chin_y = mouth_y + person.chin
    outline = _outline(person, mouth_y, chin_y)
    shapes = [
        *_back_hair(person),
        *_neck_and_ears(person, chin_y),
        Shape([outline], person.skin),
        *_facial_hair(person, mouth_y, chin_y),
        *_skin_details(person, mouth_y),
        *_nose(person),
        *_mouth(person, mouth_y),
        *_eyes(person),
        *_front_hair(person, outline[0]),
        Shape(_discs(person, 0.022 * _WAKE, 0.035, -0.03), (235, 235, 235)),
    ]
    return Anatomy(shapes, _landmarks(person, mouth_y), outline, mouth_y, chin_y)


def _points(*rows: tuple[float, ...], s: float = 1.0) -> np.ndarray:
    return np.array([(*row, s) for row in rows])


def _curve(x: np.ndarray, y: np.ndarray, z: np.ndarray | float, s: float = 1.0) -> np.ndarray:
    return np.stack(np.broadcast_arrays(x, y, z, s), -1)


def _ribbon(x: np.ndarray, top: np.ndarray, bottom: np.ndarray, z: np.ndarray | float) -> np.ndarray:
    there, back = np.broadcast_arrays(_curve(x, top, z), _curve(x, bottom, z))
    return np.concatenate([there, back[..., ::-1, :]], -2)


def _smooth(points: np.ndarray, rounds: int = 2, closed: bool = True) -> np.ndarray:
    """Chaikin's corner cutting."""
    for _ in range(rounds):
        before = points if closed else points[:-1]
        after = np.roll(points, -1, 0) if closed else points[1:]
        cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], 1).reshape(-1, 4)
        points = cut if closed else np.concatenate([points[:1], cut, points[-1:]])
    return points


def _resample(points: np.ndarray, at: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(where, at, column) for column in points.T], 1)


def _both(points: np.ndarray) -> list[np.ndarray]:
    return [points * _MIRROR, points]


def _symmetric(right: list[tuple[float, ...]], s: float) -> np.ndarray:
    """A closed smooth contour from its right half, top to bottom."""
    half = _points(*right, s=s)
    return _smooth(np.concatenate([half, half[::-1] * _MIRROR]))


def _dark(color: Color, factor: float) -> Color:
    return tuple(min(255.0, factor * c) for c in color)


def _mix(a: Color, b: Color, share: float) -> Color:
    return tuple((1 - share) * x + share * y for x, y in zip(a, b, strict=True))


def drop_jaw(points: np.ndarray) -> np.ndarray:
    """Let (n, 4) points of the lower face fall as the mouth opens: (7, n, 4)."""
    fall = _OPEN * 0.3 * np.clip(points[:, 1] - 0.5, 0, 0.8)
    return points + fall[..., None] * np.array([0.0, 1.0, 0.0, 0.0])


def _landmarks(p: Identity, mouth_y: float) -> np.ndarray:
    x = np.array([-0.5 * p.eye_distance, 0.5 * p.eye_distance, p.nose_shift, -p.mouth_width, p.mouth_width])
    y = np.array([0, 0, p.nose_length, mouth_y + p.mouth_tilt, mouth_y - p.mouth_tilt])
    z = np.array([0.92, 0.92, 1.36, 0.95, 0.95])
    corners = np.array([0, 0, 0, 1, 1])
    return _curve(x * (1 + corners * (0.16 * _SMILE - 0.1 * _OPEN)), y - corners * 0.09 * _SMILE, z)


def _outline(p: Identity, mouth_y: float, chin_y: float) -> np.ndarray:
    w, top = p.head_width, p.head_top
    skull = [(0.36 * w, -1.03 * top, -0.1), (0.82 * w, -0.84 * top, 0.0), (w, -0.35 * top, 0.0), (1.02 * w, 0.0, 0.0)]
    jaw = [
        (p.cheek * w, 0.6, 0.1),
        (p.jaw * w, mouth_y + 0.08, 0.3),
        (0.5 * (p.chin_width + p.jaw * w), 0.45 * mouth_y + 0.55 * chin_y, 0.5),
        (p.chin_width, chin_y + 0.03, 0.7),
    ]
    return drop_jaw(_symmetric([*skull, *jaw], s=0.15))


def _neck_and_ears(p: Identity, chin_y: float) -> list[Shape]:
    w, size = p.head_width, p.ear
    neck = 0.68 * p.jaw * w + 0.16
    right = [
        (neck, 0.8, -0.2),
        (neck, chin_y + 0.1, -0.2),
        (neck, chin_y + 0.5, -0.2),
        (0.4 * neck, chin_y + 0.75, -0.1),
    ]
    ear = _smooth(
        _points(
            (w - 0.12, -0.15, -0.2), (w + 0.5 * size, -0.2, -0.25), (w + 0.55 * size, 0.12, -0.25),
            (w + 0.2 * size, 0.52, -0.15), (w - 0.12, 0.55, -0.1), s=0.2,
        )
    )  # fmt: skip
    inner = (ear - ear.mean(0)) * (0.5, 0.6, 1, 1) + ear.mean(0)
    return [
        Shape([_symmetric(right, s=0)], _dark(p.skin, 0.85)),
        Shape(_both(ear), _dark(p.skin, 0.95)),
        Shape(_both(inner), _dark(p.skin, 0.76)),
    ]


def _back_hair(p: Identity) -> list[Shape]:
    if p.bald or p.hair_length < 0.8:
        return []
    w, low = p.head_width * (1.05 + p.hair_volume), p.hair_length
    right = [(0.5 * w, -p.head_top * (1 + p.hair_volume), 0), (w, -0.6 * p.head_top, 0), (w * 1.04, 0.3, -0.3),
             (w * 1.1, 0.75 * low, -0.4), (0.95 * w, low, -0.4), (0.5 * w, low + 0.05, -0.4)]  # fmt: skip
    return [Shape([_symmetric(right, s=0)], _dark(p.hair, 0.72))]


def _front_hair(p: Identity, outline: np.ndarray) -> list[Shape]:
    """The cap of hair from the crown down to the hairline, with strands; bald people keep the sides."""
    w, top = p.head_width, p.head_top
    if p.bald:
        side = _points((0.97 * w, -0.5 * top, 0), (1.02 * w, -0.3 * top, 0), (1.02 * w, 0.2, 0), (0.97 * w, 0.3, 0.2),
                       (0.9 * w, -0.1, 0.3), (0.85 * w, -0.36 * top, 0.3), s=0.3)  # fmt: skip
        return [Shape(_both(_smooth(side)), _mix(p.hair, p.skin, 0.35))]
    side_y = float(np.clip(p.hair_length, 0.0, 0.8))
    upper = outline[outline[:, 1] < min(side_y, 0.25)]
    angle = np.arctan2(upper[:, 0], -upper[:, 1])
    order, around = np.argsort(angle), np.linspace(angle.min(), angle.max(), 48)
    upper = _resample(upper[order], angle[order], around)  # from the left over the crown to the right
    curls = p.hair_curl * np.abs(np.sin(10 * around))
    swell = 1 + p.hair_volume * (0.4 + 0.6 * np.cos(around).clip(0)) + curls
    outer = upper * np.column_stack([swell, swell, np.ones_like(swell), np.ones_like(swell)])
    x = np.array([1.0, 0.96, 0.92, 0.8, 0.55, 0.28, 0.0, -0.28, -0.55, -0.8, -0.92, -0.96, -1.0])
    half = np.array([0.0, 0.1, 0.35, 0.55 + 0.45 * p.temple, 0.9 + 0.1 * p.temple, 1.0])
    lift = np.concatenate([half, [1.0], half[::-1]])
    y = -p.hairline * lift - 0.22 * abs(p.hair_part) * (1 - np.abs(x)) + 0.3 * p.hair_part * x * lift
    y[5:8] += p.hair_peak * np.array([0.4, 1.0, 0.4])
    y[[0, -1]], y[[1, -2]] = side_y, 0.5 * side_y
    x = np.clip(x, *np.cbrt(1 - np.clip(-y / (1.06 * top), 0, 1) ** 3) * [[-1], [1]])  # never outside the skull
    line = _curve(w * x, y, np.sqrt(np.maximum(1.02 - x * x - (0.25 * y) ** 2, 0)))  # on the skull
    start = outer[np.abs(around) < 0.95][::2]
    end = _resample(line, np.arange(len(line)), np.linspace(len(line) - 4, 3, len(start)))
    middle = 0.5 * (start + end) + np.array([0.12 * p.hair_part, -0.05, 0.2, 0])
    strands = [_smooth(np.stack(s), closed=False) for s in zip(start, middle, 0.2 * middle + 0.8 * end, strict=True)]
    return [
        Shape([np.concatenate([outer, _smooth(line, closed=False)])], p.hair),
        Shape(strands[::2], _dark(p.hair, 0.8), 0.025),
        Shape(strands[1::2], _mix(p.hair, (200, 180, 160), 0.07), 0.025),
    ]


def _facial_hair(p: Identity, mouth_y: float, chin_y: float) -> list[Shape]:
    shapes, w = [], p.head_width
    if p.beard:
        right = [(0.0, mouth_y - 0.1, 1.1), (p.mouth_width + 0.1, mouth_y - 0.04, 0.95),
                 (0.7 * w * p.cheek, mouth_y - 0.15, 0.65),
                 (0.99 * w * p.cheek, 0.45, 0.15), (p.jaw * w, mouth_y + 0.05, 0.3),
                 (0.5 * (p.chin_width + p.jaw * w), 0.45 * mouth_y + 0.55 * chin_y, 0.5),
                 (p.chin_width, chin_y + 0.02, 0.7)]  # fmt: skip
        beard = drop_jaw(_symmetric(right, s=0.3))
        center = np.array([0.0, 0.6 * mouth_y + 0.4 * chin_y, 0, 0])
        inner = (beard - center) * (0.94, 0.86, 1, 1) + center
        shapes.append(Shape([beard], _mix(p.skin, p.hair, 0.12 + 0.3 * p.beard)))
        shapes.append(Shape([inner], _mix(p.skin, p.hair, 0.2 + 0.55 * p.beard)))
    if p.moustache:
        mw, top = p.mouth_width, p.nose_length + 0.24
        right = [(0, top, 1.2), (0.32, top + 0.04, 1.12), (mw, mouth_y - 0.11, 1.0), (1.15 * mw, mouth_y, 0.95),
                 (0.8 * mw, mouth_y, 1.0), (0.3, mouth_y - 0.04, 1.1), (0, mouth_y - 0.04, 1.15)]  # fmt: skip
        shapes.append(Shape([_symmetric(right, s=1)], _mix(p.skin, p.hair, 0.35 + 0.5 * p.moustache)))
    return shapes


def _skin_details(p: Identity, mouth_y: float) -> list[Shape]:
    x, heights = np.linspace(-0.6, 0.6, 7), (0.6, 0.74) if p.wrinkles > 0.4 else ()
    creases = [_curve(x, 0.06 * x * x - height, 0.95 - 0.3 * x * x) for height in heights]
    fold = _points((p.nose_width + 0.07, p.nose_length + 0.04, 1.05), (p.nose_width + 0.17, p.nose_length + 0.22, 0.98),
                   (p.mouth_width + 0.12, mouth_y, 0.92))  # fmt: skip
    spots = [_curve(x + r * _CIRCLE_X[::2], y + r * _CIRCLE_Y[::2], 1.05 - 0.5 * x * x) for x, y, r in p.marks]
    return [
        Shape(creases, _dark(p.skin, 1 - 0.15 * p.wrinkles), 0.02),
        Shape(_both(_smooth(fold, closed=False)), _dark(p.skin, 0.97 - 0.12 * p.wrinkles), 0.025),
        Shape(spots, _mix(_dark(p.skin, 0.68), (120, 70, 45), 0.3)),
    ]


def _nose(p: Identity) -> list[Shape]:
    w, y, shift = p.nose_width, p.nose_length, np.array([p.nose_shift, 0, 0, 0])
    nostril_y = y + 0.14 + (0.1 * w + 0.01) * _CIRCLE_Y - 0.03 * w * _CIRCLE_X
    nostril = _curve(w * (0.46 + 0.26 * _CIRCLE_X), nostril_y, 1.17)
    wing = _points(
        (w, y - 0.06, 1.05), (1.1 * w, y + 0.06, 1.05), (0.95 * w, y + 0.16, 1.08), (0.7 * w, y + 0.14, 1.12)
    )
    return [
        Shape([half + shift for half in _both(_smooth(wing, closed=False))], _dark(p.skin, 0.74), 0.03),
        Shape([half + shift for half in _both(nostril)], _mix(_dark(p.skin, 0.3), (60, 20, 15), 0.3)),
    ]


def _eyes(p: Identity) -> list[Shape]:
    """Eyes and brows; eyelids of skin cover what of the iris the lids hide."""
    u = np.linspace(-1, 1, 11)  # from the inner to the outer corner
    half, bulge = 0.5 * p.eye_width, (1 - u * u) ** 0.75
    x, z = 0.5 * p.eye_distance + half * u, 0.92 - 0.12 * u * u
    tilt = -p.eye_slant * half * u
    lower = 0.38 * p.eye_height * bulge * (1 - 0.25 * p.eye_peak * u) + tilt
    wide = -0.62 * p.eye_height * bulge * (1 + p.eye_peak * u) + tilt
    upper = lower + _WAKE * (wide - lower)
    crease = wide - 0.045 - 0.035 * bulge + 0.03 * (1 - _WAKE)
    lash = 0.03 + 0.02 * np.clip(u, 0, 1)
    v = np.linspace(-1, 1, 9)
    brow_x = 0.5 * p.eye_distance + p.brow_length * v + 0.03
    brow_y = -p.brow_height - p.brow_angle * p.brow_length * v - p.brow_arch * (1 - (v - 0.3) ** 2) - 0.1 * _RAISE
    thick = 0.5 * p.brow_thickness * np.interp(v, [-1, -0.7, 0.3, 1], [0.6, 1, 0.85, 0.12])
    brow = _ribbon(brow_x, brow_y - thick, brow_y + thick, 1.02 - 0.35 * np.clip(brow_x - 0.2, 0, 2))
    return [
        Shape(_both(_ribbon(x, upper, lower, z)), (222, 214, 208)),
        Shape(_both(_ribbon(x, upper, upper + 0.05 * bulge * _WAKE, z)), (176, 164, 158)),
        Shape(_discs(p, p.iris), _dark(p.eyes, 0.45)),
        Shape(_discs(p, 0.8 * p.iris), p.eyes),
        Shape(_discs(p, 0.45 * p.iris), (18, 14, 14)),
        Shape(_both(_ribbon(x, upper - 0.06 - 0.16 * bulge, upper, z)), p.skin),
        Shape(_both(_ribbon(x, lower, lower + 0.09 * bulge, z)), p.skin),
        Shape(_both(_ribbon(x, crease - 0.011, crease + 0.011, z)), _dark(p.skin, 0.68)),
        Shape(_both(_ribbon(x, lower, lower + 0.014, z)), _dark(p.skin, 0.66)),
        Shape(_both(_ribbon(x, upper - lash * bulge - 0.012, upper, z)), _mix(_dark(p.hair, 0.5), (38, 24, 20), 0.6)),
        Shape(_both(brow), _mix(_dark(p.hair, 0.8), p.skin, 0.15)),
    ]


def _discs(p: Identity, radius: float, dx: float = 0.0, dy: float = 0.0) -> list[np.ndarray]:
    """Circles on both eyeballs that follow the gaze."""
    x = radius * _CIRCLE_X + dx + 0.13 * p.eye_width * _GAZE_X
    y = radius * _CIRCLE_Y + dy + 0.03 * _GAZE_Y - 0.1 * p.eye_height
    return [_curve(x + side * 0.5 * p.eye_distance, y, 0.93) for side in (-1, 1)]


def _mouth(p: Identity, mouth_y: float) -> list[Shape]:
    t = np.linspace(-1, 1, 13)  # from the left corner to the right one
    arch = 1 - t * t
    x = p.mouth_width * (1 + 0.16 * _SMILE - 0.1 * _OPEN) * t
    z = 0.95 + 0.17 * arch
    middle = mouth_y - 0.09 * _SMILE * t * t - p.mouth_tilt * t
    upper = middle - 0.08 * _OPEN * arch
    lower = middle + 0.34 * _OPEN * arch
    bow = 1 - p.lip_bow * np.exp(-np.square(t / 0.16)) + 0.15 * np.exp(-np.square((np.abs(t) - 0.28) / 0.15))
    top = upper - p.upper_lip * arch**0.8 * bow * (1 - 0.25 * _SMILE)
    bottom = lower + p.lower_lip * arch**0.6
    return [
        Shape([_ribbon(x, upper, lower, z)], (62, 22, 24)),
        Shape([_ribbon(0.88 * x, upper, upper + 0.2 * _OPEN * arch, z)], (215, 208, 198)),
        Shape([_ribbon(x, top, upper, z)], _dark(p.lips, 0.86)),
        Shape([_ribbon(x, lower, bottom, z)], p.lips),
        Shape([_ribbon(x, upper - 0.012, upper + 0.012, z)], _dark(p.lips, 0.42)),
    ]
