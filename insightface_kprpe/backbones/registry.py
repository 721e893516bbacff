"""Names of backbones -> networks, for arcface_torch's ``get_model`` and for ``timm.create_model``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

import torch

from .._timm import register_model
from .interface import Backbone, check_backbone
from .iresnet import IResNet, IRNet, MobileFaceNet
from .vision_transformer import VisionTransformer
from .vit_with_dfa import ViTWithDFA

_BACKBONES: dict[str, Callable[..., Backbone]] = {}

TIMM_PREFIX = "insightface_"  # of our names in timm's registry, where others have a vit_b too
# Arguments that timm.create_model passes to every model and that have no meaning here.
_TIMM_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")

# Sizes. vit_n is for CPUs and quick trials; vit_t to vit_h are arcface_torch's (backbones/__init__.py there), whose
# 9-pixel patches see the top-left 108 pixels; cvlface_* are those of the published KPRPE weights.
_SIZES = {
    "vit_n": {"patch_size": 14, "embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0},
    "vit_t": {"patch_size": 9, "embed_dim": 256, "depth": 12, "drop_path_rate": 0.1, "mask_ratio": 0.1},
    "vit_s": {"patch_size": 9, "embed_dim": 512, "depth": 12, "drop_path_rate": 0.1, "mask_ratio": 0.1},
    "vit_b": {"patch_size": 9, "embed_dim": 512, "depth": 24, "drop_path_rate": 0.1, "mask_ratio": 0.1},
    "vit_l": {"patch_size": 9, "embed_dim": 768, "depth": 24, "drop_path_rate": 0.05, "mask_ratio": 0.05},
    "vit_h": {"patch_size": 9, "embed_dim": 1024, "depth": 48, "drop_path_rate": 0.1},
    "cvlface_vit_s": {"patch_size": 8, "embed_dim": 512, "depth": 12, "num_heads": 8, "mlp_ratio": 5.0},
    "cvlface_vit_b": {"patch_size": 8, "embed_dim": 512, "depth": 24, "num_heads": 16, "mlp_ratio": 3.0},
}
# Names under which arcface_torch's own configs ask for the same sizes with other regularization.
_ARCFACE_TORCH = {
    "vit_t_dp005_mask0": ("vit_t", {"drop_path_rate": 0.05, "mask_ratio": 0.0}),
    "vit_s_dp005_mask_0": ("vit_s", {"drop_path_rate": 0.05, "mask_ratio": 0.0}),
    "vit_b_dp005_mask_005": ("vit_b", {"drop_path_rate": 0.05, "mask_ratio": 0.05}),
    "vit_l_dp005_mask_005": ("vit_l", {"drop_path_rate": 0.05, "mask_ratio": 0.05}),
}
# Residual blocks of the four stages, by the depth that names give.
_LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
# One network, whose weights are for BGR if published by AdaFace, and for RGB if by CVLface.
_IR_DEPTHS = {"18": 18, "50": 50, "101": 100}


class UnknownArgument(TypeError, ValueError):
    """An argument that a network does not take; the message suggests the closest name."""


def register_backbone(name: str, build: Callable[..., Backbone]) -> None:
    """Make ``build(**kwargs)`` available as ``get_model(name)`` and ``timm.create_model("insightface_" + name)``.

    Args:
        name: not registered yet.
        build: a class that derives from :class:`~.interface.Backbone`, or a function that returns one; it is called
            once without arguments, on torch's "meta" device, to check that what it builds follows the interface.

    Raises:
        ValueError: the name is taken, or what is built is not a :class:`~.interface.Backbone`.
    """
    with torch.device("meta"):
        check_backbone(build(), name)
    _register(name, build)


def _register(name: str, build: Callable[..., Backbone]) -> None:
    if name in _BACKBONES:
        raise ValueError(f"backbone name {name!r} is already registered; choose another")
    _BACKBONES[name] = build

    def create(pretrained: bool = False, **kwargs) -> Backbone:
        if pretrained:
            raise ValueError(f"{name} has no bundled weights; create it without pretrained=True and use load_weights")
        return build(**{key: value for key, value in kwargs.items() if key not in _TIMM_ARGUMENTS})

    create.__name__ = TIMM_PREFIX + name
    create.__module__ = __name__
    register_model(create)


def list_models() -> list[str]:
    """Names that :func:`get_model` knows, sorted."""
    return sorted(_BACKBONES)


def get_model(name: str, dropout: float = 0.0, **kwargs) -> Backbone:
    """Build a backbone by name, with arcface_torch's signature.

    Args:
        name: one of :func:`list_models`, e.g. "vit_b_kprpe".
        dropout: of the inputs of an IResNet's head; must be 0 for others, which have none (ViTs are regularized
            by ``drop_path_rate``).
        kwargs: passed on, e.g. ``num_features=512``, ``fp16=True``, ``mask_ratio=0.1``, ``num_keypoints=3``, and
            ``dfa_weights="dfa.pt"`` for the names that end in ``_dfa``.

    Returns:
        A randomly initialized module ``(images, keypoints) -> (B, num_features)``.

    Raises:
        ValueError: unknown name, or dropout is not 0 for a network without.
    """
    if name not in _BACKBONES:
        near = difflib.get_close_matches(name, _BACKBONES, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list_models())}"
        raise ValueError(f"network must be a registered backbone, got {name!r}; {hint}")
    build = _BACKBONES[name]
    if dropout != 0:
        if "dropout" not in inspect.signature(build).parameters:
            hint = "use drop_path_rate" if "drop_path_rate" in inspect.signature(build).parameters else "it has none"
            raise ValueError(f"dropout must be 0 for {name}, got {dropout}; {hint}")
        kwargs["dropout"] = dropout
    return build(**kwargs)


def _build_with(settings: dict, kind: type[Backbone]) -> Callable[..., Backbone]:
    """A function that builds a network with these settings, or others for some of them."""
    known = _arguments(kind)

    def build(**kwargs) -> Backbone:
        for key in kwargs.keys() - known.keys():
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(known))}"
            raise UnknownArgument(f"{kind.__name__} has no argument {key!r}; {hint}")
        return kind(**{**settings, **kwargs})

    build.__signature__ = inspect.Signature(list(known.values()))
    return build


def _arguments(kind: type[Backbone]) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name: its own, and those that it passes on to its base class."""
    known: dict[str, inspect.Parameter] = {}
    for part in kind.__mro__:
        own = inspect.signature(part).parameters
        known = {name: value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, value in own.items()} | known
        if not any(value.kind is inspect.Parameter.VAR_KEYWORD for value in own.values()):
            break
    return {name: value for name, value in known.items() if name != "settings"}


def _vit(settings: dict, kind: type[VisionTransformer] = VisionTransformer) -> Callable[..., Backbone]:
    return _build_with(settings, kind)


for _name, _size in _SIZES.items():
    for _suffix, _position in (("", None), ("_irpe", "irpe"), ("_kprpe", "kprpe")):
        _register(_name + _suffix, _vit({**_size, "position": _position}))
    _register(f"{_name}_kprpe_dfa", _vit(_size, ViTWithDFA))
for _name, (_base, _changes) in _ARCFACE_TORCH.items():
    _register(_name, _vit({**_SIZES[_base], **_changes}))
for _depth, _count in _LAYERS.items():
    _register(f"r{_depth}", _build_with({"layers": _count}, IResNet))
for _name, _depth in _IR_DEPTHS.items():
    _register(f"ir_{_name}", _build_with({"layers": _LAYERS[_depth], "bgr": True}, IRNet))
    _register(f"cvlface_ir{_name}", _build_with({"layers": _LAYERS[_depth]}, IRNet))
_register("mbf", _build_with({}, MobileFaceNet))
