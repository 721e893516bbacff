"""Readers of data sets, landmarks, pictures and galleries."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

import cv2
import numpy as np

from fuzz.harness import Reader
from fuzz.mutator import mutate
from insightface_kprpe.app.file_gallery import FileGallery
from insightface_kprpe.app.gallery import Content
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.face_list import ListedFace, format_faces, read_faces
from insightface_kprpe.data.landmark_csv import read_keypoints, write_landmark_csv
from insightface_kprpe.data.landmark_dataset import LandmarkDataset
from insightface_kprpe.data.pair_lists import read_pair_list
from insightface_kprpe.data.picture_files import read_image_file, readable_suffixes
from insightface_kprpe.data.record_inspection import inspect_records
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.data.verification_bin import read_verification_bin, write_verification_bin
from insightface_kprpe.files import read_text
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS

_SIDE = 24


def _image(seed: int, suffix: str = ".jpg") -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.imencode(suffix, cv2.resize(coarse, (_SIDE, _SIDE)))[1].tobytes()


def _make_records(folder: Path) -> None:
    write_face_records(folder / "train", [(_image(i), i // 2) for i in range(6)], (_SIDE, _SIDE))
    write_landmark_csv(folder / "ldmk_5points.csv", np.tile(CANONICAL_KEYPOINTS, (6, 1, 1)))


def _read_records(folder: Path) -> None:
    faces = open_faces(folder)
    for i in range(len(faces)):
        faces[i]


def _make_list(folder: Path) -> None:
    points = CANONICAL_KEYPOINTS
    face = ListedFace("a/1.jpg", (1, 2), "a/1.jpg", "", True, 0.5, np.arange(4.0), 100 * points, points)
    other = ListedFace("a/2.jpg", (1, 2), left_out="no face found")
    (folder / "faces.csv").write_text(format_faces([face, other]))


def _make_pairs(folder: Path) -> None:
    (folder / "pairs.txt").write_text("2\t1\nAnn\t1\t2\nAnn\t3\tBob\t1\nBob\t1\t2\nBob\t2\tCid\t1\n")
    (folder / "pairs.csv").write_text("first,second,is_same\na/1.jpg,a/2.jpg,1\na/1.jpg,b/1.jpg,0\n")


def _make_bin(folder: Path) -> None:
    write_verification_bin(folder / "pairs.bin", [_image(i) for i in range(4)], [True, False])


def _read_bin(folder: Path) -> None:
    pairs = read_verification_bin(folder / "pairs.bin")
    for i in range(len(pairs.images)):
        try:
            pairs.image(i)
        except ValueError as error:
            if "verification set pairs: image" not in str(error):
                raise


def _make_labels(folder: Path) -> None:
    (folder / "a.png").write_bytes(_image(0, ".png"))
    numbers = [2, 2, 18, 18, *(n for x, y in 4 + ARCFACE_TEMPLATE_112 / 8 for n in (x, y, 0)), 0.3]
    line = " ".join(f"{number:g}" for number in numbers)
    (folder / "label.txt").write_text(f"# a.png\n{line}\n1 1 9 9\n# a.png\n{line}\n{line}\n")


def _read_labels(folder: Path) -> None:
    dataset = LandmarkDataset(folder, size=32)
    for i in range(min(3, len(dataset))):
        dataset[i]


def _make_gallery(folder: Path) -> None:
    gallery = FileGallery("model")
    gallery.add(["Ann", "Zoë"], np.eye(2, 8), [1.0, 0.5], ["a", "b"], [Content("0" * 64, 1, 2)] * 2)
    gallery.save(folder / "people.npz")


def _read_gallery(folder: Path) -> None:
    gallery = FileGallery.load(folder / "people.npz")
    gallery.search(np.ones((1, gallery.embeddings.shape[1])))
    gallery.people()


def _mutate_member(data: bytes, seed: str) -> bytes:
    """Damage one array of an ``.npz`` file whose checksums are right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = random.Random(seed).choice(sorted(members))
    members[chosen] = mutate(members[chosen], seed)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _picture(suffix: str) -> Reader:
    name = f"a{suffix}"
    return Reader(
        lambda folder: (folder / name).write_bytes(_image(1, suffix)), name, lambda f: read_image_file(f / name)
    )


DATA_READERS = {
    "train.rec": Reader(_make_records, "train.rec", _read_records),
    "train.idx": Reader(_make_records, "train.idx", _read_records),
    "ldmk_5points.csv": Reader(_make_records, "ldmk_5points.csv", lambda f: read_keypoints(f / "ldmk_5points.csv", 6)),
    "property": Reader(_make_records, "property", lambda folder: inspect_records(folder), heals=True),
    "rec inspect": Reader(_make_records, "train.rec", lambda folder: inspect_records(folder, None)),
    "faces.csv": Reader(_make_list, "faces.csv", lambda f: read_faces(f / "faces.csv")),
    "pairs.txt": Reader(_make_pairs, "pairs.txt", lambda f: read_pair_list(f / "pairs.txt")),
    "pairs.csv": Reader(_make_pairs, "pairs.csv", lambda f: read_pair_list(f / "pairs.csv")),
    "pairs.bin": Reader(_make_bin, "pairs.bin", _read_bin),
    "label.txt": Reader(_make_labels, "label.txt", _read_labels),
    "gallery": Reader(_make_gallery, "people.npz", _read_gallery),
    "gallery array": Reader(_make_gallery, "people.npz", _read_gallery, _mutate_member),
    "text": Reader(lambda f: (f / "a.txt").write_text("Zoë\n1 2"), "a.txt", lambda f: read_text(f / "a.txt")),
    **{
        f"image {suffix}": _picture(suffix)
        for suffix in (".jpg", ".png", ".bmp", ".webp", ".tif", ".gif", ".avif")
        if suffix in readable_suffixes()
    },
}
