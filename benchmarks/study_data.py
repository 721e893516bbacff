"""Make the data sets of the study of KPRPE, from folders of images and drawn: RecordIO and ``.bin``, with landmarks.

    python benchmarks/study_data.py --fiw fiw --lfw lfw --detector scrfd_500m_kps.onnx --out study_data --processes 2

Every image is padded with black and shown to the detector; the face nearest to its center counts. Then, in ``--out``:

=======================  ===============================================================================================
fiw_unaligned/           Families in the Wild to train on: its crops as they are, of people with 2 images or more
fiw_aligned/             the same faces, turned onto InsightFace's template
fiw_both/                the two together, each face as it is and aligned
fiw_val_{unaligned,aligned}.bin   3,000 pairs of every tenth family, none of which is in the two sets above
lfw_raw.bin              Labeled Faces in the Wild, the official pairs in their order: the images as they are
lfw_box.bin              the square around the detector's box, as high as it
lfw_loose.bin            that square turned by up to 30 degrees, scaled by 0.8 to 1.25, shifted by up to 0.1, at random
lfw_aligned.bin          turned onto the template
drawn_{loose,aligned}/   drawn faces of 500 people, 16 of each
drawn_val_{loose,aligned}.bin     3,000 drawn pairs of 500 other people
=======================  ===============================================================================================

Next to each lie ``*ldmk_5points.csv``, a contact sheet ``*.png`` to look at, and for each ``.bin`` ``*_people.npy``:
who is on its images. Existing files are kept; detection resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np

from insightface_kprpe.app.alignment import CUTS, Crop
from insightface_kprpe.app.detection import open_detector
from insightface_kprpe.contact_sheet import arrange, face_cell, write_sheet
from insightface_kprpe.data.image_codec import encode_jpeg
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.pair_lists import find_pictures, read_pair_list
from insightface_kprpe.data.picture_files import list_people, read_image_file
from insightface_kprpe.data.record_tools import pack_drawn
from insightface_kprpe.data.synthetic import SyntheticFaces
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.data.verification_pairs import FIRST_UNSEEN_IDENTITY
from insightface_kprpe.files import atomic_path
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, transform_points, warp_smoothly
from insightface_kprpe.inference.chunks import cut_into_blocks

SIZE = 112
PADDING = {"fiw": 112, "lfw": 60}  # black pixels on every side, without which tight crops hold no face for SCRFD
VALIDATION_FAMILIES = 10  # every tenth
VALIDATION_PAIRS = 3000
DRAWN = {"num_identities": 500, "seed": 1}
_AT_ONCE = 200  # images that a process shows to the detector before it saves

Cut = Callable[[np.ndarray, np.ndarray, np.ndarray], Crop]  # picture, box, landmarks


class Faces(NamedTuple):
    """Images and the face in each; where none was found, the rest is that of an average face."""

    paths: list[Path]
    boxes: np.ndarray  # (N, 4) xyxy in pixels
    landmarks_px: np.ndarray  # (N, 5, 2)
    found: np.ndarray  # (N,) bool


def find_faces(paths: Sequence[Path], padding: int, detector: Path, cache: Path, processes: int) -> Faces:
    """Detect one face in each image; blocks that were done before are read from ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    blocks = cut_into_blocks(len(paths), _AT_ONCE)
    missing = [block for block in blocks if not _part(cache, block).is_file()]
    work = functools.partial(_detect_block, paths, padding, cache)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _open_detector, (detector,)) as pool:
        for done, _ in enumerate(pool.imap_unordered(work, missing), 1):
            print(f"{cache.name}: {done} of {len(missing)} blocks of {_AT_ONCE} images", flush=True)
    rows = np.concatenate([np.load(_part(cache, block), allow_pickle=False) for block in blocks])
    found = np.isfinite(rows[:, 0])
    rows[~found] = rows[found].mean(0)
    print(f"{cache.name}: faces in {found.sum()} of {len(found)} images", flush=True)
    return Faces(list(paths), rows[:, :4], rows[:, 4:].reshape(-1, 5, 2), found)


def _part(cache: Path, block: range) -> Path:
    return cache / f"{block.start:06d}.npy"


def _open_detector(path: Path) -> None:
    """Into each process of the pool."""
    global _detector
    _detector = open_detector(path, threshold=0.5, threads=1)


def _detect_block(paths: Sequence[Path], padding: int, cache: Path, block: range) -> None:
    rows = np.stack([_detect(read_image_file(paths[index]), padding) for index in block])
    with atomic_path(_part(cache, block)) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)


