"""Weights as named tensors: read without executing anything, found under any prefix, loaded strictly."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from .documents import description_beside

logger = logging.getLogger(__name__)

# Where a self-aligned network keeps its aligner's weights.
ALIGNER_PREFIX = "dfa."
# Tensors that show where in a file a network of this package is: of a ViT, of the bodies of landmark networks, and of
# IResNets (arcface_torch's; AdaFace's and CVLface's) and MobileFaceNet.
_LANDMARKS_OF_NETWORKS = (
    ("patch_embed.proj.weight",),
    ("body.stage1.0.0.weight", "body.conv1.weight"),
    ("layer1.0.prelu.weight", "input_layer.0.weight", "conv_sep.layers.0.weight"),
)
# Prefixes that wrappers add, for unknown networks, if all their tensors have them.
_WRAPPERS = ("net.", "backbone.", "module.", "model.")
# What torch's wrappers of single layers put into names.
_INSERTED = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Where training scripts put the state dict among other things.
_CONTAINERS = ("state_dict", "model_state_dict", "state_dict_backbone", "model", "backbone", "net", "network")
# Only used in training, so files may have it or not.
_OPTIONAL = {"mask_token"}
_DEEPEST = 32  # modules in one another
_COUNTER = "num_batches_tracked"  # of batch normalization; not used in inference
# Of a ViT, and of IResNets.
_FIRST_LAYER = re.compile(r"(?:^|\.)(?:patch_embed\.proj|input_layer\.0|(?<!body\.)conv1)\.weight$")


class FoundWeights(NamedTuple):
    """The tensors of one network among those of a file."""

    tensors: dict[str, torch.Tensor]  # by the network's own names
    prefix: str  # in the file
    others: list[str]  # names in the file that are not the network's


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file, or of a torch file read with ``weights_only=True``.

    Objects of other classes than torch's, which Lightning stores next to the weights, are left out unseen. Weights that
    ``model.yaml`` next to them says are of a BGR network get their first layer converted to RGB, which is exact.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no tensors, or is of a BGR network whose first layer is not known.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a weights file, such as {path / 'model.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"weights file not found: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = _load(path)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read as weights ({_reason(error)}); expected a plain state dict"
        ) from error
    state = _tensors_in(content)
    if not state:
        raise ValueError(f"{path} holds no state dict (a mapping from names to tensors)")
    check_plain(state, path)
    return _to_rgb(state, path)


def check_plain(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse tensors that are no plain numbers, or claim more of them than their file can hold.

    Raises:
        ValueError: there is one.
    """
    size = path.stat().st_size
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.nbytes > size:
            raise ValueError(
                f"{path}: {key} must be a plain tensor whose values are in the file, got {value.dtype} "
                f"{tuple(value.shape)} in {size} bytes"
            )


def load_torch_file(path: Path, **options: Any) -> Any:
    """What a file of ``torch.save`` holds, read without running anything; one takes no more memory than disk.

    Args:
        path: of the file.
        **options: for ``torch.load``.

    Raises:
        ValueError: parts of the file are compressed.
        pickle.UnpicklingError: it holds other objects than tensors and plain values, or is damaged.
        RuntimeError, OSError, EOFError: it is damaged, or cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch never compresses, but reads what is: a thousand times the size of the file.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("parts of it are compressed, which torch.save does not do")
    return torch.load(path, map_location="cpu", weights_only=True, **options)


def _load(path: Path) -> Any:
    try:
        return load_torch_file(path)
    except pickle.UnpicklingError:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else ()
        if not names:
            raise
        # Lightning stores hyperparameters and callbacks: they are replaced by empty classes of the same names.
        stand_ins = []
        for name in names:
            module, _, attribute = name.rpartition(".")
            stand_ins.append(type(attribute, (_Ignored,), {"__module__": module, "__qualname__": attribute}))
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)


class _Ignored:
    """Placeholder for an object whose class is not torch's: a mapping, which torch's reader fills but never calls."""

    def __new__(cls, *args: Any, **kwargs: Any) -> OrderedDict:
        return OrderedDict()


def _reason(error: Exception) -> str:
    """Why a file could not be read; torch's own message, unless it advises unsafe loading."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, pickle.UnpicklingError | LookupError) or "weights_only" in str(error):
        return "it is another kind of file, or holds objects other than tensors"
    return lines[0]


def _tensors_in(content: Any) -> dict[str, torch.Tensor]:
    """All tensors in mappings of mappings, by their names joined with points; of a checkpoint, those of its model."""
    while isinstance(content, Mapping) and not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return {_INSERTED.sub("", name): value for name, value in _flat(content)}


def _flat(content: Any, prefix: str = "", depth: int = 5) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, Mapping) and depth:
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{key}", value
            else:
                yield from _flat(value, f"{prefix}{key}.", depth - 1)


