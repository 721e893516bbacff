"""The training loop: a backbone under DistributedDataParallel, class centers in PartialFC, one optimizer for both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from easydict import EasyDict as edict

from ..data.augmentation import Augmentation, build_augmentation
from ..data.feed import BadImages, DeviceFeed, RawBatch, ReadableFaces
from ..data.sampler import EpochSampler
from ..data.verification_pairs import VerificationPairs, check_pairs, open_verification, verification_file
from ..distributed import process_group, rank_and_world_size
from ..partial_fc import PartialFC
from .build import build_backbone, margin_loss, open_training_set
from .callbacks import Verification
from .checkpoint import Checkpointer
from .command_line import run_command_line
from .initialization import initialize
from .keypoint_watch import KeypointWatch
from .loop import build_loader, run_steps, step_generator
from .metrics import Metrics, SpeedLog, open_metrics
from .norm_watch import NormWatch
from .optimization import AUTOCAST, distributed, optimize
from .plan import format_plan, plan_training
from .random_state import random_numbers_of_its_own
from .run_folder import open_run
from .state import Schedule, TrainingState, build_state
from .validation import Validation

logger = logging.getLogger("insightface_kprpe.training.trainer")  # under "python -m" __name__ is another

# images (b, 3, H, W) uint8, labels (b,), keypoints (b, 5, 2); None: the network finds them
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def train(config: edict) -> dict[str, float]:
    """Run a config to its end.

    Progress is logged by the package's loggers at level INFO; :func:`main` shows it and writes it to a file.

    Args:
        config: what :func:`~insightface_kprpe.training.config.load_config` returned.

    Returns:
        The last verification accuracy, in [0, 1], of every validation set; empty on ranks other than 0.

    Raises:
        TrainingError: the loss is not finite, a checkpoint cannot be written, or another run writes to the folder.
        ValueError: a setting does not fit the others, or the data.
        SystemExit: a signal asked the run to stop; its state is saved.
    """
    output = Path(config.output)
    with open_run(output, config.resume) as resume, process_group() as device:
        sets = open_sets(config)
        training = FaceTraining(config, device)
        state, schedule = training.state, training.schedule
        checkpoints = Checkpointer(output, config.keep_checkpoints, config.save_every, config.async_save)
        step = checkpoints.start(state, schedule, resume)
        if config.init_from is not None and step == 0:
            initialize(state.model, state.loss, config.init_from, config.init_min_match, checkpoints.group)
        with random_numbers_of_its_own():  # wandb draws some
            opened = open_metrics(config, output, step, resume)
        with opened as metrics:
            verification = Verification(sets, state.model, metrics) if metrics else None
            validation = None
            if config.val_targets:
                validation = Validation(
                    verification, config.verbose, state, schedule, checkpoints, config.verify_at_start
                )
            training.run(metrics, step=step, checkpoints=checkpoints, validation=validation)

        logger.info("done: %s", output / "model.pt")
        return verification.latest if verification else {}


class FaceTraining:
    """The steps of one run.

    Args:
        config: of the run; its ``num_classes`` and ``num_image`` are filled in.
        device: where to compute.

    Attributes:
        schedule: how long the run is.
        state: everything that changes.

    Raises:
        ValueError: a setting does not fit the others, or the data.
    """

    def __init__(self, config: edict, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = rank_and_world_size()
        self.augment = build_augmentation(config.augment)
        torch.manual_seed(config.seed)
        self.backbone = build_backbone(config)
        # In channels-last layout the patch embedding's result is (B, N, D) as it lies in memory.
        self.backbone.to(device, memory_format=torch.channels_last)
        if config.compile:
            self.backbone.compile()  # in place, so that names of weights do not change

        faces = open_training_set(config)
        if self.backbone.needs_keypoints and not self.backbone.finds_keypoints:
            faces.warn_without_landmarks()
        repeat = {"repetition": config.repeated_augmentation, "labels": faces.labels}
        sampler = EpochSampler(len(faces), config.batch_size, self.rank, self.world_size, config.seed, **repeat)
        self.schedule = Schedule(len(sampler) // config.gradient_acc, config.num_epoch, config.gradient_acc)
        if not self.schedule.steps_per_epoch:
            raise ValueError(
                f"gradient_acc must be at most the {len(sampler)} batches of an epoch, got {config.gradient_acc}"
            )
        loader = build_loader(ReadableFaces(faces), sampler, config.num_workers, device, config.seed)
        self.loader = DeviceFeed(loader, device, BadImages(faces, config.max_bad_images))

        torch.manual_seed(config.seed + 1 + self.rank)  # centers, dropped paths and masked patches differ by rank
        partial_fc = PartialFC(margin_loss(config), config.embedding_size, config.num_classes, config.sample_rate)
        self.state = build_state(config, self.backbone, partial_fc.to(device), self.schedule, device)
        self.norms = NormWatch(partial_fc.margin_loss)
        looks = self.backbone.position_tables() and self.backbone.needs_keypoints
        self.keypoints = KeypointWatch(self.backbone) if looks else None

    def run(self, metrics: Metrics | None, *, step: int, **options: Any) -> None:
        """Take the remaining steps.

        Args:
            metrics: where numbers go, on rank 0; None on the others.
            step: steps done before.
            **options: those of :func:`~insightface_kprpe.training.loop.run_steps`.
        """
        config, self.metrics = self.config, metrics
        self.network = distributed(self.backbone, self.device, config.gradient_compression)
        if metrics:
            step_size = config.batch_size * self.world_size * config.gradient_acc
            self.speed = SpeedLog(metrics, self.schedule.total_steps, step_size, config.frequent, step)
            logger.info("%s", self._summary())
        log = self._log if metrics else None
        run_steps(self.state, self._take_step, self.loader, self.schedule, step=step, log=log, **options)
        if self.keypoints:
            self.keypoints.warn_if_ignored()

    def _take_step(self, step: int, batches: Sequence[Batch]) -> float:
        seed = (self.config.seed, step, self.rank)
        batches = [prepare(batch, self.device, (*seed, part), self.augment) for part, batch in enumerate(batches)]
        if self.backbone.finds_keypoints:
            batches = [(images, labels, None) for images, labels, _ in batches]
        if self.keypoints:
            self.keypoints(batches[-1][0], batches[-1][2])
        looking = self.metrics is not None and (step + 1) % self.config.frequent == 0
        loss = train_step(self.network, batches, self.state, self.config, self.norms if looking else None)
        if looking:
            self.metrics.write(step + 1, **self.norms.values())
        return loss

    def _log(self, step: int, *numbers: Any) -> None:
        self.speed(step, *numbers)
        if self.keypoints and (step % self.config.verbose == 0 or step == self.schedule.total_steps):
            self.metrics.write(step, **self.keypoints.values())

    def _summary(self) -> str:
        config, size = self.config, sum(parameter.numel() for parameter in self.backbone.parameters())
        return (
            f"{config.network} ({size / 1e6:.1f}M parameters) on {config.num_image} images of {config.num_classes} "
            f"people; {self.world_size} x {self.device.type}, {config.precision}, batch {config.batch_size} x "
            f"{self.world_size} x {config.gradient_acc}, {self.schedule.total_steps} steps in {config.num_epoch} "
            f"epochs; output {config.output}"
        )


def open_sets(config: edict) -> list[VerificationPairs]:
    """The verification sets of a config, checked so that none fails hours later; on rank 0.

    Raises:
        ValueError: a set is missing, damaged, or unusable.
    """
    if rank_and_world_size()[0] != 0:
        return []
    sets = []
    for target in config.val_targets:
        sets.append(open_verification(target, config.rec))
        try:
            check_pairs(sets[-1])
        except ValueError as error:
            raise ValueError(
                f"val_targets: {verification_file(target, config.rec)}: {error}; replace the file, or remove it from "
                "val_targets"
            ) from error
    names = [pairs.name for pairs in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"val_targets must have different names, got {', '.join(names)}; rename a file")
    return sets


def train_step(
    network: nn.Module,
    batches: Sequence[Batch],
    state: TrainingState,
    config: edict,
    watch: NormWatch | None = None,
) -> float:
    """One optimizer step over one or more batches, as if they were one.

    They share the sampled class centers and the norm statistics of AdaFace, which takes a second forward pass.
    Only batch normalization sees each of them separately, as it does those of different ranks.

    Args:
        network: the backbone, wrapped or not.
        batches: (images float in [-1, 1], labels, keypoints), of equal size, on the device.
        state: of the backbone and of PartialFC, its loss.
        config: ``precision`` and ``clip_grad`` are used.
        watch: sees the batches and their embeddings.

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
    """Norms of the embeddings that the training pass will compute; random numbers and buffers are restored.

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


def prepare(batch: RawBatch, device: torch.device, seed: Iterable[int], augment: Augmentation) -> Batch:
    """Augment a batch on the device; the same seed gives the same choices everywhere."""
    images, labels, keypoints = (tensor.to(device, non_blocking=True) for tensor in batch[:3])
    images, keypoints = augment(images, keypoints, step_generator(*seed))
    return images, labels, keypoints


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of ``train_v2.py`` and ``insightface-kprpe train``."""
    run_command_line(
        train,
        arguments,
        base="base",
        plan=lambda config, *options: format_plan(plan_training(config, *options)),
        prog="train_v2.py",
        description="Train a face recognition network. One process: python train_v2.py CONFIG; "
        "several: torchrun --nproc_per_node=8 train_v2.py CONFIG.",
        epilog="Every key is explained in recognition_configs/base.py. Example: torchrun --nproc_per_node=8 "
        "train_v2.py recognition_configs/wf4m_vit_b_kprpe.py rec=/data/WebFace4M batch_size=64 resume=True",
    )


if __name__ == "__main__":
    main()
