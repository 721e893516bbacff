"""This package's networks, AdaFace and configs, put into the checkout's own modules when they are imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import logging
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn

from .. import backbones
from ..backbones.vit_with_dfa import weights_follow
from ..losses import AdaFace
from ..partial_fc import PartialFC
from .changes import Change

logger = logging.getLogger(__name__)


class Parts:
    """Replacements for the checkout's functions; each falls back on the one that it replaces.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config: Mapping[str, Any] | None = None  # of train_v2.py, once it has read one
        self.tables: list[nn.Parameter] = []  # of the network's relative positions

    def get_config(self, original: Callable, config_file: str) -> Mapping[str, Any]:
        """The checkout's ``get_config`` for a config file anywhere."""
        path = Path(config_file)
        if not path.is_file():
            path = self.root / config_file
        if not path.is_file():
            raise FileNotFoundError(f"config must be a Python file, got {config_file}, which does not exist")
        if path.resolve().parent == self.root / "configs":
            self.config = original(f"configs/{path.name}")
            return self.config
        config = importlib.import_module("configs.base").config
        values = runpy.run_path(str(path)).get("config")
        if not isinstance(values, dict):
            raise ValueError(f"{path} must define `config = edict()`; it does not")
        _check(values, config, path)
        config.update(values)
        if config.output is None:
            config.output = os.path.join("work_dirs", path.stem)
        self.config = config
        return config

    def get_model(self, original: Callable, name: str, **kwargs) -> nn.Module:
        """The checkout's ``get_model``, which also knows this package's names."""
        try:
            return original(name, **kwargs)
        except ValueError as error:
            if name not in backbones.list_models():
                near = difflib.get_close_matches(name, [m for m in backbones.list_models() if not m.endswith("_kprpe")])
                hint = f"did you mean {' or '.join(near)}?" if near else "see insightface-kprpe models"
                raise ValueError(
                    f"network must be one of the checkout's or of this package's, got {name}; {hint}"
                ) from error
        if name.endswith("_kprpe"):
            raise ValueError(
                f"network {name} needs keypoints, and arcface_torch's scripts pass images only; use {name}_dfa, which "
                "finds them itself"
            )
        settings = {**kwargs, **((self.config or {}).get("network_kwargs") or {})}
        if self.config is not None and name.endswith("_dfa") and "dfa_weights" not in settings:
            raise ValueError(
                f"network {name} needs the weights of a trained aligner: add config.network_kwargs = "
                '{"dfa_weights": FILE} to the config'
            )
        with weights_follow():  # given above; the other scripts load a model.pt with the aligner in it
            net = backbones.get_model(name, **settings)
        self.tables = [net.get_parameter(table) for table in sorted(net.position_tables())]
        return net

    def margin_loss(self, original: Callable, s: float, m1: Any, m2: float, m3: float, *args, **kwargs) -> nn.Module:
        """``CombinedMarginLoss``, or AdaFace if the config asks for it."""
        config = self.config or {}
        t_alpha = config.get("adaface_t_alpha", 0.01)
        if m1 == "adaface":  # margin_list = ("adaface", m, h)
            return AdaFace(m2, m3, t_alpha, s)
        if config.get("loss") == "adaface":
            return AdaFace(config.get("adaface_m", 0.4), config.get("adaface_h", 0.333), t_alpha, s)
        return original(s, m1, m2, m3, *args, **kwargs)

    def partial_fc(
        self,
        original: Callable,
        margin_loss: nn.Module,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> nn.Module:
        """``PartialFC_V2``, or this package's if the margin needs the embeddings' norms."""
        if isinstance(margin_loss, AdaFace):
            return PartialFC(margin_loss, embedding_size, num_classes, sample_rate)
        return original(margin_loss, embedding_size, num_classes, sample_rate, fp16)

    def optimizer(self, original: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
        """An optimizer's class with the position tables in a group of their own, if the config gives them a rate."""

        class WithPositionTables(original):
            def __init__(optimizer, params, lr=1e-3, **kwargs) -> None:
                super().__init__(self._split(params, lr), lr=lr, **kwargs)

        WithPositionTables.__name__ = original.__name__
        return WithPositionTables

    def _split(self, params: Any, lr: float) -> Any:
        """The scripts' parameter groups, with the tables moved to one without weight decay."""
        scale = (self.config or {}).get("position_lr_scale", 1.0)
        if scale == 1 or not self.tables:
            return params
        own = {id(table) for table in self.tables}
        params = list(params)
        if not isinstance(params[0], dict):
            params = [{"params": params}]
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in params]
        return [*groups, {"params": self.tables, "lr": lr * scale, "weight_decay": 0.0}]


_OWN_KEYS = (
    "loss",
    "position_lr_scale",
    "adaface_m",
    "adaface_h",
    "adaface_t_alpha",
    "network_kwargs",
)  # besides those of configs/base.py
_USUAL_KEYS = ("rec", "num_classes", "num_image", "num_epoch", "warmup_epoch", "val_targets")  # which base.py lacks


def _check(values: Mapping[str, Any], base: Mapping[str, Any], path: Path) -> None:
    """Refuse what would silently train something else; the checkout itself accepts any key."""
    if values.get("loss", "margin") not in ("margin", "adaface"):
        raise ValueError(f'{path}: loss must be "margin" or "adaface", got {values["loss"]!r}')
    known = {*base, *_OWN_KEYS, *_USUAL_KEYS}
    for key in values:
        if key not in known and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.75)):
            logger.warning("%s: nothing reads %s; did you mean %s?", path, key, near[0])
    rec = values.get("rec")
    if isinstance(rec, str) and rec != "synthetic" and not Path(rec).exists():
        raise FileNotFoundError(f"{path}: rec must be a folder with a training set, got {rec}, which does not exist")


