"""Photos -> a folder or a RecordIO set of crops with landmarks: interrupted runs go on, later ones add what is new."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from filelock import FileLock, Timeout

from ..contact_sheet import CELL, arrange, face_cell, title_bar
from ..data.crops import open_crops
from ..data.face_dataset import LANDMARK_FILE
from ..data.face_list import FACE_LIST, ListedFace, faces_by_photo, format_faces, parse_faces, read_faces
from ..data.landmark_csv import write_landmark_csv
from ..data.photos import PhotoFiles, VideoFrames, open_photos
from ..data.picture_files import list_people, list_pictures, read_image_file
from ..data.reading import Items, results
from ..data.record_tools import pack_folder
from ..documents import read_json_object
from ..files import atomic_path, user_file, write_atomically
from ..fingerprint import file_sha256
from .alignment import AlignOptions, CutPhoto, FaceCutter
from .detection import detector_file

_PAIRS = "pairs.txt"  # of a verification set; goes with its pictures
_SETTINGS, _JOURNAL, _LOCK, _EXPORTED = ".align.json", ".faces.csv.part", ".align.lock", ".dfa.onnx"
_PHOTOS_AT_ONCE = 8  # what a worker hands over, and what a kill costs at most
_LEFT_OUT_SHOWN = 4  # one photo of a sheet in so many may be one without a crop


@dataclass
class Aligned:
    """What became of photos.

    Attributes:
        photos: how many there are.
        faces: the rows of the list, in the order of the photos.
        without: why each photo without any crop has none.
        gone: photos of an earlier run that are not there any more; their crops were removed.
        nobody: people none of whose photos gave a crop.
    """

    photos: int
    faces: list[ListedFace]
    without: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    nobody: list[str] = field(default_factory=list)

    @property
    def crops(self) -> int:
        """How many faces were cut out."""
        return sum(bool(face.crop) for face in self.faces)


def align_to_folder(
    source: str | Path,
    out: str | Path,
    detector: str | Path,
    options: AlignOptions | None = None,
    *,
    root: str | Path = "~/.insightface",
    every: int = 1,
    num_workers: int = 0,
) -> Aligned:
    """Cut the faces of photos out, into a folder that lies as theirs does.

    Beside the crops are ``ldmk_5points.csv``, in the order in which :func:`~.data.crops.open_crops` numbers them, and
    ``faces.csv``, the list of all faces that were found (:mod:`.data.face_list`). A ``pairs.txt`` comes along.
    Photos that were done by an earlier call with the same options are not looked at again, unless they have changed.

    Args:
        source: a folder with a sub-folder of photos a person, a folder of photos, one photo, or a video.
        out: the folder; a new one, or that of an earlier call.
        detector: an ONNX file of SCRFD's layout, the name or folder of a pack, or a DFA; or the ``faces.csv`` of an
            earlier call, whose faces are cut out again.
        options: what to cut out; None: the largest face, aligned.
        root: InsightFace's root folder, where named packs are.
        every: of so many frames of a video one counts.
        num_workers: processes; 0: this one.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: the source holds no pictures, ``out`` holds something else, or another process writes to it.
    """
    options, out = options or AlignOptions(), Path(out)
    photos = open_photos(source, every)
    here, there = out.resolve(), Path(source).resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ValueError(f"out must lie apart from the source, or crops would be taken for photos, got {out}")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _SETTINGS).is_file())):
        raise ValueError(f"out must be a new folder, or that of an earlier run, got {out}, which holds something else")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        is_list = Path(detector).suffix == ".csv"
        file = user_file(detector, "list of faces") if is_list else detector_file(detector, root, out / _EXPORTED)
        _check_settings(out, options, file, every if isinstance(photos, VideoFrames) else 1)
        known = _known(out, photos)
        gone = _remove_gone(out, known, photos)
        cutter = FaceCutter(photos, crop_names(photos.names), file, options, 1 if num_workers else None)
        _look(out, cutter, known, num_workers)
        if (pairs := Path(source) / _PAIRS).is_file():
            write_atomically(out / _PAIRS, pairs.read_bytes())
        done = Aligned(len(photos), [face for name in photos.names for face in known[name]], gone=gone)
        _finish(out, done)
    by_photo = faces_by_photo(done.faces)
    done.without = {
        name: "; ".join(dict.fromkeys(face.left_out for face in faces))
        for name, faces in by_photo.items()
        if not any(face.crop for face in faces)
    }
    seen = Counter(name.split("/")[0] for name in by_photo if "/" in name)
    lost = Counter(name.split("/")[0] for name in done.without if "/" in name)
    done.nobody = [name for name in seen if seen[name] == lost[name]]
    return done


def align_to_records(
    source: str | Path, out: str | Path, detector: str | Path, options: AlignOptions | None = None, **kwargs: object
) -> Aligned:
    """What :func:`align_to_folder` does, into a new RecordIO set; the sub-folders of the source are its people.

    Raises:
        ValueError: as there, or the source has no sub-folders of photos, or nobody has a face.
    """
    out, source = Path(out), Path(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new folder for records, got {out}, which exists; remove it or name another")
    if not source.is_dir() or not list_people(source):
        raise ValueError(f"records need a folder with a sub-folder of photos for each person, got {source}")
    crops = out.with_name(f".{out.name}.crops")
    done = align_to_folder(source, crops, detector, options, **kwargs)
    if done.crops:
        pack_folder(crops, out, quality=95)
        shutil.copyfile(crops / FACE_LIST, out / FACE_LIST)
        shutil.rmtree(crops)
    return done


def crop_names(photos: list[str]) -> list[str]:
    """Path of each photo's crop, without suffix: that of the photo, with its suffix where two would be one file."""
    stems = [name.removesuffix(Path(name).suffix) for name in photos]
    times = Counter(stem.lower() for stem in stems)  # some disks do not tell a from A
    return [stem if times[stem.lower()] == 1 else name for name, stem in zip(photos, stems, strict=True)]