def _detect(image: np.ndarray, padding: int) -> np.ndarray:
    """(14,) float32: box and landmarks in pixels of the face nearest to the center; NaN where there is none."""
    border = (padding,) * 4
    boxes, landmarks_px = _detector.detect(cv2.copyMakeBorder(image[..., ::-1], *border, cv2.BORDER_CONSTANT))
    if not len(boxes):
        return np.full(14, np.nan, np.float32)
    center = np.array(image.shape[1::-1]) / 2 + padding
    nearest = np.linalg.norm((boxes[:, :2] + boxes[:, 2:4]) / 2 - center, axis=1).argmin()
    return np.concatenate([boxes[nearest, :4], landmarks_px[nearest].reshape(-1)]).astype(np.float32) - padding


def loose(image: np.ndarray, box: np.ndarray, landmarks_px: np.ndarray, rng: np.random.Generator) -> Crop:
    """The square around the box, turned, scaled and shifted at random, cut from the picture."""
    angle, zoom = np.deg2rad(rng.uniform(-30, 30)), np.exp(rng.uniform(*np.log([0.8, 1.25])))
    zoom *= SIZE / max(box[2:] - box[:2])
    linear = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = SIZE * (0.5 + rng.uniform(-0.1, 0.1, 2))
    matrix = np.column_stack([linear, center - linear @ ((box[:2] + box[2:]) / 2)])
    return warp_smoothly(image, matrix, SIZE), (transform_points(landmarks_px, matrix) / SIZE).astype(np.float32)


def write_pairs(path: Path, crops: Sequence[Crop], is_same: Sequence[bool], people: np.ndarray) -> None:
    """A verification set with its landmarks, its people and a contact sheet."""
    keypoints = np.stack([points for _, points in crops])
    write_landmark_csv(path.with_name(f"{path.stem}_ldmk_5points.csv"), keypoints)
    with atomic_path(path.with_name(f"{path.stem}_people.npy")) as temporary, open(temporary, "wb") as file:
        np.save(file, people)
    cells = [face_cell(image, points) for image, points in crops[:64]]
    write_sheet(path.with_suffix(".png"), arrange(cells, 8))
    write_verification_bin(path, [encode_jpeg(image, 95) for image, _ in crops], is_same)


