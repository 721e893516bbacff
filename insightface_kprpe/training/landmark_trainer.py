"""Training the landmark network: from a config with checkpoints, with or without torchrun, or in one call.

Paper: "KeyPoint Relative Position Encoding for Face Recognition" (CVPR 2024), supplementary section 3.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from easydict import EasyDict as edict
from torch.utils.data import Dataset

from ..data.landmark_augmentation import LandmarkAugmentation, to_float
from ..data.landmark_dataset import FaceSample, LandmarkDataset
from ..data.sampler import EpochSampler
from ..dfa.loss import DFALoss
from ..dfa.network import RetinaFaceNet
from ..dfa.weights import start_from
from ..distributed import process_group, rank_and_world_size
from ..evaluation.landmarks import evaluate_landmarks
from ..progress import Progress
from .checkpoint import Checkpointer
from .command_line import run_command_line
from .config import merge_config
from .loop import build_loader, run_steps, step_generator
from .metrics import Metrics, SpeedLog, open_metrics
from .optimization import AUTOCAST, distributed, optimize
from .run_folder import open_run
from .state import Schedule, build_state
from .validation import Validation

logger = logging.getLogger("insightface_kprpe.training.landmark_trainer")  # under "python -m" __name__ is another

T = TypeVar("T")


def train_dfa(config: edict) -> dict[str, float]:
    """Run a config to its end.

    Progress is logged by the package's loggers at level INFO; :func:`main` shows it and writes it to a file.

    Args:
        config: what ``load_config(path, overrides, base="dfa_base")`` returned.

    Returns:
        ``nme``, ``failure_rate`` (in [0, 1]) and ``score`` of the last validation; empty without a validation set, and
        on ranks other than 0.

    Raises:
        TrainingError: the loss is not finite, a checkpoint cannot be written, or another run writes to the folder.
        ValueError: a setting does not fit the others, or the data.
        SystemExit: a signal asked the run to stop; its state is saved.
    """
    output = Path(config.output)
    with open_run(output, config.resume) as resume, process_group() as device:
        net, dataset, loss, augmentation = _build_parts(config)
        net.to(device, memory_format=torch.channels_last)  # a sixth faster
        training = LandmarkTraining(net, dataset, loss, augmentation, config, device)
        state, schedule = training.state, training.schedule
        checkpoints = Checkpointer(output, config.keep_checkpoints, config.save_every, config.async_save)
        step = checkpoints.start(state, schedule, resume)
        measure = LandmarkValidation(config, net) if config.val is not None and training.rank == 0 else None

        with open_metrics(config, output, step, resume) as metrics:
            log = validation = None
            if metrics:
                log = SpeedLog(metrics, schedule.total_steps, training.step_size, config.frequent, step)
                logger.info("%s", _summary(config, training))
            if measure:
                measure.metrics = metrics
            if config.val is not None:
                validation = Validation(measure, config.verbose, state, schedule, checkpoints)
            training.run(step=step, log=log, checkpoints=checkpoints, validation=validation)

        logger.info("done: %s", output / "model.pt")
        return measure.latest if measure else {}


def _build_parts(config: edict) -> tuple[RetinaFaceNet, LandmarkDataset, DFALoss, LandmarkAugmentation]:
    """Build what a config specifies; the network has its initial weights."""
    dataset = LandmarkDataset(config.data, config.image_size, config.padding)
    loss = _build(DFALoss, config.loss_kwargs, "loss_kwargs")
    augmentation = _build(LandmarkAugmentation, config.augmentation_kwargs, "augmentation_kwargs")
    torch.manual_seed(config.seed)
    net = RetinaFaceNet(config.body, config.aggregator, config.image_size)
    if config.init_from is not None:
        start_from(net, config.init_from)
    return net, dataset, loss, augmentation


def train_landmarks(
    net: RetinaFaceNet,
    dataset: Dataset,
    *,
    loss: DFALoss | None = None,
    augmentation: LandmarkAugmentation | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float = 0.001,
    weight_decay: float = 0.01,
    warmup_epochs: float = 0.0,
    num_workers: int = 0,
    seed: int = 0,
    description: str = "landmarks",
) -> float:
    """Train a network in this process, without any file: AdamW, cosine schedule, float32.

    Args:
        net: is changed; trained on the device that it is on, and left in train mode.
        dataset: its items are ``FaceSample`` of the network's image size.
        loss: by default ``DFALoss()``.
        augmentation: by default none.
        epochs: passes over the data; an incomplete last batch is dropped.
        batch_size: faces per step.
        lr: peak learning rate.
        weight_decay: of everything except biases and norms.
        warmup_epochs: epochs of linear warm-up.
        num_workers: processes that read the data.
        seed: of the order and the augmentation; the network's weights are not changed by it.
        description: of the progress bar.

    Returns:
        The loss of the last step.

    Raises:
        TrainingError: the loss is not finite.
        ValueError: an argument is out of range, or the data does not fill one batch.
    """
    values = {"num_epoch": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
    values |= {"warmup_epoch": warmup_epochs, "num_workers": num_workers, "seed": seed}
    config = merge_config({"train_landmarks": values}, base="dfa_base")
    device = net.anchors.device
    training = LandmarkTraining(net, dataset, loss or DFALoss(), augmentation, config, device)
    with Progress(total=training.schedule.total_steps, desc=description) as progress:
        last = float("nan")

        def log(step: int, epoch: int, value: float, lr: float, loss_scale: float | None) -> None:
            nonlocal last
            last = value
            progress.set_postfix(loss=f"{value:.3f}", refresh=False)
            progress.update()

        training.run(log=log)
    return last


class LandmarkTraining:
    """The steps of one run, common to both ways to train.

    Args:
        net: on the device.
        dataset: of ``FaceSample``.
        loss: compares the network's output with the labels.
        augmentation: of each batch, on the device; None: unchanged images.
        config: the keys on optimization, and ``num_workers``, are used.
        device: where to compute.

    Attributes:
        schedule: how long the run is.
        step_size: faces per step, over all ranks.
        state: everything that changes.

    Raises:
        ValueError: the data does not fill one batch.
    """

    def __init__(
        self,
        net: RetinaFaceNet,
        dataset: Dataset,
        loss: DFALoss,
        augmentation: LandmarkAugmentation | None,
        config: edict,
        device: torch.device,
    ) -> None:
        self.rank, world_size = rank_and_world_size()
        sampler = EpochSampler(len(dataset), config.batch_size, self.rank, world_size, config.seed)
        self.step_size = config.batch_size * world_size
        self.schedule = Schedule(len(sampler), config.num_epoch)
        self.state = build_state(config, net, loss.to(device), self.schedule, device)
        self.loader = build_loader(dataset, sampler, config.num_workers, device, config.seed)
        self.augmentation, self.config, self.device = augmentation, config, device

    def run(self, **options: Any) -> None:
        """Take the steps; ``options`` are those of :func:`~insightface_kprpe.training.loop.run_steps`."""
        net, loss = self.state.model, self.state.loss
        network = distributed(net, self.device)
        dtype = AUTOCAST[self.config.precision]

        def loss_of(batch: FaceSample) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                output = network(batch.image.flip(1))  # the network takes BGR
            return loss(output, net.anchors, batch.keypoints, batch.bbox).total

        def take_step(step: int, batches: Sequence[FaceSample]) -> float:
            batches = [self._prepare(batch, step) for batch in batches]
            return optimize(loss_of, batches, network, self.state, self.config.clip_grad)

        run_steps(self.state, take_step, self.loader, self.schedule, **options)

    def _prepare(self, batch: FaceSample, step: int) -> FaceSample:
        """The batch on the device, augmented; the same step and rank give the same numbers everywhere."""
        batch = FaceSample(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
        if self.augmentation is None:
            return batch._replace(image=to_float(batch.image))
        return self.augmentation(batch, step_generator(self.config.seed, step, self.rank))


class LandmarkValidation:
    """Measures a network's landmark error on a labeled folder.

    Args:
        config: ``val``, ``image_size``, ``padding`` and ``num_workers`` are used.
        net: of the run, not wrapped.

    Attributes:
        metrics: receives the results; set it before the first call.
        latest: ``nme``, ``failure_rate`` (in [0, 1]) and ``score`` of the last validation; empty before the first.
    """

    metrics: Metrics

    def __init__(self, config: edict, net: RetinaFaceNet) -> None:
        self.dataset = LandmarkDataset(config.val, config.image_size, config.padding, labeled_only=True)
        self.net, self.workers = net, config.num_workers
        self.latest: dict[str, float] = {}
        self.best = float("inf")

    def __call__(self, step: int) -> float:
        """Measure, restoring the network's mode. Returns minus the error, so that higher is better."""
        was_training = self.net.training
        self.net.eval()
        try:
            device = self.net.anchors.device
            result = evaluate_landmarks(self._predict, self.dataset, device=device, workers=self.workers)
        finally:
            self.net.train(was_training)
        self.best = min(self.best, result.nme)
        logger.info(
            "step %d  %d faces: NME %.4f (best %.4f)  failures %.1f %%  mean score %.3f",
            step, result.images, result.nme, self.best, 100 * result.failure_rate, result.score,
        )  # fmt: skip
        self.latest = {"nme": result.nme, "failure_rate": result.failure_rate, "score": result.score}
        self.metrics.write(step, **{**self.latest, "failure_rate": 100 * result.failure_rate})  # files use percent
        return -result.nme

    def _predict(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.net(images.flip(1))  # the network takes BGR
        return found.keypoints, found.score


def _build(build: Callable[..., T], arguments: Mapping[str, Any], key: str) -> T:
    try:
        return build(**arguments)
    except TypeError as error:  # an unknown argument
        raise ValueError(f"{key}: {error}") from error


def _summary(config: edict, training: LandmarkTraining) -> str:
    size = sum(parameter.numel() for parameter in training.state.model.parameters())
    return (
        f"{config.body} {'with' if config.aggregator else 'without'} aggregator ({size:,} parameters) on "
        f"{len(training.loader.dataset)} faces; {training.step_size // config.batch_size} x {training.device.type}, "
        f"{config.precision}, {training.step_size} faces per step, {training.schedule.total_steps} steps in "
        f"{config.num_epoch} epochs; output {config.output}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of ``insightface-kprpe train-dfa`` and ``python -m insightface_kprpe.training.landmark_trainer``."""
    run_command_line(
        train_dfa,
        arguments,
        base="dfa_base",
        prog="insightface-kprpe train-dfa",
        description="Train the landmark network. One process: insightface-kprpe train-dfa CONFIG; "
        "several: torchrun --nproc_per_node=4 -m insightface_kprpe.training.landmark_trainer CONFIG.",
        epilog="Every key is explained in recognition_configs/dfa_base.py. Example: insightface-kprpe train-dfa "
        "dfa_small data=faces/train val=faces/val init_from=retinaface_mobilenet0.25.pth resume=True",
    )


if __name__ == "__main__":
    main()