def overlay_sheet(done: Aligned, source: str | Path, out: str | Path, count: int, every: int = 1) -> np.ndarray:
    """A picture of photos with boxes and landmarks, each beside its crop, and of some photos without a crop.

    Args:
        done: what :func:`align_to_folder` returned.
        source, out, every: of that call.
        count: crops to show, evenly spread.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    photos = open_photos(source, every)
    numbers = {name: number for number, name in enumerate(photos.names)}
    cut = _spread([face for face in done.faces if face.crop], count)
    lost = _spread([f for f in done.faces if f.photo in done.without], max(1, count // _LEFT_OUT_SHOWN))
    cells = []
    for face in sorted(cut, key=lambda face: numbers[face.photo]):
        crop = face_cell(read_image_file(Path(out) / face.crop), face.keypoints, f"{face.score:.2f}")
        cells.append(np.hstack([_photo_cell(photos[numbers[face.photo]], face), crop]))
    columns = max(1, math.ceil(math.sqrt(len(cells) / 2)))
    width = 2 * CELL * columns
    parts = [title_bar("cut out", width), arrange(cells, columns)] if cells else []
    cells = []
    for face in lost:
        if not face.left_out.startswith("unreadable"):
            cells.append(_photo_cell(photos[numbers[face.photo]], face, face.left_out[:22]))
    if cells:
        parts += [title_bar("without a crop", width), arrange(cells, 2 * columns)]
    return np.vstack(parts)


def _photo_cell(image: np.ndarray, face: ListedFace, caption: str = "") -> np.ndarray:
    """A photo, RGB, with a face's box and landmarks."""
    image = image.copy()
    if not np.isnan(face.score):
        thickness = max(1, round(max(image.shape[:2]) / CELL * 1.5))
        left, top, right, bottom = (round(float(value)) for value in face.box)
        cv2.rectangle(image, (left, top), (right, bottom), (80, 220, 80), thickness)
    return face_cell(image, face.landmarks_px / image.shape[1::-1] if not np.isnan(face.score) else None, caption)


def _spread(faces: list[ListedFace], count: int) -> list[ListedFace]:
    return [faces[i] for i in np.unique(np.linspace(0, len(faces) - 1, min(count, len(faces))).round().astype(int))]


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is writing to {out}; wait for it, or name another folder") from error
    try:
        yield
    finally:
        lock.release()


