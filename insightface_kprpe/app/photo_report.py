"""All that the demo shows of some photos, as images and numbers; the page around it is another module's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..backbones import VisionTransformer
from ..contact_sheet import arrange, face_cell, title_bar
from ..evaluation.attention_figures import PAPER_DEPTHS, AttentionMaps, attention_figure, depths_figure
from ..evaluation.curves import figure_pixels, new_figure
from ..evaluation.figure_faces import FigureFaces
from ..evaluation.metrics import unit_rows
from .gallery import Gallery
from .pictures import read_picture
from .recognition import annotate, face_crop, recognize

COLUMNS = ("face", "photo", "name", "similarity", "quality", "detector", "embedding norm", "box")
POINTS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
_LONGEST_SIDE = 1600  # pixels of a photo on the page
_CROPS_A_ROW = 8
_MATRIX_FACES = 24  # in a larger matrix nothing can be read


@dataclass
class PhotoReport:
    """What was found in some photos; faces are numbered from 1 through all of them.

    Attributes:
        photos: (H, W, 3) uint8 RGB each, with boxes, keypoints and names; with a caption.
        rows: of a table, a face each; see ``COLUMNS``.
        crops: (S, S, 3) uint8 RGB each, what the recognition model saw.
        keypoints: (n, 5, 2) float32 xy in [0, 1] of the crops.
        similarity: (n, n) float32, cosine of every two faces.
        notes: what is to be said of photos that show nothing, or are none.
    """

    photos: list[tuple[np.ndarray, str]] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)
    crops: list[np.ndarray] = field(default_factory=list)
    keypoints: np.ndarray = field(default_factory=lambda: np.empty((0, 5, 2), np.float32))
    similarity: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    notes: list[str] = field(default_factory=list)


def report_photos(app: Any, gallery: Gallery, files: Sequence[str | Path], threshold: float) -> PhotoReport:
    """Find, crop, compare and name the faces of photos.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared.
        gallery: of people, made with the same model; it may be empty.
        files: of photos; one that is none is noted.
        threshold: cosine similarity from which on a face is somebody's.

    Raises:
        ValueError: the gallery was made with another recognition model.
    """
    report, keypoints, embeddings = PhotoReport(), [], []
    for file in map(Path, files):
        try:
            photo = read_picture(file)
        except (ValueError, OSError) as error:
            report.notes.append(f"{file.name}: {str(error).removeprefix(f'{file} ')}")
            continue
        faces = recognize(app, gallery, photo, threshold)
        first = 1 + len(report.rows)
        if not faces:
            report.notes.append(f"{file.name}: no face found")
        for number, named in enumerate(faces, first):
            crop, points = face_crop(app, photo, named.face)
            report.crops.append(np.ascontiguousarray(crop[..., ::-1]))
            keypoints.append(points)
            embeddings.append(named.face.embedding)
            report.rows.append(_row(number, file.name, named))
        shown = _shrunk(annotate(photo, faces, first))
        report.photos.append((np.ascontiguousarray(shown[..., ::-1]), f"{file.name}: {_counted(len(faces))}"))
    if keypoints:
        report.keypoints = np.stack(keypoints)
        rows = unit_rows(np.stack(embeddings), "embeddings", np.float32)
        report.similarity = rows @ rows.T
    return report


def _row(number: int, photo: str, named: Any) -> list[Any]:
    name, nearest, quality, face = named
    similarity = "" if nearest is None else f"{nearest.similarity:.3f}"
    if name is None:
        name = "" if nearest is None else f"unknown (nearest: {nearest.name})"
    box = " ".join(f"{value:.0f}" for value in face.bbox)
    norm = float(np.linalg.norm(face.embedding))
    return [number, photo, name, similarity, f"{quality:.3f}", f"{face.det_score:.3f}", f"{norm:.1f}", box]


def _counted(faces: int) -> str:
    return "1 face" if faces == 1 else f"{faces} faces"


def _shrunk(photo: np.ndarray) -> np.ndarray:
    scale = _LONGEST_SIDE / max(photo.shape[:2])
    return photo if scale >= 1 else cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def crops_picture(report: PhotoReport) -> np.ndarray | None:
    """The crops with keypoints, and number and quality below, (H, W, 3) uint8 RGB; None where there are none."""
    if not report.crops:
        return None
    cells = []
    for row, crop, points in zip(report.rows, report.crops, report.keypoints, strict=True):
        face = face_cell(crop, points)
        cells.append(np.vstack([face, title_bar(f"{row[0]}: quality {row[4]}", face.shape[1])]))
    return arrange(cells, min(len(cells), _CROPS_A_ROW))[..., ::-1]


def similarity_picture(report: PhotoReport, threshold: float) -> np.ndarray | None:
    """The cosine of every two faces with the faces beside it, (H, W, 3) uint8 RGB; None where there are not two.

    Pairs from ``threshold`` on, which are said to be one person, are framed. The first 24 faces are shown.
    """
    count = min(len(report.crops), _MATRIX_FACES)
    if count < 2:
        return None
    figure = new_figure((1.2 + 0.62 * count, 0.8 + 0.62 * count))
    axes = figure.subplots(count + 1, count + 1, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
        cell.set_frame_on(False)
    for number, crop in enumerate(report.crops[:count], 1):
        for cell in (axes[0, number], axes[number, 0]):
            cell.imshow(crop)
        axes[0, number].set_title(str(number), fontsize="small", pad=2)
        axes[number, 0].set_ylabel(str(number), fontsize="small", rotation=0, labelpad=8, va="center")
    for row in range(count):
        for column in range(count):
            _draw_cosine(axes[row + 1, column + 1], report.similarity[row, column], threshold, row == column)
    return figure_pixels(figure)


def _draw_cosine(cell: Any, cosine: float, threshold: float, is_itself: bool) -> None:
    shade = 0.0 if is_itself else float(np.clip(cosine, 0, 1))
    cell.set_facecolor((1 - 0.85 * shade, 1 - 0.55 * shade, 1 - 0.25 * shade))
    cell.patch.set_visible(True)
    cell.set_frame_on(True)
    framed = cosine >= threshold and not is_itself
    for side in cell.spines.values():
        side.set(color="#107030" if framed else "white", linewidth=2 if framed else 0.5)
    text = "" if is_itself else f"{cosine:.2f}"
    cell.text(0.5, 0.5, text, ha="center", va="center", fontsize="small", transform=cell.transAxes)


def attention_pictures(
    report: PhotoReport,
    number: int,
    point: str,
    kprpe: VisionTransformer,
    plain: VisionTransformer | None = None,
) -> list[np.ndarray]:
    """What the keypoints of a face do to attention: the whole attention of both networks, and KPRPE's offsets B_ij.

    Args:
        report: in which the face is.
        number: of the face, from 1.
        point: the query: one of ``POINTS``.
        kprpe: a network with KPRPE.
        plain: one without, for comparison.

    Returns:
        Both images, (H, W, 3) uint8 RGB.

    Raises:
        ValueError: there is no such face or point, or a network is none that can be drawn.
    """
    if not 1 <= number <= len(report.crops):
        raise ValueError(f"face must be from 1 to {len(report.crops)}, got {number}")
    if point not in POINTS:
        raise ValueError(f"point must be one of {', '.join(POINTS)}, got {point!r}")
    row = slice(number - 1, number)
    face = FigureFaces([str(number)], report.crops[row], report.keypoints[row])
    query = report.keypoints[number - 1, POINTS.index(point)].tolist()
    networks = {"ViT": plain, "KPRPE": kprpe} if plain is not None else {"KPRPE": kprpe}
    maps = {name: AttentionMaps(net, face) for name, net in networks.items()}
    depths = {name: [depth for depth in PAPER_DEPTHS if depth < len(net.blocks)] for name, net in networks.items()}
    figures = (attention_figure(maps, query, depths), depths_figure(maps["KPRPE"], [query], depths["KPRPE"], head=0))
    return [figure_pixels(figure) for figure in figures]
