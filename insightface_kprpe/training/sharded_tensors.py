"""Named tensors to and from a folder by ``torch.distributed.checkpoint``, read back by any number of ranks.

A tensor is either the same on all ranks, and stored once, or its rows are spread over the ranks, each of which stores
and reads its own. Files are never unpickled without restrictions.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

Rows = Mapping[str, tuple[int, int]]  # tensor: (first row of this rank, rows of all ranks)

# All classes in the index of a checkpoint of tensors, besides torch's data types.
_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class _OtherNetwork(ValueError):
    """A checkpoint that is sound, and of something else."""


def stage(tensors: Mapping[str, torch.Tensor], rows: Rows, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What this rank writes, copied to main memory: its rows of sharded tensors, and on rank 0 all others.

    Args:
        tensors: of this rank, on any device. A name in ``rows`` is sharded, and so are its moments
            (``optimizer.NAME.*``) of the same shape.
        rows: of the parameters that are spread over the ranks.
        group: of all ranks, on CPU; None: this process is the only one.
    """
    staged = {}
    for key, tensor in tensors.items():
        name = _owner(key, rows)
        if group is not None and name is not None and tensor.shape == tensors[name].shape:
            staged[key] = _sharded(_copy(tensor), *rows[name], group)
        elif group is None or group.rank() == 0:  # buffers may differ by rank: those of rank 0 count
            staged[key] = _copy(tensor)
    return staged


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_tensors(folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write what :func:`stage` returned; every rank calls it."""
    with _quiet():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group)


def stored_bytes(tensors: Mapping[str, torch.Tensor], rows: Rows) -> int:
    """Approximate size in bytes of the tensors of all ranks; arguments as for :func:`stage`."""
    total = 0
    for key, tensor in tensors.items():
        name = _owner(key, rows)
        sharded = name is not None and tensor.shape == tensors[name].shape and len(tensor) > 0
        total += tensor.nbytes * rows[name][1] // len(tensor) if sharded else tensor.nbytes
    return total


def read_tensors(
    folder: Path,
    wanted: Mapping[str, torch.Tensor],
    rows: Rows,
    optimized: Sequence[str],
    group: dist.ProcessGroup | None,
) -> dict[str, torch.Tensor]:
    """This rank's part of a checkpoint, in main memory; every rank calls it.

    Args:
        folder: the checkpoint.
        wanted: tensors of this rank; weights and buffers must all be in the checkpoint. Moments are those of the file.
        rows: as in :func:`stage`.
        optimized: names of the parameters whose moments may be read.
        group: as in :func:`stage`.

    Raises:
        ValueError: the files are damaged, or hold other names or shapes.
    """
    with _damage(folder):
        found = _empty_tensors(folder, _stored(folder), wanted, rows, optimized)
        _read(folder, found, wanted, rows, group)
    return found


def read_fitting_tensors(
    folder: Path, wanted: Mapping[str, torch.Tensor], rows: Rows, group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """This rank's part of those tensors that a checkpoint has under the same name and in the same size.

    Arguments and errors are those of :func:`read_tensors`; every rank calls it.
    """
    with _damage(folder):
        stored = _stored(folder)
        found = {
            key: torch.empty(tensor.shape, dtype=stored[key].properties.dtype)
            for key, tensor in wanted.items()
            if key in stored and stored[key].size == _size_of_all(key, tensor, rows)
        }
        _read(folder, found, wanted, rows, group)
    return found


@contextlib.contextmanager
def _damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except _OtherNetwork:
        raise
    except (Exception, CheckpointException) as error:  # a damaged pickle raises anything from EOFError to KeyError
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}); remove it to resume from an older one"
        ) from error


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What tensors a checkpoint has."""
    index = _SafeReader(folder).read_metadata().state_dict_metadata
    return {key: entry for key, entry in index.items() if isinstance(entry, TensorStorageMetadata)}


def _read(
    folder: Path,
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    rows: Rows,
    group: dist.ProcessGroup | None,
) -> None:
    """Fill the tensors of ``found``."""
    request: dict[str, Any] = dict(found)
    for key, tensor in found.items():
        name = _owner(key, rows)
        if group is not None and name is not None and tensor.shape == wanted[name].shape:
            request[key] = _sharded(tensor, *rows[name], group)
    with _quiet():
        dcp.load(request, storage_reader=_SafeReader(folder), process_group=group)


def _size_of_all(key: str, tensor: torch.Tensor, rows: Rows) -> torch.Size:
    """The size of a tensor in the checkpoint, where the rows of all ranks are together."""
    return torch.Size((rows[key][1], *tensor.shape[1:])) if key in rows else tensor.shape


def _empty_tensors(
    folder: Path,
    stored: Mapping[str, TensorStorageMetadata],
    wanted: Mapping[str, torch.Tensor],
    rows: Rows,
    optimized: Sequence[str],
) -> dict[str, torch.Tensor]:
    """Tensors to read into: weights and buffers with their shapes here, moments with those in the file."""
    empty, problems = {}, []
    for key, tensor in wanted.items():
        if key.startswith("optimizer."):
            continue
        size = _size_of_all(key, tensor, rows)
        if key not in stored:
            problems.append(f"missing {key}")
        elif stored[key].size != size:
            problems.append(f"{key} is {tuple(stored[key].size)}, this run has {tuple(size)}")
        else:
            empty[key] = torch.empty(tensor.shape, dtype=stored[key].properties.dtype)
    weights = {key for key in stored if not key.startswith("optimizer.")}
    moments = {key for key in stored if key.startswith("optimizer.")}
    problems += [f"unexpected {key}" for key in sorted(weights - set(wanted))]
    problems += [f"unexpected {key}" for key in sorted(moments) if _parameter(key) not in optimized]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise _OtherNetwork(
            f"{folder} belongs to another network or loss: {'; '.join(problems[:5])}{more}; to start from those "
            "weights, for instance on other people, start a new run in another output with init_from set to that run's "
            "folder"
        )
    for key in moments:
        name, size = _parameter(key), stored[key].size
        if name in rows and size == (rows[name][1], *wanted[name].shape[1:]):
            size = wanted[name].shape
        empty[key] = torch.empty(size, dtype=stored[key].properties.dtype)
    return empty


def _parameter(moment: str) -> str:
    return moment[len("optimizer.") :].rpartition(".")[0]


def _owner(key: str, rows: Rows) -> str | None:
    """The sharded parameter that a tensor is, or is a moment of."""
    name = _parameter(key) if key.startswith("optimizer.") else key
    return name if name in rows else None


def _sharded(local: torch.Tensor, first: int, total: int, group: dist.ProcessGroup) -> Any:
    offsets = [first] + [0] * (local.dim() - 1)
    place = ShardMetadata(shard_offsets=offsets, shard_sizes=list(local.shape), placement=f"rank:{group.rank()}/cpu")
    with _quiet():
        return init_from_local_shards([Shard(local, place)], total, *local.shape[1:], process_group=group)


class _SafeReader(dcp.FileSystemReader):
    """Reads the index of a checkpoint, which is a pickle, without executing anything in it."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _IndexUnpickler(pickle._Unpickler):  # in Python, see data.verification_bin
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX.get(module, ()) or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in the index of a checkpoint")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's remarks on ShardedTensor (no other tensor has shards of any size) and single processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