def write_training_set(folder: Path, faces: Faces, rows: np.ndarray, labels: np.ndarray, cuts: Sequence[Cut]) -> None:
    """A RecordIO set with its landmarks and a contact sheet; each face is cut in each way."""
    crops = ((*cut_face(faces, row, cut), label) for row, label in zip(rows, labels, strict=True) for cut in cuts)
    pack_drawn(folder, ((image, label, keypoints) for image, keypoints, label in crops))
    every = rows[:: max(1, len(rows) * len(cuts) // 64)]
    shown = [cut_face(faces, row, cut) for row in every for cut in cuts][:64]
    write_sheet(folder.with_suffix(".png"), arrange([face_cell(*crop) for crop in shown], 8))


def cut_face(faces: Faces, row: int, cut: Cut) -> Crop:
    """One face of a picture; an average one's keypoints are the template's, as where a score is too low."""
    if cut is loose:
        cut = functools.partial(loose, rng=np.random.default_rng(row))
    crop, keypoints = cut(read_image_file(faces.paths[row]), faces.boxes[row], faces.landmarks_px[row])
    return crop, keypoints if faces.found[row] else CANONICAL_KEYPOINTS


def make_fiw(folder: Path, out: Path, detector: Path, processes: int) -> None:
    """Training sets and validation pairs of Families in the Wild."""
    sets = {"unaligned": [CUTS["whole"]], "aligned": [CUTS["aligned"]], "both": [CUTS["whole"], CUTS["aligned"]]}
    names = [f"fiw_{name}/train.rec" for name in sets] + ["fiw_val_unaligned.bin", "fiw_val_aligned.bin"]
    if all((out / name).is_file() for name in names):
        return
    people = list(list_people(folder).values())
    paths = [path for files in people for path in files]
    person = np.repeat(np.arange(len(people)), [len(files) for files in people])
    faces = find_faces(paths, PADDING["fiw"], detector, out / "detected" / "fiw", processes)
    family_names = [files[0].parent.name.split("_")[0] for files in people]
    families = sorted(set(family_names))
    family = np.array([families.index(name) for name in family_names])[person]
    usable = faces.found & (np.bincount(person[faces.found], minlength=len(people))[person] >= 2)
    kept_out = family % VALIDATION_FAMILIES == VALIDATION_FAMILIES - 1
    rows = np.flatnonzero(usable & ~kept_out)
    labels = np.unique(person[rows], return_inverse=True)[1]
    pairs, is_same = draw_pairs(np.flatnonzero(usable & kept_out), person, family, VALIDATION_PAIRS)
    print(f"fiw: train on {len(rows)} images of {labels.max() + 1} people", flush=True)
    for name, cuts in sets.items():
        if not (out / f"fiw_{name}" / "train.rec").is_file():
            write_training_set(out / f"fiw_{name}", faces, rows, labels, cuts)
        path = out / f"fiw_val_{name}.bin"
        if len(cuts) == 1 and not path.is_file():
            write_pairs(path, [cut_face(faces, row, cuts[0]) for row in pairs], is_same, person[pairs])


def draw_pairs(rows: np.ndarray, person: np.ndarray, family: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs by turns of one person and of people of two families: (2 count,) rows, pair by pair, and (count,) bool."""
    rng = np.random.default_rng(0)
    is_same = np.arange(count) % 2 == 0
    pairs = np.empty((count, 2), np.int64)
    for number, same in enumerate(is_same):
        first = rng.choice(rows)
        fits = person[rows] == person[first] if same else family[rows] != family[first]
        pairs[number] = first, rng.choice(rows[fits & (rows != first)])
    return pairs.reshape(-1), is_same


def make_lfw(folder: Path, out: Path, detector: Path, processes: int) -> None:
    """The official pairs of Labeled Faces in the Wild, cut in four ways."""
    cuts = {"raw": CUTS["whole"], "box": CUTS["box"], "loose": loose, "aligned": CUTS["aligned"]}
    if all((out / f"lfw_{name}.bin").is_file() for name in cuts):
        return
    images, is_same, _ = read_pair_list(folder / "pairs.txt")
    paths = sorted(set(images))
    files = find_pictures(folder, paths)
    faces = find_faces(files, PADDING["lfw"], detector, out / "detected" / "lfw", processes)
    rows = [paths.index(path) for path in images]
    names = sorted({path.split("/")[0] for path in images})
    people = np.array([names.index(path.split("/")[0]) for path in images])
    for name, cut in cuts.items():
        crops = [cut_face(faces, row, cut) for row in range(len(paths))]
        write_pairs(out / f"lfw_{name}.bin", [crops[row] for row in rows], is_same, people)


def make_drawn(out: Path) -> None:
    """Drawn faces, loose and aligned."""
    for name in ("loose", "aligned"):
        if not (out / f"drawn_{name}" / "train.rec").is_file():
            faces = SyntheticFaces(**DRAWN, images_per_identity=16, aligned=name == "aligned")
            pack_drawn(out / f"drawn_{name}", (faces[index] for index in range(len(faces))))
        path = out / f"drawn_val_{name}.bin"
        if not path.is_file():
            others = {**DRAWN, "images_per_identity": 6, "first_identity": FIRST_UNSEEN_IDENTITY}
            faces = SyntheticFaces(**others, aligned=name == "aligned")
            crops = [(image, keypoints) for image, _, keypoints in map(faces.__getitem__, range(len(faces)))]
            pairs, is_same = draw_pairs(np.arange(len(faces)), faces.labels, faces.labels, VALIDATION_PAIRS)
            write_pairs(path, [crops[row] for row in pairs], is_same, faces.labels[pairs])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fiw", type=Path, help="Families in the Wild, F0001_MID1/ a person; left out: none")
    parser.add_argument("--lfw", type=Path, help="Labeled Faces in the Wild, images/ and pairs.txt; left out: none")
    parser.add_argument("--detector", type=Path, help="SCRFD with landmarks as ONNX, for these two")
    parser.add_argument("--out", type=Path, default=Path("study_data"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-drawn", action="store_true", help="leave out the drawn faces")
    options = parser.parse_args(arguments)
    cv2.setNumThreads(0)
    options.out.mkdir(parents=True, exist_ok=True)
    for make, folder in ((make_fiw, options.fiw), (make_lfw, options.lfw)):
        if folder is not None:
            if options.detector is None:
                sys.exit("--detector must name an SCRFD file where --fiw or --lfw is given, got none")
            make(folder, options.out, options.detector, options.processes)
    if not options.no_drawn:
        make_drawn(options.out)


if __name__ == "__main__":
    main()
