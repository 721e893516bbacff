"""What a training run will need, computed without a GPU: parameters, GFLOPs, memory of each GPU, steps and hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from easydict import EasyDict as edict

from ..backbones.vit_with_dfa import weights_follow
from ..partial_fc import shard_range
from .build import build_backbone, open_training_set
from .memory import forward_flops, network_needs
from .optimization import AUTOCAST

FLOAT = 4  # bytes; weights, gradients, moments, class centers and logits are float32 in every precision
_MOMENTS = {"adamw": 2, "sgd": 1}
GB = 1e9

# PartialFC at its largest has this many tensors as large as the logits (the cosines, clamped, with margin, scaled; or
# while it goes back as many as large as the class centers of the step); see tests/test_plan.py, which measures them.
LOGITS = 4
IMAGES = 2  # the augmented batch, and another being copied or augmented, both float32


@dataclass(frozen=True)
class TrainingPlan:
    """What a run needs; memory is in bytes per GPU.

    Attributes:
        config: the run's.
        world_size: GPUs.
        parameters: of the network.
        table_parameters: of these, those of KPRPE's or iRPE's tables, which learn at a rate of their own.
        class_center_parameters: of all ranks together.
        flops: of a forward pass of the network for one image; a multiply-add counts as two.
        memory: by name. Not all of it is in use at the same time.
        phases: peak bytes of the loss, the backward pass and the optimizer.
        steps_per_epoch: optimizer steps.
        hours: of the whole run; None if no speed was given.
    """

    config: edict
    world_size: int
    parameters: int
    table_parameters: int
    class_center_parameters: int
    flops: int
    memory: dict[str, int]
    phases: dict[str, int]
    steps_per_epoch: int
    hours: float | None

    @property
    def peak(self) -> int:
        """The peak in bytes."""
        return max(self.phases.values())


def plan_training(config: edict, world_size: int = 1, images_per_second: float | None = None) -> TrainingPlan:
    """Find out what a run would need; nothing is trained, and no such memory is allocated.

    Args:
        config: what ``load_config`` returned. Where its ``num_classes`` or ``num_image`` is 0, the data are opened.
        world_size: GPUs.
        images_per_second: that one GPU trains on.

    Raises:
        ValueError: an argument is not positive, a number is missing, or an epoch has no step.
    """
    if world_size < 1 or (images_per_second is not None and images_per_second <= 0):
        raise ValueError(f"world size and images per second must be positive, got {world_size}, {images_per_second}")
    if not (config.num_classes and config.num_image):
        try:
            open_training_set(config)
        except ValueError as error:
            raise ValueError(f"to plan without the data, pass num_classes=N and num_image=N; {error}") from error
    step_images = config.batch_size * world_size * config.gradient_acc
    steps_per_epoch = config.num_image // step_images
    if not steps_per_epoch or config.num_classes < world_size:
        raise ValueError(
            f"num_image must be at least one step of {step_images} images, and num_classes at least the world size, "
            "got "
            f"{config.num_image} images of {config.num_classes} people"
        )

    def build() -> torch.nn.Module:
        with weights_follow():
            return build_backbone(config)

    with torch.device("meta"):
        net = build()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    tables = sum(net.get_parameter(name).numel() for name in net.position_tables())
    trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    memory, phases = _memory(config, world_size, parameters, trained, build)
    hours = None
    if images_per_second is not None:
        hours = steps_per_epoch * config.num_epoch * step_images / (images_per_second * world_size) / 3600
    return TrainingPlan(
        config, world_size, parameters, tables, config.num_classes * config.embedding_size, forward_flops(build),
        memory, phases, steps_per_epoch, hours,
    )  # fmt: skip


def _memory(
    config: edict, world_size: int, parameters: int, trained: int, build: Callable[[], torch.nn.Module]
) -> tuple[dict[str, int], dict[str, int]]:
    """The memory of a GPU, and the peaks within a step."""
    needs = network_needs(build, config.batch_size, AUTOCAST[config.precision])
    _, local = shard_range(config.num_classes, 0, world_size)  # rank 0 has one more if the number is not divisible
    sampled = max(1, int(config.sample_rate * local))
    row = config.embedding_size * FLOAT
    moments = _MOMENTS[config.optimizer]
    # A sample of the class centers is copied; the unit vectors of those used are kept.
    copies = (1 + (sampled < local)) * sampled * row
    logits = config.batch_size * world_size * sampled * FLOAT
    memory = {
        "network: weights": parameters * FLOAT,
        "network: gradients": trained * FLOAT,
        "network: optimizer moments": trained * FLOAT * moments,
        "network: DDP's gradient buckets": trained * FLOAT * (world_size > 1),
        "network: activations": needs.activations,
        "images": IMAGES * config.batch_size * 3 * 112 * 112 * FLOAT,
        f"class centers ({local:,})": local * row,
        "class centers: gradients": local * row,
        "class centers: optimizer moments": local * row * moments,
        f"class centers of a step ({sampled:,}): copies": copies,
        f"logits ({config.batch_size * world_size:,} x {sampled:,}), {LOGITS} times": LOGITS * logits,
    }
    centers = local * row
    resident = parameters * FLOAT + trained * FLOAT * (moments + (world_size > 1)) + centers * (1 + moments)
    resident += memory["images"]
    kept = (trained * FLOAT + centers) * (config.gradient_acc > 1)  # gradients of the step's earlier batches
    loss = max(LOGITS * logits, LOGITS * sampled * row) + copies
    phases = {
        "loss": resident + kept + needs.activations + max(loss, centers + sampled * row),
        "backward pass": resident + kept + centers * (config.gradient_acc == 1) + max(needs.forward, needs.backward),
        "optimizer": resident + trained * FLOAT + centers,
    }
    return memory, phases


def format_plan(plan: TrainingPlan) -> str:
    """A plan as text."""
    config = plan.config
    step_images = config.batch_size * plan.world_size * config.gradient_acc
    steps = plan.steps_per_epoch * config.num_epoch
    lines = [
        f"{config.network}, {config.precision}, {config.optimizer}, on {plan.world_size} GPUs",
        f"  parameters        {plan.parameters / 1e6:,.1f}M in the network, "
        f"{plan.class_center_parameters / 1e6:,.1f}M in {config.num_classes:,} class centers",
        f"  forward pass      {plan.flops / 1e9:,.2f} GFLOPs per image (a multiply-add counts as two)",
        f"  steps             {plan.steps_per_epoch:,} per epoch, {steps:,} in {config.num_epoch} epochs of "
        f"{config.num_image:,} images; {step_images:,} images per step",
    ]
    if plan.table_parameters:
        rate = config.lr * config.position_lr_scale
        lines.insert(
            2,
            f"  position tables   {plan.table_parameters / 1e6:,.1f}M of these parameters, at a learning rate of up to "
            f"{rate:g}: position_lr_scale is {config.position_lr_scale:g}",
        )
    if plan.hours is not None:
        speed = steps * step_images / plan.hours / 3600
        lines.append(f"  time              {plan.hours:,.1f} hours at {speed:,.0f} images/s on all GPUs")
    lines.append("  memory per GPU, GB")
    lines += [f"    {size / GB:8.2f}  {name}" for name, size in plan.memory.items() if size]
    lines.append("  at one time, GB")
    lines += [f"    {size / GB:8.2f}  {name}" for name, size in plan.phases.items()]
    lines.append(f"    {plan.peak / GB:8.2f}  is the peak; CUDA itself, NCCL and fragmentation add 1 to 3 GB")
    return "\n".join(lines)