def _to_rgb(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The weights converted to RGB, if a file next to them says that their network takes BGR."""
    description, beside = description_beside(path)
    order = str(description.get("color_space", "RGB")).upper()
    if order not in ("RGB", "BGR"):
        raise ValueError(f"{beside}: color_space must be RGB or BGR, got {description['color_space']!r:.40}")
    if order == "RGB":
        return state
    first = [key for key, value in state.items() if _FIRST_LAYER.search(key) and value.shape[1:2] == (3,)]
    if not first:
        raise ValueError(
            f"{path} is from a BGR network, according to {beside}, and only the first layer of a ViT or an IResNet "
            "(patch_embed.proj, input_layer.0, conv1) can be converted to RGB; convert this one's, save it, and remove "
            "color_space there"
        )
    logger.info("%s: converted from BGR to RGB, according to %s", path, beside)
    return state | {key: state[key].flip(1) for key in first}


def find_weights(state: Mapping[str, torch.Tensor], names: Collection[str] = ()) -> FoundWeights:
    """Find the tensors of a network in a file that may hold more: a head, an optimizer, a wrapper's prefix.

    Args:
        state: by the file's names.
        names: of the network's tensors; empty: it is one of this package's, or all tensors in the file are its.

    Raises:
        ValueError: there are two such networks in the file.
    """
    state = _tensors_in(state)
    prefix = _prefix_of(state, set(names)) if names else None
    for landmarks in () if names else _LANDMARKS_OF_NETWORKS:
        prefix = _prefix_of(state, set(landmarks)) if prefix is None else prefix
    if prefix is None:
        prefix = _shared_prefix(state)
    tensors = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    return FoundWeights(tensors, prefix, [key for key in state if not key.startswith(prefix)])


def _prefix_of(state: Mapping[str, torch.Tensor], names: Collection[str]) -> str | None:
    """The prefix of most of these names in the file; None if it has none of them."""
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for start in range(min(len(parts), _DEEPEST)):
            if ".".join(parts[start:]) in names:
                found["".join(f"{part}." for part in parts[:start])] += 1
    best = [prefix for prefix, count in found.items() if count == max(found.values())]
    # A network inside a larger one, like the aligner in a ViT, is found under two prefixes.
    best = [prefix for prefix in best if not any(prefix != other and prefix.startswith(other) for other in best)]
    if len(best) > 1:
        raise ValueError(
            f"the weights hold {len(best)} such networks, under {' and '.join(map(repr, sorted(best)))}; pass the "
            "state dict of one of them"
        )
    return best[0] if best else None


def _shared_prefix(state: Mapping[str, torch.Tensor]) -> str:
    prefix = ""
    while state and (more := next((w for w in _WRAPPERS if all(key.startswith(prefix + w) for key in state)), None)):
        prefix += more
    return prefix


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a network of this package, by its own names; see :func:`find_weights`."""
    return find_weights(state).tensors


def load_weights(net: nn.Module, source: str | Path | Mapping[str, torch.Tensor]) -> nn.Module:
    """Load weights into a network; all of its tensors must be present and fit.

    Args:
        net: e.g. what ``get_model`` returned.
        source: what :func:`read_state_dict` reads, or a state dict; under any prefix, perhaps with other tensors next
            to the network's, which are named and left out. One without an aligner (``dfa.``) leaves that of a
            self-aligned network as it is. Counters of batch normalization may be missing.

    Returns:
        ``net``, for chaining.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes differ, or a value is not finite; the message lists them. The network is then
            unchanged.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    if not isinstance(source, Mapping):
        check_turned_once(net, description_beside(source)[0], name)
    state, found = check_fit(net, source if isinstance(source, Mapping) else read_state_dict(source), name)
    check_finite(state, name)
    if found.others:
        logger.warning(
            "%s: the network's tensors are under %r; left out: %s", name, found.prefix, list_names(found.others)
        )
    getattr(net, "_orig_mod", net).load_state_dict(state)  # of torch.compile
    return net


def check_fit(
    net: nn.Module, tensors: Mapping[str, torch.Tensor], name: str = "state dict"
) -> tuple[dict[str, torch.Tensor], FoundWeights]:
    """Compare names and shapes of weights with those of a network, which may be one without memory ("meta").

    Args:
        net: the network.
        tensors: as for :func:`load_weights`.
        name: of the weights, for messages.

    Returns:
        Every tensor of the network, and what was found.

    Raises:
        ValueError: names or shapes differ; the message lists them.
    """
    inner = getattr(net, "_orig_mod", net)
    wanted = inner.state_dict()
    try:
        found = find_weights(tensors, wanted)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    state, under = dict(found.tensors), f", under {found.prefix!r}" if found.prefix else ""
    for key in _OPTIONAL:
        if key in state and key not in wanted:
            logger.info("%s: %s left out, as the network is built without token masking", name, key)
            state.pop(key)
    if not any(key.startswith(ALIGNER_PREFIX) for key in state):
        state |= {key: value for key, value in wanted.items() if key.startswith(ALIGNER_PREFIX)}
    derived = [key for key in wanted if key in _OPTIONAL or key.rpartition(".")[2] == _COUNTER]
    state = {key: wanted[key] for key in derived} | state
    if problems := _differences(wanted, state):
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{name}{under} does not fit this {type(inner).__name__}: {shown}")
    return state, found


def check_turned_once(net: nn.Module, description: Mapping[str, Any], name: str) -> None:
    """Refuse weights that :func:`read_state_dict` converts to RGB for a network that takes them as BGR.

    Args:
        net: the network.
        description: of the weights, as ``description_beside`` finds it.
        name: of the weights, for the message.

    Raises:
        ValueError: channels would be swapped twice.
    """
    if getattr(net, "bgr", False) and str(description.get("color_space", "RGB")).upper() == "BGR":
        raise ValueError(
            f"{name} is converted from BGR to RGB because of the color_space next to it, but this network is for "
            "weights that "
            "stay BGR; use the one that is not (cvlface_ir50 for ir_50)"
        )


def _differences(wanted: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    return problems + [
        f"{key} is {tuple(state[key].shape)}, the network has {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]


def check_finite(state: Mapping[str, torch.Tensor], name: str) -> None:
    """Refuse weights of a run that diverged.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(
            f"{name} holds values that are not finite (NaN or infinite), in {list_names(bad)}; the training run "
            "diverged, or the file is damaged; use an earlier checkpoint"
        )


def list_names(names: Collection[str], most: int = 3) -> str:
    """Some names of tensors, and how many more there are."""
    shown = list(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
