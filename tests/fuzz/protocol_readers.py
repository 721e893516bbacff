"""Readers of test sets and of what evaluations keep."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from fuzz.harness import Reader
from fuzz.mutator import mutate, mutate_document
from insightface_kprpe.evaluation import ijb
from insightface_kprpe.evaluation.ijb_meta import read_subject_lists
from insightface_kprpe.evaluation.ijbs import IMAGE_COLUMNS, LIST_COLUMNS, read_ijbs
from insightface_kprpe.evaluation.sanity import results_of_training
from insightface_kprpe.evaluation.tinyface import read_tinyface
from insightface_kprpe.inference.images import AlignedFiles
from insightface_kprpe.inference.stores import FolderStore

_COLUMNS = {"embeddings": ((4,), np.float32), "readable": ((), bool)}
_COUNT = 6


def _make_ijb(folder: Path) -> None:
    (folder / "meta").mkdir()
    points = " ".join(f"{38 + 7 * n}.5" for n in range(10))
    files = {
        "ijbc_name_5pts_score.txt": f"1.jpg {points} 0.9\nZoë.jpg {points} 0.8\n",
        "ijbc_face_tid_mid.txt": "1.jpg 1 101\nZoë.jpg 7 102\n",
        "ijbc_template_pair_label.txt": "1 7 0\n1 1 1\n7 7 1\n",
        "ijbc_1N_probe_mixed.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n1,5,a.png\n1,5,b.png\n",
        "ijbc_1N_gallery_G1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n7,6,a.png\n1,5,b.png\n",
    }
    for name, text in files.items():
        (folder / "meta" / name).write_text(text, encoding="utf-8")


def _read_ijb(folder: Path) -> None:
    meta = ijb.read_meta(folder)
    crops = AlignedFiles([folder / "loose_crop" / name for name in meta.names], meta.landmarks_px)
    for index in range(len(crops)):
        with contextlib.suppress(ValueError, OSError):  # evaluations take that for a missing image
            crops[index]
    read_subject_lists(folder)


def _make_ijbs(folder: Path) -> None:
    points = ",".join(f"{38 + 7 * n}.5" for n in range(10))
    (folder / "images.csv").write_text(
        ",".join(IMAGE_COLUMNS) + "\n" + "".join(f"{n}.jpg,{n},{n // 2},{points},0.9\n" for n in range(6))
    )
    (folder / "uav").mkdir()
    head = ",".join(LIST_COLUMNS) + "\n"
    (folder / "uav" / "probe.csv").write_text(head + "1,0,0\n2,1,2\n")
    (folder / "uav" / "gallery_G1.csv").write_text(head + "3,0,1\n4,2,5\n")


def _make_tinyface(folder: Path) -> None:
    from scipy.io import savemat

    for name, key in (("Probe", "probe"), ("Gallery_Match", "gallery_match"), ("Gallery_Distractor", "")):
        (folder / name).mkdir()
        (folder / name / "1_1.png").touch()
        if key:
            short = key.partition("_")[0]
            names = np.array([["1_1.png"]], dtype=object)
            savemat(folder / f"{key}_img_ID_pairs.mat", {f"{short}_set": names, f"{short}_ids": np.array([[1]])})


def _images(folder: Path) -> list[Path]:
    return [folder / f"{number}.jpg" for number in range(_COUNT)]


def _cache(folder: Path) -> FolderStore:
    return FolderStore(folder / "cache", _COLUMNS, _COUNT, {"model": "m", "flip": True}, _images(folder))


def _make_cache(folder: Path) -> None:
    for path in _images(folder):
        path.write_bytes(path.name.encode())
    store = _cache(folder)
    for block in store.pending():
        store.write(block, (np.ones((len(block), 4), np.float32), np.ones(len(block), bool)))


def _read_cache(folder: Path) -> None:
    store = _cache(folder)
    rows = np.ones((_COUNT, 4), np.float32), np.ones(_COUNT, bool)
    for block in store.pending():
        store.write(block, rows)
    for found, expected in zip(store.finish(), rows, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype


def _make_metrics(folder: Path) -> None:
    lines = [f'{{"step": {n}, "loss": {9 / n}, "accuracy/lfw": {90 + n / 10}}}\n' for n in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(lines))


PROTOCOL_READERS = {
    **{
        f"IJB {name}": Reader(_make_ijb, f"meta/{name}", _read_ijb)
        for name in (
            "ijbc_name_5pts_score.txt", "ijbc_face_tid_mid.txt", "ijbc_template_pair_label.txt",
            "ijbc_1N_probe_mixed.csv", "ijbc_1N_gallery_G1.csv",
        )
    },
    **{
        f"IJB-S {name}": Reader(_make_ijbs, name, read_ijbs)
        for name in ("images.csv", "uav/probe.csv", "uav/gallery_G1.csv")
    },
    "TinyFace .mat": Reader(_make_tinyface, "probe_img_ID_pairs.mat", read_tinyface, share=0.05),
    "cache index.json": Reader(_make_cache, "cache/index.json", _read_cache, mutate_document),
    "cache index.json, bytes": Reader(_make_cache, "cache/index.json", _read_cache, mutate),
    "cache embeddings.npy": Reader(_make_cache, "cache/embeddings.npy", _read_cache, heals=True),
    "cache contents.npz": Reader(_make_cache, "cache/contents.npz", _read_cache, heals=True),
    "metrics of training": Reader(
        _make_metrics, "metrics.jsonl", lambda folder: results_of_training("m", folder), heals=True
    ),
}  # fmt: skip