def _check_settings(out: Path, options: AlignOptions, detector: Path, every: int) -> None:
    """Make sure that a folder's crops were made in the same way; a new folder learns how."""
    settings = dataclasses.asdict(options) | {"detector": file_sha256(detector), "every": every}
    path = out / _SETTINGS
    if not path.is_file():
        write_atomically(path, json.dumps(settings, indent=1).encode())
        return
    before = read_json_object(path)
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)!r:.20} and is {settings[name]!r:.20}" for name in changed)
        raise ValueError(f"{out} was made in another way ({told}); name another folder, or remove it")


def _known(out: Path, photos: PhotoFiles | VideoFrames) -> dict[str, list[ListedFace]]:
    """What earlier calls, killed ones included, found in each photo; those that have changed are left out."""
    known = faces_by_photo(read_faces(out / FACE_LIST)) if (out / FACE_LIST).is_file() else {}
    if (journal := out / _JOURNAL).is_file():
        # The last line of a killed writer may be torn, and so may the last photo's rows be incomplete.
        text = journal.read_bytes().decode("utf-8", "ignore")
        for part in text.split("\f")[:-1]:
            rows = parse_faces(format_faces([]) + part, journal)
            known[rows[0].photo] = rows
    numbers = {name: number for number, name in enumerate(photos.names)}
    for name in [name for name in known if name in numbers]:
        fresh = all((out / face.crop).is_file() for face in known[name] if face.crop)
        with contextlib.suppress(OSError):
            if fresh and known[name][0].stamp == photos.stamp(numbers[name]):
                continue
        _remove_crops(out, known.pop(name))
    return known


def _remove_gone(out: Path, known: dict[str, list[ListedFace]], photos: PhotoFiles | VideoFrames) -> list[str]:
    gone = sorted(set(known) - set(photos.names))
    for name in gone:
        _remove_crops(out, known.pop(name))
    return gone


def _remove_crops(out: Path, faces: list[ListedFace]) -> None:
    for face in faces:
        if face.crop:
            (out / face.crop).unlink(missing_ok=True)


def _look(out: Path, cutter: FaceCutter, known: dict[str, list[ListedFace]], num_workers: int) -> None:
    """Cut the faces of all photos that are not known yet; every photo is noted when its crops are written."""
    waiting = [index for index, name in enumerate(cutter.photos.names) if name not in known]
    if not waiting:
        return
    items = Items(len(waiting), lambda place: cutter(waiting[place]))
    with open(out / _JOURNAL, "a", encoding="utf-8", newline="") as journal:
        journal.write("\f" if journal.tell() else "")  # ends what a killed writer left
        for cut in results(items, num_workers, "aligning", _PHOTOS_AT_ONCE):
            if isinstance(cut, str):
                raise ValueError(cut)
            _write_crops(out, cut)
            journal.write(format_faces(cut.faces, header=False) + "\f")
            journal.flush()
            known[cut.faces[0].photo] = cut.faces


def _write_crops(out: Path, cut: CutPhoto) -> None:
    # Not atomically: a crop that is not noted in the journal is written again.
    for face, content in zip((face for face in cut.faces if face.crop), cut.files, strict=True):
        path = out / face.crop
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _finish(out: Path, done: Aligned) -> None:
    """Write the list and the landmark file."""
    by_path = {out / face.crop: face for face in done.faces if face.crop}
    others = set(list_pictures(out)) - set(by_path)
    if others:
        raise ValueError(f"{out} holds pictures that were not cut here, such as {min(others)}; remove them")
    with atomic_path(out / FACE_LIST) as temporary:
        temporary.write_text(format_faces(done.faces), encoding="utf-8", newline="")
    (out / LANDMARK_FILE).unlink(missing_ok=True)
    if by_path:
        faces = [by_path[path] for path in open_crops(out).paths]
        scores = np.clip([face.score for face in faces], 0, 1)
        write_landmark_csv(out / LANDMARK_FILE, np.stack([face.keypoints for face in faces]), scores)
    (out / _JOURNAL).unlink(missing_ok=True)
