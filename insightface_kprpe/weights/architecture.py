"""Infers the architecture of a recognition network from the shapes of its weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..backbones import Backbone, get_model, list_models
from ..backbones.relative_position import NUM_BUCKETS, SHARINGS
from ..state_dict import ALIGNER_PREFIX
from .cvlface import ONNX_INSTEAD

LANDMARK_NETWORK = "LandmarkHead.0.conv1x1.weight"  # a tensor that every landmark network has
# Tensors that only one kind of network has, under any prefix, to name the content of a file without one of ours.
_OTHERS = {
    "layer1.0.prelu.weight": "an arcface_torch IResNet, but none of r18 to r200",
    "input_layer.0.weight": "an IResNet like AdaFace's, but none of ir_18, ir_50 and ir_101",
    "conv_sep.layers.0.weight": "a MobileFaceNet, but not arcface_torch's mbf",
    LANDMARK_NETWORK: "a landmark network (DFA or RetinaFace)",
    "layers.0.blocks.0.attn.relative_position_bias_table": "a Swin transformer",
    "kernel": "class centers of a training run",
    "weight": "class centers of a training run",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A ViT's architecture, as inferred from its weights.

    Attributes:
        embed_dim, depth, patch_size, img_size, num_features, position: as of ``VisionTransformer``.
        mlp_width: hidden width of the MLPs.
        num_heads: None if the weights do not determine it: without relative positions, or with tables shared by heads.
        num_keypoints: 0 without KPRPE.
        num_tables: how many tables of bucket biases KPRPE makes for all layers and heads together; 0 without it.
        with_dfa: whether the weights of an aligner are among them.
    """

    embed_dim: int
    depth: int
    patch_size: int
    img_size: int
    mlp_width: int
    num_features: int
    position: str | None
    num_heads: int | None
    num_keypoints: int = 0
    num_tables: int = 0
    with_dfa: bool = False

    def describe(self) -> str:
        """One line of text."""
        kind = {None: "ViT", "irpe": "ViT with iRPE", "kprpe": "ViT with KPRPE"}[self.position]
        heads = f", {self.num_heads} heads" if self.num_heads else ""
        keypoints = f" ({self.num_keypoints} keypoints, {self.num_tables} tables)" if self.num_tables else ""
        return (
            f"{kind}{keypoints}: {self.depth} layers, width {self.embed_dim}{heads}, MLP {self.mlp_width}, patches of "
            f"{self.patch_size}, embedding {self.num_features}{', with DFA' if self.with_dfa else ''}"
        )

    def size(self) -> tuple[int, ...]:
        """The properties in which named sizes differ."""
        return self.patch_size, self.img_size, self.embed_dim, self.depth, self.mlp_width


def read_architecture(state: Mapping[str, torch.Tensor]) -> Architecture:
    """Read the architecture from weights without prefixes.

    Raises:
        ValueError: they are not those of a ViT of this package; the message says what they are, if known.
    """
    try:
        patches = state["patch_embed.proj.weight"]
        num_patches, width = state["pos_embed"].shape[1:]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        mlp_width, num_features = len(state["blocks.0.mlp.fc1.weight"]), len(state["feature.2.weight"])
        if patches.ndim != 4 or patches.shape[-1] < 1:
            raise ValueError
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"these are not the weights of a ViT of this package: {_what_else(state)}") from error
    position, heads, tables, keypoints = None, None, 0, 0
    if "keypoint_linear.weight" in state:
        rows, columns = state["keypoint_linear.weight"].shape
        position, tables, keypoints = "kprpe", rows // NUM_BUCKETS, columns // 2
        heads = tables // depth if tables > depth and tables % depth == 0 else None
    elif "blocks.0.attn.rpe_q.lookup_table_weight" in state:
        position, heads = "irpe", width // state["blocks.0.attn.rpe_q.lookup_table_weight"].shape[1]
    patch, grid = patches.shape[-1], math.isqrt(num_patches)
    return Architecture(
        embed_dim=width,
        depth=depth,
        patch_size=patch,
        img_size=112 if 112 // patch == grid else grid * patch,  # pixels after the last whole patch are not seen
        mlp_width=mlp_width,
        num_features=num_features,
        position=position,
        num_heads=heads,
        num_keypoints=keypoints,
        num_tables=tables,
        with_dfa=any(key.startswith(ALIGNER_PREFIX) for key in state),
    )


def _what_else(state: Mapping[str, torch.Tensor]) -> str:
    """What foreign weights are, and what to do with them."""
    for name, kind in _OTHERS.items():
        found = [key for key in state if key == name or key.endswith(f".{name}")]
        if found and ("." in name or len(state) == 1):
            return f"they are those of {kind} ({found[0]}); {ONNX_INSTEAD}"
    shown = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:3])
    return f"the first of {len(state)} tensors are {shown}; {ONNX_INSTEAD}"


