"""The training loop: a backbone under DistributedDataParallel, class centers in PartialFC, one optimizer for both."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from easydict import EasyDict as edict

from ..backbones import get_model
from ..data.augmentation import random_mirror, random_similarity
from ..data.face_dataset import EpochSampler, FaceDataset, open_faces, to_network_input
from ..evaluation.verification import open_verification
from ..losses import AdaFace, CombinedMarginLoss
from ..partial_fc import PartialFC, rank_and_world_size
from .callbacks import Metrics, SpeedLog, Verification, start_logging
from .command_line import run_command_line
from .config import dump_config
from .loop import (
    AUTOCAST,
    Plan,
    build_loader,
    build_state,
    distributed,
    optimize,
    process_group,
    run_steps,
    step_generator,
)

logger = logging.getLogger("insightface_kprpe.training.trainer")  # under "python -m" __name__ is another

# images (b, 3, H, W) uint8, labels (b,), keypoints (b, 5, 2); None: the network finds them
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def train(config: edict) -> dict[str, float]:
    """Run a config to its end.

    Args:
        config: what :func:`~insightface_kprpe.training.config.load_config` returned.

    Returns:
        The last verification accuracy (percent) of every validation set.

    Raises:
        TrainingError: the loss is not finite.
        SystemExit: a signal asked the run to stop; its state is saved.
    """
    with process_group() as device:
        rank, world_size = rank_and_world_size()
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        start_logging(output, rank)

        dataset = open_faces(config.rec, config.num_classes, config.num_image, config.seed)
        check_labels(dataset, config)
        sampler = EpochSampler(len(dataset), config.batch_size, rank, world_size, config.seed)
        plan = Plan(len(sampler) // config.gradient_acc, config.num_epoch, config.gradient_acc)
        if not plan.steps_per_epoch:
            raise ValueError(f"gradient_acc must fit {len(sampler)} batches an epoch, got {config.gradient_acc}")

        torch.manual_seed(config.seed)
        backbone = get_model(config.network, num_features=config.embedding_size, **config.network_kwargs).to(device)
        if config.gradient_checkpointing:
            backbone.set_grad_checkpointing()
        torch.manual_seed(config.seed + 1 + rank)  # class centers, dropped paths and masked patches differ by rank
        partial_fc = PartialFC(margin_loss(config), config.embedding_size, config.num_classes, config.sample_rate)
        state = build_state(config, backbone, partial_fc.to(device), plan, device)
        step = state.resume(output) if config.resume else 0

        accuracies: dict[str, float] = {}
        log = validate = metrics = None
        if rank == 0:
            dump_config(config, output / "config.json")
            metrics = Metrics(output, config.tensorboard, step)
            sets = [open_verification(target, config.rec) for target in config.val_targets]
            verification = Verification(sets, metrics)
            step_size = config.batch_size * world_size * config.gradient_acc
            log = SpeedLog(metrics, plan.total_steps, step_size, config.frequent, step)
            logger.info("%s", _summary(config, dataset, backbone, world_size, device, plan.total_steps))

            def validate(step: int) -> None:
                accuracies.update(verification(step, backbone))

            if config.verify_at_start:
                validate(step)
        network = distributed(backbone, device)
        loader = build_loader(dataset, sampler, config.num_workers, device, config.seed)

        def take_step(step: int, batches: Sequence[Batch]) -> float:
            seed = (config.seed, step, rank)
            batches = [prepare(batch, device, (*seed, part), config.augment) for part, batch in enumerate(batches)]
            if getattr(backbone, "finds_keypoints", False):
                batches = [(images, labels, None) for images, labels, _ in batches]
            return train_step(network, partial_fc, batches, state.optimizer, state.scaler, config)

        try:
            run_steps(
                state, take_step, loader, plan,
                step=step, log=log, output=output, validate=validate, verbose=config.verbose,
            )  # fmt: skip
        finally:
            if metrics is not None:
                metrics.close()
        logger.info("done: %s", output / "model.pt")
        return accuracies


def train_step(
    network: nn.Module,
    partial_fc: PartialFC,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: edict,
) -> float:
    """One optimizer step over one or more batches, whose gradients are those of their union.

    Args:
        network: the backbone, wrapped or not.
        partial_fc: class centers and loss.
        batches: (images float in [-1, 1], labels, keypoints), of equal size, on the device.
        optimizer: over both.
        scaler: scales the loss in fp16 training; disabled otherwise.
        config: ``precision`` and ``clip_grad`` are used.

    Returns:
        The mean loss over all batches and ranks.
    """
    dtype = AUTOCAST[config.precision]

    def loss_of(batch: Batch) -> torch.Tensor:
        images, labels, keypoints = batch
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            embeddings = network(images, keypoints)
        return partial_fc(embeddings, labels)

    return optimize(loss_of, batches, network, optimizer, scaler, config.clip_grad)


def margin_loss(config: edict) -> nn.Module:
    """The margin that the config asks for."""
    if config.loss == "adaface":
        return AdaFace(config.adaface_m, config.adaface_h, config.adaface_t_alpha)
    return CombinedMarginLoss(64.0, *config.margin_list, config.interclass_filtering_threshold)


def check_labels(dataset: FaceDataset, config: edict) -> None:
    """Fill in ``num_classes`` and ``num_image``, or refuse labels that would index beyond the class centers.

    Raises:
        ValueError: a label is negative or not below ``num_classes``.
    """
    config.num_classes = config.num_classes or dataset.num_classes
    lowest, highest = int(dataset.labels.min()), int(dataset.labels.max())
    if lowest < 0 or highest >= config.num_classes:
        raise ValueError(
            f"num_classes must be above every label, got {config.num_classes} for labels {lowest} to {highest} of "
            f"{config.rec}; set num_classes={highest + 1}, or 0 to count"
        )
    if config.num_image not in (0, len(dataset)):
        logger.warning("num_image is %d in the config, %s has %d", config.num_image, config.rec, len(dataset))
    config.num_image = len(dataset)


def prepare(batch: Batch, device: torch.device, seed: Iterable[int], augment: Mapping[str, float]) -> Batch:
    """Move a batch to the device and augment it there; the same seed gives the same choices everywhere."""
    images, labels, keypoints = (tensor.to(device, non_blocking=True) for tensor in batch)
    generator = step_generator(*seed)
    images, keypoints = random_mirror(images, keypoints, generator)
    images = to_network_input(images)
    if augment:
        images, keypoints = random_similarity(images, keypoints, generator, **augment)
    return images, labels, keypoints


def _summary(
    config: edict, dataset: FaceDataset, net: nn.Module, world_size: int, device: torch.device, total_steps: int
) -> str:
    size = sum(parameter.numel() for parameter in net.parameters())
    return (
        f"{config.network} ({size / 1e6:.1f}M parameters) on {len(dataset)} images of {config.num_classes} people; "
        f"{world_size} x {device.type}, {config.precision}, batch {config.batch_size} x {world_size} x "
        f"{config.gradient_acc}, {total_steps} steps in {config.num_epoch} epochs; output {config.output}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of ``train_v2.py`` and ``insightface-kprpe train``."""
    run_command_line(
        train,
        arguments,
        base="base",
        prog="train_v2.py",
        description="Train a face recognition network. One process: python train_v2.py CONFIG; "
        "several: torchrun --nproc_per_node=8 train_v2.py CONFIG.",
        epilog="Every key is explained in recognition_configs/base.py. Example: torchrun --nproc_per_node=8 "
        "train_v2.py recognition_configs/wf4m_vit_b_kprpe.py rec=/data/WebFace4M batch_size=64 resume=True",
    )


if __name__ == "__main__":
    main()
