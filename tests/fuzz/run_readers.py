"""Readers of what training runs leave, and of their settings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn as nn

from fuzz.harness import Reader
from fuzz.model_readers import mutate_entry
from fuzz.mutator import mutate, mutate_document
from insightface_kprpe.data.record_tools import _made_before
from insightface_kprpe.losses import AdaFace
from insightface_kprpe.partial_fc import PartialFC
from insightface_kprpe.training.checkpoint import Checkpointer
from insightface_kprpe.training.config import dump_config, load_config
from insightface_kprpe.training.metrics import Metrics
from insightface_kprpe.training.run_folder import _is_gone, _read
from insightface_kprpe.training.run_report import _read_settings, read_metrics, summary
from insightface_kprpe.training.state import Schedule, TrainingState, build_state

_SCHEDULE = Schedule(5, 2)
_STEP = "checkpoints/step_00000001"


def _state() -> TrainingState:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    return build_state(load_config("quickstart"), net, PartialFC(AdaFace(), 4, 7), _SCHEDULE, torch.device("cpu"))


def _make_checkpoint(folder: Path) -> None:
    state = _state()
    loss = state.loss(state.model(torch.ones(2, 3, 2, 2)), torch.tensor([0, 1]))
    loss.backward()
    state.optimizer.step()
    checkpoints = Checkpointer(folder)
    checkpoints.save(1, state, _SCHEDULE)
    checkpoints.add_score(1, state, _SCHEDULE, 0.9)


def _read_checkpoint(folder: Path) -> None:
    Checkpointer(folder).resume(_state(), _SCHEDULE)


def _make_config(folder: Path) -> None:
    dump_config(load_config("quickstart"), folder / "config.json")


def _make_metrics(folder: Path) -> None:
    lines = [f'{{"step": {n}, "loss": {9 / n}, "accuracy/lfw": {90 + n / 10}}}\n' for n in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def _read_metrics(folder: Path) -> None:
    summary(read_metrics(folder / "metrics.jsonl"))
    Metrics(folder, from_step=3)


def _make_mark(folder: Path) -> None:
    packed = {"images": 1, "identities": 1, "left_out": 0, "landmarks": False, "unchanged": 1}
    (folder / ".made.json").write_text(json.dumps({"of": "x", "packed": packed}))
    (folder / "train.rec").touch()


RUN_READERS = {
    "checkpoint .metadata": Reader(_make_checkpoint, f"{_STEP}/.metadata", _read_checkpoint),
    "checkpoint tensors": Reader(_make_checkpoint, f"{_STEP}/__0_0.distcp", _read_checkpoint),
    "checkpoint run.pt": Reader(_make_checkpoint, f"{_STEP}/run.pt", _read_checkpoint),
    "checkpoint run.pt, entries": Reader(_make_checkpoint, f"{_STEP}/run.pt", _read_checkpoint, mutate_entry),
    "checkpoints/latest": Reader(_make_checkpoint, "checkpoints/latest", _read_checkpoint, heals=True, share=0.3),
    "checkpoints/scores.json": Reader(
        _make_checkpoint, "checkpoints/scores.json", _read_checkpoint, mutate_document, heals=True, share=0.5
    ),
    "config.json to train": Reader(
        _make_config, "config.json", lambda folder: load_config(folder / "config.json"), mutate_document
    ),
    "config.json to train, bytes": Reader(
        _make_config, "config.json", lambda folder: load_config(folder / "config.json"), mutate
    ),
    "config.json in a report": Reader(
        _make_config, "config.json", lambda folder: _read_settings(folder / "config.json"), mutate
    ),
    "metrics.jsonl": Reader(_make_metrics, "metrics.jsonl", _read_metrics, heals=True),
    ".made.json": Reader(_make_mark, ".made.json", lambda f: _made_before(f, "x"), mutate_document, heals=True),
    ".lock_holder.json": Reader(
        lambda f: (f / ".lock_holder.json").write_text('{"pid": 1, "host": "h"}'), ".lock_holder.json",
        lambda f: _is_gone(_read(f / ".lock_holder.json")), mutate_document, heals=True,
    ),
}  # fmt: skip
