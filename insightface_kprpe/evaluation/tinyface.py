"""TinyFace: 1:N identification of native low-resolution faces among distractors, and the files of its test set."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.picture_files import list_pictures, nfc
from .search import rank_k, search

DISTRACTOR_ID = -100
_MAT_SECONDS = 120  # a list takes one
# Prints the variables of a .mat file: argv[1] is the file, the others are the names. Cells come as lists.
# A compressed file may claim more than the memory that it gets.
_PRINT_MAT = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]  # not what lies in the current folder
import json
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except (ImportError, ValueError, OSError):
    pass
from scipy.io import loadmat
found = loadmat(sys.argv[1], variable_names=sys.argv[2:])
sys.stdout.reconfigure(encoding="utf-8")
content = {key: found[key].ravel().tolist() for key in sys.argv[2:] if key in found}
print(json.dumps(content, default=lambda cell: cell.tolist()))
"""


class TinyFaceSet(NamedTuple):
    """Images of the TinyFace test set and who is on them."""

    probe_paths: list[Path]
    probe_ids: np.ndarray  # (P,) int64
    gallery_paths: list[Path]  # matches, then distractors
    gallery_ids: np.ndarray  # (G,) int64, DISTRACTOR_ID for distractors


def identification(
    probe: np.ndarray,
    gallery: np.ndarray,
    probe_ids: Sequence,
    gallery_ids: Sequence,
    ranks: Sequence[int] = (1, 5, 20),
) -> dict[str, float]:
    """Closed-set identification by cosine: is one of the probe's images among the first k of the gallery?

    Args:
        probe: (P, D) float, need not be normalized.
        gallery: (G, D) float, matches and distractors.
        probe_ids: (P,) identities, integers or strings; a probe whose identity is not in the gallery is left out.
        gallery_ids: (G,) identities; a distractor has one that no probe has.
        ranks: the k.

    Returns:
        ``rank_1`` and so on, fractions of the probes. Another image that ties with the right one ranks before it.

    Raises:
        ValueError: shapes do not fit, values are not finite, or no probe is in the gallery.
    """
    matches = search(probe, gallery, probe_ids, gallery_ids)
    return {f"rank_{rank}": value for rank, value in rank_k(matches, ranks).items()}


def read_tinyface(folder: str | Path) -> TinyFaceSet:
    """List the images of a TinyFace test set.

    Identities come from the official lists ``probe_img_ID_pairs.mat`` and ``gallery_match_img_ID_pairs.mat`` if they
    are in the folder, else from the file names (``ID_n.png``).

    Args:
        folder: the folder that holds ``Probe``, ``Gallery_Match`` and ``Gallery_Distractor``, or the one above it
            that holds ``Testing_Set``.

    Raises:
        FileNotFoundError: a sub-folder is missing or has no images.
        ValueError: a file name does not begin with an identity, or a list is malformed.
        ImportError: there are lists and SciPy is not installed.
    """
    folder = Path(folder)
    folder = folder / "Testing_Set" if (folder / "Testing_Set").is_dir() else folder
    probe_paths, probe_ids = _read_list(folder, "Probe", "probe")
    match_paths, match_ids = _read_list(folder, "Gallery_Match", "gallery_match")
    distractors = _images(folder / "Gallery_Distractor")
    gallery_ids = np.concatenate([match_ids, np.full(len(distractors), DISTRACTOR_ID)])
    return TinyFaceSet(probe_paths, probe_ids, match_paths + distractors, gallery_ids)


def _images(folder: Path) -> list[Path]:
    paths = list_pictures(folder) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"no images in {folder}; expected Probe, Gallery_Match and Gallery_Distractor")
    return paths


def _read_list(folder: Path, images: str, name: str) -> tuple[list[Path], np.ndarray]:
    """The images of one sub-folder and their identities."""
    paths = _images(folder / images)
    mat = folder / f"{name}_img_ID_pairs.mat"
    if not mat.is_file():
        return paths, np.array([_identity(path) for path in paths])
    key = name.split("_")[0]
    names, ids = _read_mat_list(mat, f"{key}_set", f"{key}_ids")
    by_stem = {nfc(path.stem): path for path in paths}  # aligned copies of the set may have another suffix
    return [by_stem.get(Path(image).stem, folder / images / image) for image in names], ids


def _read_mat_list(path: Path, names_key: str, ids_key: str) -> tuple[list[str], np.ndarray]:
    """N names and (N,) int64 identities of a list in MATLAB's format.

    Args:
        path: the ``.mat`` file.
        names_key: variable with a cell array, one text per image.
        ids_key: variable with a whole number for each image.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError(f"{path} needs: pip install 'insightface-kprpe[tinyface]'")
    # In a separate process, as SciPy can crash on a damaged file.
    command = [sys.executable, "-c", _PRINT_MAT, str(path), names_key, ids_key]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=_MAT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{path} could not be read in {_MAT_SECONDS} seconds; is it a list of TinyFace's?") from error
    try:
        if done.returncode:
            raise ValueError((done.stderr.strip() or "it is damaged").splitlines()[-1])
        variables = json.loads(done.stdout)
        missing = [key for key in (names_key, ids_key) if key not in variables]
        if missing:
            raise ValueError(f"{' and '.join(missing)} not found in it")
        names, ids = variables[names_key], np.array(variables[ids_key])
        if not all(isinstance(name, list) and len(name) == 1 and isinstance(name[0], str) for name in names):
            raise ValueError(f"{names_key} must be a cell array with one text per image")
        if ids.ndim != 1 or ids.dtype.kind not in "iuf" or not (np.isfinite(ids) & (ids == np.rint(ids))).all():
            raise ValueError(f"{ids_key} must be whole numbers")
        if len(names) != len(ids) or not len(names):
            raise ValueError(f"there must be one identity per image, got {len(ids)} for {len(names)}")
    except ValueError as error:
        raise ValueError(f"{path} is not a list in MATLAB's format (version 5 to 7): {error}") from error
    return [nfc(name) for (name,) in names], ids.astype(np.int64)


def _identity(path: Path) -> int:
    identity = path.stem.split("_")[0]
    if not identity.isdigit():
        raise ValueError(
            f"the name of {path} must be ID_n with a number for ID; or put the .mat lists next to {path.parent}"
        )
    return int(identity)
