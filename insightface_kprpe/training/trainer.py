"""The training loop: a backbone under DistributedDataParallel, class centers in PartialFC, one optimizer for both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from easydict import EasyDict as edict

from ..backbones import get_model
from ..data.augmentation import Augmentation, build_augmentation
from ..data.face_dataset import FaceDataset, open_faces
from ..data.feed import BadImages, DeviceFeed, RawBatch, ReadableFaces
from ..data.sampler import EpochSampler
from ..data.verification_pairs import open_verification
from ..distributed import process_group, rank_and_world_size
from ..losses import AdaFace, CombinedMarginLoss
from ..partial_fc import PartialFC
from .callbacks import Metrics, SpeedLog, Verification
from .checkpoint import Checkpointer, put_aside
from .command_line import run_command_line
from .config import dump_config
from .initialization import initialize
from .keypoint_watch import KeypointWatch
from .loop import begin, build_loader, run_steps, step_generator
from .norm_watch import NormWatch
from .optimization import AUTOCAST, distributed, optimize
from .state import Plan, TrainingState, build_state
from .wandb_run import save_artifact, start_wandb

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
    output = Path(config.output)
    resume = begin(output, config.resume)
    with process_group() as device:
        rank, world_size = rank_and_world_size()

        dataset = open_faces(config.rec, config.num_classes, config.num_image, config.seed)
        check_labels(dataset, config)
        repeat = {"repetition": config.repeated_augmentation, "labels": dataset.labels}
        sampler = EpochSampler(len(dataset), config.batch_size, rank, world_size, config.seed, **repeat)
        augment = build_augmentation(config.augment)
        plan = Plan(len(sampler) // config.gradient_acc, config.num_epoch, config.gradient_acc)
        if not plan.steps_per_epoch:
            raise ValueError(f"gradient_acc must fit {len(sampler)} batches an epoch, got {config.gradient_acc}")

        torch.manual_seed(config.seed)
        backbone = get_model(config.network, num_features=config.embedding_size, **config.network_kwargs)
        # In channels-last layout the patch embedding's result is (B, N, D) as it lies in memory.
        backbone.to(device, memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            backbone.set_grad_checkpointing()
        if config.compile:
            backbone.compile()  # in place: names of weights stay what they are
        if backbone.needs_keypoints and not backbone.finds_keypoints:
            dataset.warn_without_landmarks()
        torch.manual_seed(config.seed + 1 + rank)  # class centers, dropped paths and masked patches differ by rank
        partial_fc = PartialFC(margin_loss(config), config.embedding_size, config.num_classes, config.sample_rate)
        state = build_state(config, backbone, partial_fc.to(device), plan, device)
        checkpoints = Checkpointer(output, config.keep_checkpoints, config.save_every, config.async_save)
        step = checkpoints.start(state, plan, resume)
        if config.init_from is not None and step == 0:
            initialize(backbone, partial_fc, config.init_from, config.init_min_match)

        keypoint_watch = KeypointWatch(backbone) if backbone.position_tables() and backbone.needs_keypoints else None
        accuracies: dict[str, float] = {}
        log = validate = metrics = wandb = None
        if rank == 0:
            sets = [open_verification(target, config.rec) for target in config.val_targets]
            wandb = start_wandb(config, output, resumed=step > 0) if config.using_wandb else None
            if not resume:  # now that the settings have proved right
                put_aside(output)
            dump_config(config, output / "config.json")
            metrics = Metrics(output, config.tensorboard, step, wandb)
            verification = Verification(sets, metrics)
            step_size = config.batch_size * world_size * config.gradient_acc
            log = SpeedLog(metrics, plan.total_steps, step_size, config.frequent, step)
            logger.info("%s", _summary(config, dataset, backbone, world_size, device, plan.total_steps))

            def validate(step: int) -> float | None:
                if keypoint_watch and (use := keypoint_watch.values()):
                    metrics.write(step, **use)
                accuracies.update(verification(step, backbone))
                return sum(accuracies.values()) / len(accuracies) if accuracies else None

            if config.verify_at_start:
                validate(step)
        network = distributed(backbone, device, config.gradient_compression)
        loader = build_loader(ReadableFaces(dataset), sampler, config.num_workers, device, config.seed)
        loader = DeviceFeed(loader, device, BadImages(dataset, config.max_bad_images))

        watch = NormWatch(partial_fc.margin_loss)

        def take_step(step: int, batches: Sequence[Batch]) -> float:
            seed = (config.seed, step, rank)
            batches = [prepare(batch, device, (*seed, part), augment) for part, batch in enumerate(batches)]
            if backbone.finds_keypoints:
                batches = [(images, labels, None) for images, labels, _ in batches]
            if keypoint_watch:
                keypoint_watch(batches[-1][0], batches[-1][2])
            looking = metrics is not None and (step + 1) % config.frequent == 0
            loss = train_step(network, batches, state, config, watch if looking else None)
            if looking:
                metrics.write(step + 1, **watch.values())
            return loss

        try:
            run_steps(
                state, take_step, loader, plan,
                step=step, log=log, checkpoints=checkpoints, validate=validate, verbose=config.verbose,
            )  # fmt: skip
            if keypoint_watch:
                keypoint_watch.warn_if_ignored()
            if wandb is not None and config.save_artifacts:
                save_artifact(wandb, output / "model.pt")
        finally:
            if metrics is not None:
                metrics.close()
        logger.info("done: %s", output / "model.pt")
        return accuracies


def train_step(
    network: nn.Module,
    batches: Sequence[Batch],
    state: TrainingState,
    config: edict,
    watch: NormWatch | None = None,
) -> float:
    """One optimizer step over one or more batches, as if they were one.

    They share the sampled class centers and the norm statistics of AdaFace, which takes a second forward pass.
    Batch normalisation alone sees each of them by itself, as it does those of different ranks.

    Args:
        network: the backbone, wrapped or not.
        batches: (images float in [-1, 1], labels, keypoints), of equal size, on the device.
        state: of the backbone and of PartialFC, its loss.
        config: ``precision`` and ``clip_grad`` are used.
        watch: is shown the batches and their embeddings.

    Returns:
        The mean loss over all batches and ranks.
    """
    dtype = AUTOCAST[config.precision]

    def embed(batch: Batch) -> torch.Tensor:
        images, _, keypoints = batch
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            return network(images, keypoints)

    def loss_of(batch: Batch) -> torch.Tensor:
        embeddings = embed(batch)
        if watch is not None:
            watch(batch[0], batch[2], embeddings)
        return state.loss(embeddings, batch[1])

    if len(batches) == 1:
        return optimize(loss_of, batches, network, state, config.clip_grad)
    with state.loss.one_batch(
        torch.cat([batch[1] for batch in batches]), lambda: norms_of(embed, batches, state.model)
    ):
        return optimize(loss_of, batches, network, state, config.clip_grad)


@torch.no_grad()
def norms_of(embed: Callable[[Batch], torch.Tensor], batches: Sequence[Batch], backbone: nn.Module) -> torch.Tensor:
    """Lengths of the embeddings that the training pass is about to make; random numbers and buffers are put back.

    Args:
        embed: batch -> embeddings, in training mode.
        batches: parts of one step.
        backbone: what ``embed`` runs.

    Returns:
        (n,) float, of all batches.
    """
    buffers = [buffer.clone() for buffer in backbone.buffers()]
    devices = [batches[0][0].device] if batches[0][0].is_cuda else []
    with torch.random.fork_rng(devices):
        norms = torch.cat([embed(batch).float().norm(dim=1) for batch in batches])
    for buffer, before in zip(backbone.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return norms


def margin_loss(config: edict) -> nn.Module:
    """The margin that the config asks for."""
    if config.loss == "adaface":
        return AdaFace(config.adaface_m, config.adaface_h, config.adaface_t_alpha, config.logit_scale)
    return CombinedMarginLoss(config.logit_scale, *config.margin_list, config.interclass_filtering_threshold)


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


def prepare(batch: RawBatch, device: torch.device, seed: Iterable[int], augment: Augmentation) -> Batch:
    """Augment a batch on the device; the same seed gives the same choices everywhere."""
    images, labels, keypoints = (tensor.to(device, non_blocking=True) for tensor in batch[:3])
    images, keypoints = augment(images, keypoints, step_generator(*seed))
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
