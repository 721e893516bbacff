"""Shows what keypoints do to attention: the paper's Figures 12 and 13 for any KPRPE network and any face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from ..backbones import VisionTransformer
from ..backbones.attention_terms import attention_terms
from ..data.face_dataset import to_network_input
from ..geometry import CANONICAL_KEYPOINTS
from .curves import new_figure, save_figure
from .figure_faces import FigureFaces

PAPER_DEPTHS = (0, 1, 3, 5, 7)  # of Fig. 12
_CELL = 1.45  # inches
_SCALE = "Blues"  # stronger blue is higher, as in the paper


class AttentionMaps:
    """The terms of a ViT's attention for a few faces.

    Args:
        net: a ViT, plain or with KPRPE.
        faces: of a figure; those without landmarks are assumed to be aligned.

    Attributes:
        images: (S, S, 3) uint8 RGB each, as the network sees them.
        keypoints: (n, 5, 2) xy in [0, 1].
        biases: by layer, (n, H or 1, N, N) float32: B_ij of query i and key j.
        attention: by layer, (n, H, N, N) float32: the whole attention, which sums to 1 over the keys.
        seen: side of the part that whole patches cover, as a fraction of the crop's.

    Raises:
        ValueError: the network is not a ViT, has iRPE, or has an untrained KPRPE.
    """

    def __init__(self, net: VisionTransformer, faces: FigureFaces) -> None:
        check_drawable(net)
        size, patch = net.img_size, net.patch_embed.patch_size[0]
        self.images = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in faces.images]
        batch = to_network_input(torch.from_numpy(np.stack(self.images)).permute(0, 3, 1, 2))
        self.keypoints = faces.keypoints
        if self.keypoints is None:
            found = net.find_keypoints(batch).numpy() if net.finds_keypoints else CANONICAL_KEYPOINTS
            self.keypoints = np.broadcast_to(found, (len(batch), 5, 2)).astype(np.float32)
        self.grid = net.patch_embed.grid_size[0]
        self.seen = self.grid * patch / size
        terms = list(attention_terms(net, batch, torch.tensor(self.keypoints)))
        self.biases = [term.bias.numpy() for term in terms]
        self.attention = [(term.similarity + term.bias).softmax(-1).numpy() for term in terms]
        if net.position == "kprpe" and not any(bias.any() for bias in self.biases):
            raise ValueError(
                "the network's keypoint_linear is all zeros (it was not trained), so there is nothing to draw"
            )

    def patch_of(self, query: Sequence[float]) -> int:
        """The patch in which a point (x, y) in [0, 1] of the crop lies, or the nearest one."""
        column, row = (min(max(int(value / self.seen * self.grid), 0), self.grid - 1) for value in query)
        return row * self.grid + column

    def map_of(self, layers: Sequence[np.ndarray], face: int, depth: int, query: Sequence[float], head: int | None):
        """(n, n) attention of the patch of ``query`` to every patch; head None: the mean of all heads."""
        row = layers[depth][face, :, self.patch_of(query)]  # (H or 1, N)
        row = row.mean(0) if head is None else row[min(head, len(row) - 1)]
        return row.reshape(self.grid, self.grid)


def check_drawable(net: Any, with_kprpe: bool = False) -> None:
    """Make sure that a network is one whose attention can be drawn.

    Raises:
        ValueError: it is no ViT; or, ``with_kprpe``, has no KPRPE.
    """
    if with_kprpe and getattr(net, "position", None) != "kprpe":
        raise ValueError("the model must be a ViT with KPRPE, whose tables the figures show; this one has none")
    if not isinstance(net, VisionTransformer):
        raise ValueError(f"the network must be a ViT, whose attention can be drawn, got {type(net).__name__}")


def depths_figure(maps: AttentionMaps, queries: Sequence[Sequence[float]], depths: Sequence[int], head: int) -> Any:
    """Fig. 12: B_ij of one face; rows are queries, columns are depths."""
    figure, axes = _sheet(len(queries), 1 + len(depths), f"KPRPE offsets B_ij, head {head}")
    for row, query in zip(axes, queries, strict=True):
        _draw_face(row[0], maps, 0, query, "query")
        for cell, depth in zip(row[1:], depths, strict=True):
            _draw_map(cell, maps, 0, maps.map_of(maps.biases, 0, depth, query, head), query, f"depth {depth}")
    return figure


def faces_figure(
    maps: AttentionMaps, names: Sequence[str], queries: Sequence[Sequence[float]], depth: int, head: int
) -> Any:
    """Fig. 13: B_ij of several faces at one depth and head; columns are faces, rows are queries."""
    figure, axes = _sheet(1 + len(queries), len(names), f"KPRPE offsets B_ij, depth {depth}, head {head}")
    for face, name in enumerate(names):
        _draw_face(axes[0, face], maps, face, None, f"face {name}")
        for row, query in zip(axes[1:, face], queries, strict=True):
            _draw_map(row, maps, face, maps.map_of(maps.biases, face, depth, query, head), query, "")
    return figure


def heads_figure(maps: AttentionMaps, query: Sequence[float], depths: Sequence[int]) -> Any:
    """All heads on one sheet: B_ij of one face and query; rows are depths, columns are heads."""
    heads = maps.biases[0].shape[1]
    figure, axes = _sheet(len(depths), 1 + heads, "KPRPE offsets B_ij of all heads")
    for row, depth in zip(axes, depths, strict=True):
        _draw_face(row[0], maps, 0, query, f"depth {depth}")
        for head, cell in enumerate(row[1:]):
            _draw_map(cell, maps, 0, maps.map_of(maps.biases, 0, depth, query, head), query, f"head {head}")
    return figure


def attention_figure(models: dict[str, AttentionMaps], query: Sequence[float], depths: dict[str, Sequence[int]]) -> Any:
    """The full attention of several networks (mean over heads) from one query; rows are networks, columns are depths.

    Args:
        models: by name.
        query: (x, y) in [0, 1] of the crop.
        depths: of each model, by name.
    """
    columns = max(len(chosen) for chosen in depths.values())
    figure, axes = _sheet(len(models), 1 + columns, "attention of the query's patch, mean over heads")
    for row, (name, maps) in zip(axes, models.items(), strict=True):
        _draw_face(row[0], maps, 0, query, name)
        for cell, depth in zip(row[1:], depths[name], strict=False):
            _draw_map(cell, maps, 0, maps.map_of(maps.attention, 0, depth, query, None), query, f"depth {depth}")
    return figure


def write_figures(
    folder: str | Path,
    net: VisionTransformer,
    faces: FigureFaces,
    queries: Sequence[Sequence[float]] | None = None,
    depths: Sequence[int] = PAPER_DEPTHS,
    head: int = 0,
    depth: int = 5,
    against: VisionTransformer | None = None,
) -> list[Path]:
    """Draw all figures of a network.

    Args:
        folder: created if missing.
        net: with KPRPE.
        faces: the first is the one of the figures that show one face.
        queries: (x, y) in [0, 1] each; None: the first face's left eye, nose and left mouth corner.
        depths: of the figures that show several; those that the network lacks are ignored.
        head: of the figures that show one.
        depth: of the figure that shows several faces; the last, if the network has fewer.
        against: a ViT without KPRPE, whose attention is drawn next to the network's.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the network has no KPRPE, or no such head, or an argument is out of range.
    """
    check_drawable(net, with_kprpe=True)
    maps = AttentionMaps(net, faces)
    heads, chosen = maps.biases[0].shape[1], _depths(net, depths)
    if not 0 <= head < heads:
        raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
    queries = [maps.keypoints[0, point].tolist() for point in (0, 2, 3)] if queries is None else queries
    figures = {
        "depths.png": depths_figure(maps, queries, chosen, head),
        "heads.png": heads_figure(maps, queries[0], chosen),
    }
    if len(faces.images) > 1:
        figures["faces.png"] = faces_figure(maps, faces.names, queries, min(depth, len(net.blocks) - 1), head)
    if against is not None:
        both = {"without KPRPE": AttentionMaps(against, faces), "with KPRPE": maps}
        both_depths = {"without KPRPE": _depths(against, depths), "with KPRPE": chosen}
        figures["attention.png"] = attention_figure(both, queries[0], both_depths)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, Path(folder) / name)
    return [Path(folder) / name for name in figures]


def _depths(net: VisionTransformer, depths: Sequence[int]) -> list[int]:
    chosen = [depth for depth in depths if 0 <= depth < len(net.blocks)]
    if not chosen:
        raise ValueError(f"depths must be from 0 to {len(net.blocks) - 1}, got {', '.join(map(str, depths))}")
    return chosen


def _sheet(rows: int, columns: int, title: str) -> tuple[Any, np.ndarray]:
    figure = new_figure((_CELL * columns, _CELL * rows * 1.15 + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False)
    for cell in axes.flat:
        cell.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    return figure, axes


def _draw_face(cell: Any, maps: AttentionMaps, face: int, query: Sequence[float] | None, title: str) -> None:
    cell.imshow(maps.images[face], extent=(0, 1, 1, 0))
    _draw_points(cell, maps.keypoints[face], query)
    cell.set_title(title, fontsize="x-small")


def _draw_map(
    cell: Any, maps: AttentionMaps, face: int, values: np.ndarray, query: Sequence[float], title: str
) -> None:
    cell.imshow(values, cmap=_SCALE, extent=(0, maps.seen, maps.seen, 0), interpolation="nearest")
    _draw_points(cell, maps.keypoints[face], query)
    span = f"{values.min():.2g} to {values.max():.2g}"
    cell.set_title(f"{title}\n{span}" if title else span, fontsize="x-small")


def _draw_points(cell: Any, keypoints: np.ndarray, query: Sequence[float] | None) -> None:
    cell.scatter(*keypoints.T, s=16, facecolors="white", edgecolors="#0040c0", linewidths=1.2)
    if query is not None:
        cell.scatter(*query, s=70, marker="*", color="red", edgecolors="white", linewidths=0.5)
    cell.set(xlim=(0, 1), ylim=(1, 0))