# Module and attribute of the checkout -> method of Parts, and why.
_PLUGS = {
    ("backbones", "get_model"): ("get_model", "also builds this package's networks (vit_s_kprpe_dfa, vit_s_irpe, ...)"),
    ("utils.utils_config", "get_config"): ("get_config", "also takes config files outside configs/"),
    ("losses", "CombinedMarginLoss"): (
        "margin_loss",
        'is AdaFace if the config says loss = "adaface" or margin_list = ("adaface", m, h)',
    ),
    ("partial_fc_v2", "PartialFC_V2"): (
        "partial_fc",
        "with AdaFace: a version that passes it the norms of the embeddings",
    ),
}


def plug_in(root: Path) -> list[Change]:
    """One change for each part of the checkout that is replaced when its module is imported."""
    parts, finder = Parts(root), _ReplacingFinder(root)

    def plug(module: str, attribute: str, replacement: Callable) -> Callable[[Path, bool], bool]:
        def apply(root: Path, cpu: bool) -> bool:
            finder.replacements[module] = (attribute, replacement)
            if finder not in sys.meta_path:
                sys.meta_path.insert(0, finder)
            return True

        return apply

    return [
        Change(f"{module}.{attribute}", why, plug(module, attribute, getattr(parts, method)))
        for (module, attribute), (method, why) in _PLUGS.items()
    ] + [_optimizers(parts)]


def _optimizers(parts: Parts) -> Change:
    def apply(root: Path, cpu: bool) -> bool:
        for name in ("AdamW", "SGD"):
            setattr(torch.optim, name, parts.optimizer(getattr(torch.optim, name)))
        return True

    why = "position tables of this package's networks learn position_lr_scale times as fast, if the config sets it"
    return Change("torch.optim.AdamW, SGD", why, apply)


def _replace_for_importers(module: ModuleType, attribute: str, replacement: Callable) -> None:
    """Replace ``module.attribute`` for importers, but not for the module's own code, whose classes name themselves."""
    module.__class__ = type("Plugged", (ModuleType,), {attribute: property(lambda module: replacement)})


class _ReplacingFinder(MetaPathFinder):
    """Imports the checkout's modules as Python does, and then replaces a function in some of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.replacements: dict[str, tuple[str, Callable]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.replacements:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or not Path(spec.origin or "").resolve().is_relative_to(self.root):
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            attribute, replacement = self.replacements[name]
            original = getattr(module, attribute, None)
            if original is None:
                raise ImportError(
                    f"{module.__file__} has no {attribute}: this revision of arcface_torch is too old or too new for "
                    "this package; use one with partial_fc_v2.py"
                )

            def replaced(*args, **kwargs) -> Any:
                try:
                    return replacement(original, *args, **kwargs)
                except (ValueError, FileNotFoundError) as error:
                    sys.exit(f"error: {error}")

            _replace_for_importers(module, attribute, replaced)

        spec.loader.exec_module = execute_and_replace
        return spec
