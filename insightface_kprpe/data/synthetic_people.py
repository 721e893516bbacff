"""The identity of drawn people and their appearance in one image: what varies, and by how much.

Identity is in the shapes, drawn from wide ranges. Colors are drawn from narrow ones, which light, exposure
and white balance of an image blur further: color alone does not tell people apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Color = tuple[float, float, float]

# Weights of Appearance.expression; all zero is a face with closed eyes and mouth.
EXPRESSIONS = ("smile", "mouth_open", "brow_raise", "eye_open", "gaze_x", "gaze_y")


@dataclass(frozen=True)
class Identity:
    """What makes a person: sizes in face units (eye distances), colors as RGB in 0..255."""

    head_width: float  # half the width at the eyes
    head_top: float  # crown above the eyes
    cheek: float  # width at the cheeks, fraction of head_width
    jaw: float  # width at the mouth, fraction of head_width
    chin_width: float
    chin: float  # from the mouth down to the chin
    eye_distance: float
    eye_width: float
    eye_height: float
    eye_slant: float  # positive: outer corners higher
    eye_peak: float  # where the upper lid is highest: inner (-) to outer (+)
    iris: float  # radius
    brow_height: float
    brow_thickness: float
    brow_length: float
    brow_angle: float
    brow_arch: float
    nose_length: float
    nose_width: float
    nose_bridge: float
    nose_relief: float
    nose_shift: float  # how crooked the nose is
    philtrum: float  # from the nose tip down to the mouth
    mouth_width: float
    upper_lip: float
    lower_lip: float
    lip_bow: float
    mouth_tilt: float
    cheekbone: float
    ear: float
    hairline: float  # height above the eyes
    hair_peak: float
    hair_part: float  # swept from left (-) or right (+)
    temple: float  # how far the hairline recedes at the temples
    hair_volume: float
    hair_length: float  # where the hair at the sides ends
    hair_curl: float
    bald: bool
    moustache: float  # 0: none, to 1: dense
    beard: float
    wrinkles: float
    marks: tuple[tuple[float, float, float], ...]  # moles and freckles: x, y, radius
    skin: Color
    hair: Color
    eyes: Color
    lips: Color


_RANGES: dict[str, tuple[float, float]] = {
    "head_width": (1.04, 1.25),
    "head_top": (1.6, 1.9),
    "cheek": (0.9, 1.0),
    "jaw": (0.62, 0.9),
    "chin_width": (0.14, 0.46),
    "chin": (0.52, 0.8),
    "eye_distance": (0.9, 1.1),
    "eye_width": (0.42, 0.56),
    "eye_height": (0.15, 0.24),
    "eye_slant": (-0.16, 0.22),
    "eye_peak": (-0.35, 0.35),
    "iris": (0.095, 0.115),
    "brow_height": (0.27, 0.42),
    "brow_thickness": (0.05, 0.15),
    "brow_length": (0.27, 0.37),
    "brow_angle": (-0.18, 0.1),
    "brow_arch": (0.01, 0.13),
    "nose_length": (0.46, 0.68),
    "nose_width": (0.19, 0.33),
    "nose_bridge": (0.08, 0.15),
    "nose_relief": (0.55, 1.05),
    "nose_shift": (-0.04, 0.04),
    "philtrum": (0.46, 0.7),
    "mouth_width": (0.33, 0.5),
    "upper_lip": (0.045, 0.12),
    "lower_lip": (0.07, 0.17),
    "lip_bow": (0.0, 0.5),
    "mouth_tilt": (-0.02, 0.02),
    "cheekbone": (0.2, 1.2),
    "ear": (0.2, 0.32),
    "hairline": (0.66, 1.25),
    "hair_peak": (-0.06, 0.16),
    "hair_part": (-1.0, 1.0),
    "temple": (0.5, 0.95),
    "hair_volume": (0.06, 0.26),
    "hair_length": (-0.8, 2.4),
    "wrinkles": (0.0, 0.9),
}


@dataclass(frozen=True)
class Appearance:
    """What changes from image to image."""

    yaw: float  # radians; positive: toward the right of the image
    pitch: float  # radians; positive: down
    expression: np.ndarray  # (6,), see EXPRESSIONS
    light: tuple[float, float, float]  # unit vector toward the lamp
    ambient: float  # share of light from everywhere, 0..1
    clothes: Color


def sample_identity(rng: np.random.Generator) -> Identity:
    """Draw a person."""
    values = {name: float(rng.uniform(*limits)) for name, limits in _RANGES.items()}
    bearded, bald = rng.random(2) < (0.22, 0.1)
    tone, lightness = rng.beta(2, 2), rng.beta(1, 3)
    skin = np.array([222, 177, 149]) * (1 - tone) + np.array([140, 96, 72]) * tone
    hair = np.array([38, 27, 22]) * (1 - lightness) + np.array([150, 118, 82]) * lightness
    eyes = np.array([78, 52, 36]) + rng.beta(1, 3) * np.array([20, 60, 90])
    lips = 0.6 * skin + 0.4 * np.array([160, 60, 70]) + rng.normal(0, 6, 3)
    moles = rng.uniform((-0.8, 0.15, 0.02), (0.8, 1.2, 0.04), (int(rng.integers(4)), 3))
    freckles = rng.uniform((-0.75, 0.15, 0.008), (0.75, 0.6, 0.016), (24 if rng.random() < 0.2 else 0, 3))
    return Identity(
        **values,
        hair_curl=0.045 if rng.random() < 0.3 else 0.0,
        bald=bool(bald),
        moustache=float(rng.uniform(0.3, 1.0)) if bearded else 0.0,
        beard=float(rng.uniform(0.1, 1.0)) if bearded and rng.random() < 0.6 else 0.0,
        marks=tuple(map(tuple, np.concatenate([moles, freckles]).tolist())),
        skin=tuple(skin.tolist()),
        hair=tuple(hair.tolist()),
        eyes=tuple(eyes.tolist()),
        lips=tuple(lips.tolist()),
    )


def sample_light(rng: np.random.Generator) -> tuple[float, float, float]:
    """Draw the direction toward a lamp: left or right, mostly from above."""
    x, y = rng.uniform((-0.8, -0.9), (0.8, 0.1))
    length = float(np.sqrt(x * x + y * y + 0.8**2))
    return float(x) / length, float(y) / length, 0.8 / length


def sample_appearance(rng: np.random.Generator, light: tuple[float, float, float] | None = None) -> Appearance:
    """Draw pose, expression, light and clothes; ``light`` where the lamp is known."""
    yaw, pitch, brow_raise, gaze_x, gaze_y = np.clip(rng.normal(0, (0.24, 0.12, 0.35, 0.4, 0.4)), -0.6, 0.6)
    smile, mouth_open, eye_open, ambient = rng.uniform((-0.2, 0.1, 0.68, 0.4), (1.0, 0.8, 1.05, 0.75))
    talks, blinks = rng.random(2) < (0.35, 0.03)
    expression = [smile, mouth_open * talks, brow_raise, 0.0 if blinks else eye_open, gaze_x, gaze_y]
    return Appearance(
        yaw=float(yaw),
        pitch=float(np.clip(pitch, -0.3, 0.3)),
        expression=np.array(expression, dtype=np.float32),
        light=sample_light(rng) if light is None else light,
        ambient=float(ambient),
        clothes=tuple((rng.uniform(50, 180) + rng.normal(0, 26, 3)).clip(0, 255).tolist()),
    )
