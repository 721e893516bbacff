"""The training loop: a backbone under DistributedDataParallel, class centers in PartialFC, one optimizer for both."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from easydict import EasyDict as edict
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..backbones import get_model
from ..data.face_dataset import EpochSampler, FaceDataset, open_faces, random_mirror, to_network_input
from ..evaluation.verification import open_verification
from ..losses import AdaFace, CombinedMarginLoss
from ..partial_fc import PartialFC, rank_and_world_size
from .callbacks import Metrics, SpeedLog, StopSignal, Verification, start_logging
from .checkpoint import barrier, list_checkpoints, load_checkpoint, save_checkpoint, save_model
from .config import dump_config, load_config
from .lr_scheduler import build_scheduler

logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images (b, 3, H, W) uint8, labels (b,), keypoints (b, 5, 2)
_AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
EXIT_STOPPED = 128 + 15  # what a shell reports for a process ended by SIGTERM


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stood."""


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
        steps_per_epoch = len(sampler) // config.gradient_acc
        if not steps_per_epoch:
            raise ValueError(f"gradient_acc must fit {len(sampler)} batches an epoch, got {config.gradient_acc}")
        total_steps = steps_per_epoch * config.num_epoch

        torch.manual_seed(config.seed)
        backbone = get_model(config.network, num_features=config.embedding_size, **config.network_kwargs).to(device)
        if config.gradient_checkpointing:
            backbone.set_grad_checkpointing()
        torch.manual_seed(config.seed + 1 + rank)  # class centers, dropped paths and masked patches differ by rank
        partial_fc = PartialFC(margin_loss(config), config.embedding_size, config.num_classes, config.sample_rate)
        partial_fc.to(device)
        optimizer = build_optimizer(config, backbone, partial_fc)
        scheduler = build_scheduler(
            optimizer,
            config.scheduler,
            total_steps,
            round(max(0.0, config.warmup_epoch) * steps_per_epoch),
            [epoch * steps_per_epoch for epoch in config.decay_epochs],
        )
        scaler_class = ShardedGradScaler if world_size > 1 else torch.amp.GradScaler
        scaler = scaler_class(device.type, enabled=config.precision == "fp16")
        state = TrainingState(backbone, partial_fc, optimizer, scheduler, scaler)
        step = state.resume(output) if config.resume else 0

        if rank == 0:
            dump_config(config, output / "config.json")
            metrics = Metrics(output, config.tensorboard, step)
            sets = [open_verification(target, config.rec) for target in config.val_targets]
            verification = Verification(sets, metrics)
            speed_log = SpeedLog(
                metrics, total_steps, config.batch_size * world_size * config.gradient_acc, config.frequent, step
            )
            logger.info("%s", _summary(config, dataset, backbone, world_size, device, total_steps))
        network = backbone
        if world_size > 1:
            network = DistributedDataParallel(backbone, device_ids=[device] if device.type == "cuda" else None)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=config.num_workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(config.seed),  # else every epoch takes a number from the global one
        )
        accuracies: dict[str, float] = {}
        if rank == 0 and config.verify_at_start:
            verification(step, backbone)
        stop = StopSignal()
        try:
            while step < total_steps:
                epoch, done = divmod(step, steps_per_epoch)
                sampler.set_position(epoch, done * config.gradient_acc)
                backbone.train()
                for batches in grouped(loader, config.gradient_acc):
                    batches = [
                        prepare(batch, device, (config.seed, step, part, rank)) for part, batch in enumerate(batches)
                    ]
                    lr = optimizer.param_groups[0]["lr"]
                    loss = train_step(network, partial_fc, batches, optimizer, scaler, config)
                    if not math.isfinite(loss):
                        scale = scaler.get_scale() if scaler.is_enabled() else 1
                        raise TrainingError(
                            f"loss is {loss} at step {step + 1} (epoch {epoch}, lr {lr:.6g}, loss scale {scale:g}); "
                            "lower lr, lengthen warmup_epoch or use precision bf16; resume=True starts from the last checkpoint"
                        )
                    scheduler.step()
                    step += 1
                    if rank == 0:
                        speed_log(step, epoch, loss, lr, scaler.get_scale() if scaler.is_enabled() else None)
                    end_of_epoch = step % steps_per_epoch == 0
                    stopping = stop.agreed()
                    if end_of_epoch or stopping:
                        save_checkpoint(output, step, state.state_dict(step))
                        if rank == 0:
                            save_model(output / "model.pt", backbone.state_dict())
                    if stopping:
                        logger.warning("stopped by a signal after step %d; continue with resume=True", step)
                        raise SystemExit(EXIT_STOPPED)
                    if step % config.verbose == 0 or step == total_steps:
                        if rank == 0:
                            accuracies = verification(step, backbone)
                        barrier()
                    if end_of_epoch:
                        break
        finally:
            stop.restore()
            if rank == 0:
                metrics.close()
        logger.info("done: %s", output / "model.pt")
        return accuracies


