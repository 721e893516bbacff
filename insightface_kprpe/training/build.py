"""Builds what a recognition config specifies: the network, the margin, and data whose labels fit."""

from __future__ import annotations

import logging

import torch.nn as nn
from easydict import EasyDict as edict

from ..backbones import Backbone, get_model
from ..data.face_dataset import FaceDataset, open_faces
from ..losses import AdaFace, CombinedMarginLoss, MarginLoss
from .config import ConfigError

logger = logging.getLogger(__name__)


def build_backbone(config: edict) -> Backbone:
    """The network of a config, with random weights.

    Raises:
        ConfigError: the network cannot be built with these arguments, or not trained in batches of one.
        ValueError: there is no such network.
    """
    try:
        net = get_model(config.network, num_features=config.embedding_size, **config.network_kwargs)
    except (ValueError, FileNotFoundError):  # these say what to do
        raise
    except Exception as error:  # of timm and torch, for unexpected values
        raise ConfigError(
            f"network_kwargs must fit {config.network}, got {config.network_kwargs}: {type(error).__name__}: {error}"
        ) from error
    if config.batch_size == 1 and any(isinstance(module, nn.BatchNorm1d) for module in net.modules()):
        raise ConfigError(
            f"batch_size must be at least 2 for {config.network}, whose head normalizes over the images of a batch "
            "(gradient_acc does not help), got 1"
        )
    if config.gradient_checkpointing:
        net.set_grad_checkpointing()
    return net


def margin_loss(config: edict) -> MarginLoss:
    """The margin that the config asks for.

    Raises:
        ConfigError: ``margin_list`` is invalid.
    """
    if config.loss == "adaface":
        return AdaFace(config.adaface_m, config.adaface_h, config.adaface_t_alpha, config.logit_scale)
    try:
        return CombinedMarginLoss(config.logit_scale, *config.margin_list, config.interclass_filtering_threshold)
    except ValueError as error:
        raise ConfigError(f"margin_list: {error}") from error


def open_training_set(config: edict) -> FaceDataset:
    """The faces that a config names; its ``num_classes`` and ``num_image`` are filled in.

    Raises:
        ValueError: there are no such faces, or labels that would index beyond the class centers.
    """
    faces = open_faces(config.rec, config.num_classes, config.num_image, config.seed)
    check_labels(faces, config)
    return faces


def check_labels(faces: FaceDataset, config: edict) -> None:
    """Fill in ``num_classes`` and ``num_image``, or refuse labels that would index beyond the class centers.

    Raises:
        ValueError: a label is negative or not below ``num_classes``.
    """
    config.num_classes = config.num_classes or faces.num_classes
    lowest, highest = int(faces.labels.min()), int(faces.labels.max())
    if lowest < 0 or highest >= config.num_classes:
        raise ValueError(
            f"num_classes must be above every label, got {config.num_classes} for labels {lowest} to {highest} of "
            f"{config.rec}; set num_classes={highest + 1}, or 0 to count"
        )
    if config.num_image not in (0, len(faces)):
        logger.warning("num_image is %d in the config, but %s has %d", config.num_image, config.rec, len(faces))
    config.num_image = len(faces)