def check_settings(settings: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """Compare the sizes in a config file with the weights, before memory is taken for a network of these sizes.

    Args:
        settings: for ``get_model``.
        architecture: of the weights.
        where: their origin, for the message.

    Raises:
        ValueError: a size differs.
    """
    found = {
        "depth": architecture.depth,
        "embed_dim": architecture.embed_dim,
        "patch_size": architecture.patch_size,
        "num_features": architecture.num_features,
        "num_keypoints": architecture.num_keypoints or settings.get("num_keypoints"),
        "img_size": architecture.img_size,
    }
    for key in found.keys() & settings.keys():
        value, there = settings[key], found[key]
        if key == "img_size" and isinstance(value, int) and 0 < value < 4096:  # an incomplete last patch is not seen
            value, there = value // architecture.patch_size, there // architecture.patch_size
        if value != there:
            raise ValueError(f"{where}: {key} is {settings[key]!r:.40}, but the weights have {found[key]}")
    heads, ratio = settings.get("num_heads", 1), settings.get("mlp_ratio", 1.0)
    if not isinstance(heads, int) or not 1 <= heads <= architecture.embed_dim:
        raise ValueError(f"{where}: num_heads must be 1 to {architecture.embed_dim}, the width, got {heads!r:.40}")
    if "mlp_ratio" in settings and (
        not isinstance(ratio, int | float) or abs(ratio * architecture.embed_dim - architecture.mlp_width) >= 1
    ):
        fitting = architecture.mlp_width / architecture.embed_dim
        raise ValueError(f"{where}: mlp_ratio is {ratio!r:.40}, but the weights have {fitting:g}")


def named_network(architecture: Architecture) -> tuple[str, dict[str, Any]] | None:
    """The registered network of this architecture.

    Weights do not always determine the number of heads; the named sizes do.

    Returns:
        Its name and the arguments that differ from the name's own, both for ``get_model``; None if there is none.
    """
    found = _registered(tuple(list_models())).sizes.get(architecture.size())
    if found is None:
        return None
    name, heads = found
    suffix = {None: "", "irpe": "_irpe", "kprpe": "_kprpe_dfa" if architecture.with_dfa else "_kprpe"}
    settings: dict[str, Any] = {}
    if architecture.position == "kprpe":
        sharing = _sharing(architecture.num_tables, architecture.depth, heads)
        if sharing is None:
            return None
        settings = {"num_keypoints": architecture.num_keypoints, "kprpe_sharing": sharing}
        settings = {key: value for key, value in settings.items() if value not in (5, "none")}  # the defaults
    elif architecture.num_heads not in (None, heads):
        return None
    return name + suffix[architecture.position], settings


def check_network(name: str, settings: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """Compare the description of weights with the weights.

    Args:
        name: of the network according to the description.
        settings: of that network, both for ``get_model``.
        architecture: of the weights.
        where: their origin, for the message.

    Raises:
        ValueError: it is another network; the message says which.
    """
    plain = {key: value for key, value in settings.items() if not key.startswith("dfa_")}
    sizes = {
        key: value for key, value in plain.items() if key != "num_features"
    }  # the comparison below has a better message
    check_settings(sizes, architecture, where)
    try:
        with torch.device("meta"):
            claimed = read_architecture(get_model(name.removesuffix("_dfa"), **plain).state_dict())
    except TypeError as error:
        raise ValueError(f"{where}: {name} does not take these settings: {plain} ({error})") from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from error
    # A self-aligned network may get its aligner's weights from elsewhere.
    if dataclasses.replace(claimed, with_dfa=architecture.with_dfa) == architecture:
        return
    found = named_network(architecture)
    changes = "".join(f", {key}={value!r}" for key, value in found[1].items()) if found else ""
    known = f"; that is {found[0]}{changes}" if found else ""
    raise ValueError(f"{where} claims to be {name}, a {claimed.describe()}, but is a {architecture.describe()}{known}")


def _sharing(num_tables: int, depth: int, num_heads: int) -> str | None:
    """Which sharing of KPRPE's tables gives their number; None if none does."""
    counts = {"none": depth * num_heads, "layers": num_heads, "heads": depth, "both": 1}
    return next((sharing for sharing in SHARINGS if counts[sharing] == num_tables), None)


def names_by_tensors(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The registered networks, ViTs of this package aside, that have tensors of just these names.

    There is more than one if published weights of a network differ in their input (RGB or BGR).
    """
    return _registered(tuple(list_models())).by_tensors.get(_tensor_names(state), [])


def embedding_length(net: Backbone, state: Mapping[str, torch.Tensor]) -> int:
    """The embedding size of weights.

    Args:
        net: of their kind, perhaps with another length.
        state: the weights.

    Returns:
        The length of the last tensor, if it is one number per embedding entry; else the network's own.
    """
    last, value = [(key, value) for key, value in net.state_dict().items() if value.ndim][-1]
    known = len(value) == net.num_features and last in state and state[last].ndim == value.ndim
    return len(state[last]) if known else net.num_features


class _Registered(NamedTuple):
    """Lookup tables of the registered networks by their shapes."""

    sizes: dict[tuple[int, ...], tuple[str, int]]  # of plain ViTs -> name and number of heads
    by_tensors: dict[frozenset[str], list[str]]  # names of the tensors of others -> names


def _tensor_names(state: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Names of tensors except for the counters of batch normalization, which files may lack."""
    return frozenset(key for key in state if not key.endswith("num_batches_tracked"))


@functools.cache
def _registered(names: tuple[str, ...]) -> _Registered:
    found = _Registered({}, {})
    for name in names:
        if name.endswith(("_irpe", "_kprpe", "_dfa")):
            continue
        with torch.device("meta"):  # shapes alone, no memory
            net = get_model(name)
        try:
            size = read_architecture(net.state_dict()).size()
        except ValueError:  # of another family
            found.by_tensors.setdefault(_tensor_names(net.state_dict()), []).append(name)
        else:
            found.sizes.setdefault(size, (name, net.blocks[0].attn.num_heads))
    return found