class TrainingState(NamedTuple):
    """Everything that changes while training runs."""

    backbone: nn.Module
    partial_fc: PartialFC
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    def state_dict(self, step: int) -> dict:
        """What a checkpoint holds."""
        return {"step": step, **{name: part.state_dict() for name, part in self._asdict().items()}}

    def resume(self, output: Path) -> int:
        """Load the newest checkpoint, if there is one; returns the optimizer steps done."""
        checkpoints = list_checkpoints(output)
        if not checkpoints:
            logger.info("resume=True: no checkpoint in %s yet, starting from the beginning", output)
            return 0
        state = load_checkpoint(checkpoints[-1])
        for name, part in self._asdict().items():
            part.load_state_dict(state[name])
        logger.info("resumed from %s", checkpoints[-1])
        return state["step"]


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
    total = 0.0
    dtype = _AUTOCAST[config.precision]
    for number, (images, labels, keypoints) in enumerate(batches, 1):
        last = number == len(batches)
        local = not last and isinstance(network, DistributedDataParallel)
        with network.no_sync() if local else contextlib.nullcontext():
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                embeddings = network(images, keypoints)
            loss = partial_fc(embeddings, labels) / len(batches)
            scaler.scale(loss).backward()
        total += loss.item()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad)
    if math.isfinite(total):  # a broken loss must not reach the weights
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def margin_loss(config: edict) -> nn.Module:
    """The margin that the config asks for."""
    if config.loss == "adaface":
        return AdaFace(config.adaface_m, config.adaface_h, config.adaface_t_alpha)
    return CombinedMarginLoss(64.0, *config.margin_list, config.interclass_filtering_threshold)


def build_optimizer(config: edict, backbone: nn.Module, partial_fc: PartialFC) -> torch.optim.Optimizer:
    """AdamW or SGD over backbone and class centers, without weight decay on biases, norms and position tables."""
    spared = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    named = [(name, parameter) for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared]
    plain = [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}, {"params": partial_fc.parameters()}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


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


def prepare(batch: Batch, device: torch.device, seed: Iterable[int]) -> Batch:
    """Move a batch to the device and mirror at random there; the same seed gives the same choice everywhere."""
    images, labels, keypoints = (tensor.to(device, non_blocking=True) for tensor in batch)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> 1))
    images, keypoints = random_mirror(images, keypoints, generator)
    return to_network_input(images), labels, keypoints


def grouped(batches: Iterable[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    """Groups of ``size`` batches; an incomplete last group is left out."""
    iterator = iter(batches)
    while len(group := tuple(itertools.islice(iterator, size))) == size:
        yield group


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """The device of this rank; under torchrun with several ranks also a process group (gloo, and nccl on CUDA)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # one thread a worker: they are many


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
    parser = argparse.ArgumentParser(
        prog="train_v2.py",
        description="Train a face recognition network. One process: python train_v2.py CONFIG; "
        "several: torchrun --nproc_per_node=8 train_v2.py CONFIG.",
        epilog="Every key is explained in recognition_configs/base.py. Example: torchrun --nproc_per_node=8 train_v2.py "
        "recognition_configs/wf4m_vit_b_kprpe.py rec=/data/WebFace4M batch_size=64 resume=True",
    )
    parser.add_argument("config", help="a config file, or the name of one in recognition_configs/ (e.g. quickstart)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the config")
    options = parser.parse_args(arguments)
    try:
        train(load_config(options.config, options.overrides))
    except (ValueError, ImportError, FileNotFoundError, TrainingError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
