"""Writes the embeddings of a set of crops to a single ``.npz`` or Parquet file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.crops import Crops, open_crops
from ..data.image_codec import fit_crop
from ..data.landmark_csv import read_keypoints
from ..data.picture_files import nfc
from ..distributed import rank_and_world_size
from ..files import atomic_path, check_writable
from ..fingerprint import fingerprint
from .embedding import Embeddings, EmbedOptions, embed_faces
from .models import Embedder

SUFFIXES = (".npz", ".parquet")
_ROWS_AT_ONCE = 8192


class _Fitted(Sequence):
    """Crops in the input size of networks."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return self.crops.count

    def __getitem__(self, index: int) -> np.ndarray:
        return fit_crop(self.crops.read(index))


def embed_to_file(embed: Embedder, source: str | Path, out: str | Path, options: EmbedOptions) -> int:
    """Embed a set of crops into a file, one row per image; images that cannot be read have no row.

    Keypoints come from ``ldmk_5points.csv`` if the set has one.

    Args:
        embed: the model.
        source: folder of images, of people or with ``train.rec``, or a ``.rec`` or ``.bin`` file.
        out: ``.npz`` with arrays, or ``.parquet`` with columns, ``name``, ``embedding``, ``norm``, ``keypoints``,
            ``score`` (plural in ``.npz``); the name is the path below ``source``, or the number of the image.
        options: how to embed.

    Returns:
        How many rows there are.

    Raises:
        ValueError: another kind of file, or the images cannot be read.
        OSError: the file cannot be written; said before anything is embedded.
        ImportError: Parquet without pyarrow.
    """
    source, out = Path(source), Path(out)
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {out}")
    if out.suffix == ".parquet":
        _import_pyarrow()
    if rank_and_world_size()[0] == 0:
        check_writable(out)
    crops = open_crops(source)
    if crops.paths:
        names = [nfc(str(path.relative_to(source))) for path in crops.paths]
    else:
        names = list(map(str, range(crops.count)))
    keypoints = read_keypoints(crops.landmark_file, crops.count)[0] if crops.landmark_file.is_file() else None
    files = {"source": fingerprint("\n".join(names)), "files": crops.paths or [crops.container]}
    found = embed_faces(embed, _Fitted(crops), keypoints, options, name=source.stem, **files)
    if rank_and_world_size()[0] == 0:
        with atomic_path(out) as temporary:
            (_write_npz if out.suffix == ".npz" else _write_parquet)(temporary, np.array(names), found)
    return int(found.readable.sum())


def _write_npz(path: Path, names: np.ndarray, found: Embeddings) -> None:
    kept = found.readable
    columns = {key: getattr(found, key) for key in ("embeddings", "norms", "keypoints", "scores")} | {"names": names}
    with open(path, "wb") as file:
        np.savez(file, **{key: values if kept.all() else values[kept] for key, values in columns.items()})


def _write_parquet(path: Path, names: np.ndarray, found: Embeddings) -> None:
    """A few thousand rows at a time, as the embeddings may be a memory map larger than memory."""
    pyarrow, parquet = _import_pyarrow()
    number = pyarrow.float32()
    schema = pyarrow.schema(
        {
            "name": pyarrow.string(),
            "embedding": pyarrow.list_(number, found.embeddings.shape[1]),
            "norm": number,
            "keypoints": pyarrow.list_(number, 10),
            "score": number,
        }
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(names), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            kept = found.readable[part]
            columns = (names, found.embeddings, found.norms, found.keypoints, found.scores)
            rows = [column[part][kept] for column in columns]
            arrays = [
                pyarrow.FixedSizeListArray.from_arrays(np.ascontiguousarray(row).reshape(-1), type=field.type)
                if row.ndim > 1
                else pyarrow.array(row, field.type)
                for row, field in zip(rows, schema, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _import_pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("a .parquet file needs: pip install 'insightface-kprpe[parquet]'; .npz does not") from error
    return pyarrow, pyarrow.parquet
