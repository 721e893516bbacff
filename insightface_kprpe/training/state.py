"""The state of training as named tensors and plain values, and its construction from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from easydict import EasyDict as edict
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from ..backbones import Backbone
from ..distributed import rank_and_world_size
from ..partial_fc import PartialFC
from .lr_scheduler import build_scheduler


class Schedule(NamedTuple):
    """The length of a run; a step is an optimizer step.

    Attributes:
        steps_per_epoch: at least 1.
        epochs: at least 1.
        batches_per_step: forward passes whose gradients one step adds up.
    """

    steps_per_epoch: int
    epochs: int
    batches_per_step: int = 1

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def step_after(self, step: int, steps_per_epoch: int) -> int:
        """The step that has seen as much of the data as ``step`` of a run with another epoch length."""
        epoch, done = divmod(step, steps_per_epoch)
        return epoch * self.steps_per_epoch + round(done * self.steps_per_epoch / steps_per_epoch)


class TrainingState(NamedTuple):
    """Everything that changes while training runs.

    Attributes:
        model: the network, not wrapped; its weights alone are ``model.pt``.
        loss: may have weights too, as PartialFC has.
        optimizer: over both.
        scheduler: of the learning rate, by optimizer step.
        scaler: scales the loss in fp16 training; disabled otherwise.
    """

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of network and loss, by names that start with ``model.`` and ``loss.``."""
        return {
            f"{part}.{name}": parameter
            for part in ("model", "loss")
            for name, parameter in getattr(self, part).named_parameters()
        }

    def sharded(self) -> dict[str, tuple[int, int]]:
        """Parameters whose rows are spread over the ranks: first row of this one, rows in all."""
        shards = self.loss.sharded() if isinstance(self.loss, PartialFC) else {}
        return {f"loss.{name}": rows for name, rows in shards.items()}

    def optimized(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        names = {id(parameter): name for name, parameter in self.named_parameters().items()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and buffers, ``model.NAME`` and ``loss.NAME``, and moments, ``optimizer.PARAMETER.MOMENT``."""
        tensors = {f"{part}.{k}": v for part in ("model", "loss") for k, v in getattr(self, part).state_dict().items()}
        moments = self.optimizer.state_dict()["state"]
        for index, name in enumerate(self.optimized()):
            for moment, value in moments.get(index, {}).items():
                if isinstance(value, torch.Tensor):  # SGD without momentum has a None
                    tensors[f"optimizer.{name}.{moment}"] = value
        return tensors

    def values(self) -> dict[str, Any]:
        """Everything that is not a tensor: plain Python values, readable with ``weights_only=True``."""
        return {
            "optimizer": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Load what :meth:`tensors` and :meth:`values` returned, with this rank's rows.

        Learning rate and weight decay stay the config's, which may have changed; see :meth:`go_to`.
        """
        for part in ("model", "loss"):
            getattr(self, part).load_state_dict(_below(tensors, part))
        self.restore_moments(tensors)
        if self.scaler.is_enabled() and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])

    def restore_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the optimizer's part of :meth:`tensors`."""
        moments: dict[int, dict[str, torch.Tensor]] = {}
        parameters = self.named_parameters()
        indices = {name: index for index, name in enumerate(self.optimized())}
        for key, value in _below(tensors, "optimizer").items():
            name, _, moment = key.rpartition(".")
            if value.shape == parameters[name].shape:  # in its memory format too, which fused optimizers rely on
                value = torch.empty_like(parameters[name], dtype=value.dtype, requires_grad=False).copy_(value)
            moments.setdefault(indices[name], {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def go_to(self, step: int) -> None:
        """Set the learning rate to that of a step."""
        self.scheduler.last_epoch = step
        self.scheduler._last_lr = [
            base * factor(step) for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, self.scheduler._last_lr, strict=True):
            group["lr"] = lr


def _below(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    prefix = f"{part}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def build_state(
    config: edict, net: nn.Module, loss: nn.Module, schedule: Schedule, device: torch.device
) -> TrainingState:
    """Build the state by a config's ``optimizer``, ``scheduler`` and ``precision``; the network is on the device."""
    optimizer = build_optimizer(config, net, loss)
    scheduler = build_scheduler(
        optimizer,
        config.scheduler,
        schedule.total_steps,
        round(max(0.0, config.warmup_epoch) * schedule.steps_per_epoch),
        [epoch * schedule.steps_per_epoch for epoch in config.decay_epochs],
    )
    scaler_class = ShardedGradScaler if rank_and_world_size()[1] > 1 else torch.amp.GradScaler
    scaler = scaler_class(device.type, enabled=config.precision == "fp16")
    return TrainingState(net, loss, optimizer, scheduler, scaler)


def build_optimizer(config: edict, net: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over network and loss.

    Weight decay excludes biases, norms and what the network names. Position tables are a separate group, whose learning
    rate is ``position_lr_scale`` times that of the others, through the whole schedule.
    """
    spared, tables = (net.no_weight_decay(), net.position_tables()) if isinstance(net, Backbone) else (set(), set())
    named = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    plain = {name for name, parameter in named.items() if parameter.ndim <= 1} | spared
    groups = [
        {"params": [named[name] for name in named if name not in plain | tables]},
        {"params": [named[name] for name in named if name in plain - tables], "weight_decay": 0.0},
        {
            "params": [named[name] for name in named if name in tables],
            "lr": config.lr * config.get("position_lr_scale", 1.0),
            "weight_decay": 0.0,
        },
        {"params": list(loss.parameters())},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in named.values())  # one kernel for all tensors
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
