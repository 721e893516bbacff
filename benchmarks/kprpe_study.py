"""Does KPRPE help? Train small ViTs that differ in their position encoding alone, then turn, scale and shift the test.

python benchmarks/kprpe_study.py --rec faces/rec --val faces/val.bin faces/val_unaligned.bin --out work_dirs/kprpe_study

Trains vit_n plain, with iRPE and with KPRPE (five keypoints; 4, 3 and 2) on ``--rec``, and the first three on drawn
faces, each with ``--seeds`` seeds. Every network is verified on all sets, on moved crops of the first set, and, if it
uses keypoints, with wrong ones. Each run is a folder of ``--out`` with its measurements in ``study.json``; starting
again goes on where it stopped. After every run the tables and curves of all that ended are written anew: report.md,
report.json, curves_*.png (extra "plots").
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from kprpe_study_report import write_report

from insightface_kprpe.data.augmentation import move_keypoints, warp_images
from insightface_kprpe.data.face_dataset import to_network_input
from insightface_kprpe.data.verification_pairs import VerificationPairs, open_verification
from insightface_kprpe.evaluation.metrics import unit_rows
from insightface_kprpe.evaluation.verification import verify
from insightface_kprpe.files import write_atomically
from insightface_kprpe.inference.embedding import embed_images
from insightface_kprpe.inference.models import TorchEmbedder
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.trainer import train
from insightface_kprpe.weights.network import load_run

logger = logging.getLogger("insightface_kprpe.study")

# What is compared: the name in tables, the backbone, its arguments.
NETWORKS = (
    ("ViT", "vit_n", {}),
    ("ViT + iRPE", "vit_n_irpe", {}),
    ("ViT + KPRPE", "vit_n_kprpe", {}),
)
FEWER_POINTS = tuple(
    (f"ViT + KPRPE, {points} points", "vit_n_kprpe", {"num_keypoints": points}) for points in (4, 3, 2)
)

# How the test is made harder. Every crop is moved by the same amount in a direction of its own.
MOVES = {
    "rotation": (15.0, 30.0, 45.0, 60.0),  # degrees, either way
    "scale": (1.2, 1.4, 1.7),  # times, larger or smaller
    "shift": (0.1, 0.2, 0.3),  # of the side, any way
}
# Wrong keypoints, by the alpha of Eq. 12 (supplement, section 2.3), L + alpha L. It moves all points away from the
# corner at the origin; "noise" moves each point as far, in a direction of its own.
KEYPOINT_ERRORS = ("drift", "noise")
ALPHAS = (0.025, 0.05, 0.075, 0.1)


@dataclass(frozen=True)
class Run:
    """One network trained once."""

    data: str  # "real" or "drawn"
    label: str
    network: str
    kwargs: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the config

    @property
    def folder(self) -> str:
        """Name of its folder."""
        points = self.kwargs.get("num_keypoints")
        return f"{self.data}_{self.network}{f'_{points}points' if points else ''}_seed{self.seed}"


def plan_runs(options: argparse.Namespace) -> list[Run]:
    """All runs, the main question first."""
    real = {"rec": options.rec, "num_epoch": options.epochs}
    drawn = {"rec": "synthetic", "num_classes": 60, "num_image": 1200, "num_epoch": options.epochs + 1}
    return [
        Run(data, *network, seed, settings)
        for data, settings, networks, seeds in (
            ("real", real, NETWORKS, options.seeds),
            ("drawn", drawn, NETWORKS, options.seeds),
            ("real", real, FEWER_POINTS, options.ablation_seeds),
        )
        for seed in range(seeds)
        for network in networks
    ]


def train_run(run: Run, folder: Path) -> float:
    """Train by the shipped small config; returns the last loss that was logged."""
    config = load_config("small_vit_n_kprpe")
    config.update(run.settings)
    config.update(
        network=run.network, network_kwargs={**config.network_kwargs, **run.kwargs}, seed=run.seed, output=str(folder),
        warmup_epoch=1.0, num_workers=0, verbose=10**9, frequent=30, resume=True, val_targets=(),
    )  # fmt: skip
    train(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in reversed(rows) if "loss" in row)


def measure(net: torch.nn.Module, sets: Sequence[VerificationPairs], pairs: int) -> dict[str, dict[str, float]]:
    """Verification accuracy in percent by kind of test and its strength; ``pairs`` of the first set are moved."""
    embed = TorchEmbedder(net)

    def accuracy(tested: VerificationPairs) -> float:
        return verify(embed, tested, flip=False).accuracy

    results: dict[str, dict[str, float]] = {"sets": {tested.name: accuracy(tested) for tested in sets}}
    some = choose_pairs(sets[0], pairs)
    unmoved = accuracy(some)
    for kind, amounts in MOVES.items():
        none = "1" if kind == "scale" else "0"
        results[kind] = {none: unmoved} | {f"{amount:g}": accuracy(move(some, kind, amount)) for amount in amounts}
    if net.needs_keypoints:
        for kind in KEYPOINT_ERRORS:
            wrong = {f"{alpha:g}": accuracy(mislead(some, kind, alpha)) for alpha in ALPHAS}
            results[kind] = {"0": unmoved} | wrong
    return results


def keypoint_effect(net: torch.nn.Module, tested: VerificationPairs, pairs: int) -> dict[str, float]:
    """How far wrong keypoints move the unit embedding, mean in percent of its length; nothing where none are used."""
    if not net.needs_keypoints:
        return {}
    embed, some = TorchEmbedder(net), choose_pairs(tested, pairs)
    nowhere = np.zeros_like(some.keypoints)
    wrong = {f"noise {ALPHAS[-1]:g}": mislead(some, "noise", ALPHAS[-1]).keypoints, "all in the corner": nowhere}
    right = unit_rows(embed_images(embed, some.images, some.keypoints, flip=False))
    moved = {name: unit_rows(embed_images(embed, some.images, points, flip=False)) for name, points in wrong.items()}
    return {name: float(100 * np.linalg.norm(other - right, axis=1).mean()) for name, other in moved.items()}


def choose_pairs(tested: VerificationPairs, count: int, seed: int = 0) -> VerificationPairs:
    """At most ``count`` pairs of a set, drawn once and for all, decoded."""
    total = len(tested.is_same)
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    rows = np.stack([2 * chosen, 2 * chosen + 1], 1).reshape(-1)
    images = np.stack([tested.images[int(row)] for row in rows])
    return VerificationPairs(f"{tested.name}, moved", images, tested.keypoints[rows], tested.is_same[chosen])


def move(tested: VerificationPairs, kind: str, amount: float, seed: int = 1) -> VerificationPairs:
    """Move every crop about its centre, its keypoints along with it, by one amount each in a random direction."""
    matrix = move_matrix(len(tested.images), kind, amount, seed)
    images = to_network_input(torch.from_numpy(np.asarray(tested.images)).permute(0, 3, 1, 2))
    moved = warp_images(images, matrix).add(1).mul(127.5).round().clamp(0, 255).byte()
    keypoints = move_keypoints(torch.tensor(tested.keypoints, dtype=torch.float32), matrix)
    return VerificationPairs(tested.name, moved.permute(0, 2, 3, 1).numpy(), keypoints.numpy(), tested.is_same)


def move_matrix(count: int, kind: str, amount: float, seed: int) -> torch.Tensor:
    """(count, 2, 3) matrices from [0, 1] of the old crops to [0, 1] of the new ones."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    direction = torch.rand(count, generator=generator) * 2 * torch.pi
    angle = sign * np.deg2rad(amount) if kind == "rotation" else torch.zeros(count)
    zoom = amount**sign if kind == "scale" else torch.ones(count)
    length = amount if kind == "shift" else 0.0
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    offset = 0.5 - linear.sum(-1) * 0.5 + length * torch.stack([direction.cos(), direction.sin()], -1)
    return torch.cat([linear, offset.unsqueeze(-1)], -1)


def mislead(tested: VerificationPairs, kind: str, alpha: float, seed: int = 2) -> VerificationPairs:
    """Put the keypoints elsewhere: Eq. 12 ("drift"), or as far in random directions ("noise")."""
    error = alpha * np.asarray(tested.keypoints)
    if kind == "noise":
        angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, error.shape[:2])
        error = np.linalg.norm(error, axis=-1, keepdims=True) * np.stack([np.cos(angle), np.sin(angle)], -1)
    keypoints = (tested.keypoints + error).astype(np.float32)
    return VerificationPairs(tested.name, tested.images, keypoints, tested.is_same)


def finished(runs: Sequence[Run], out: Path) -> Iterator[dict[str, Any]]:
    """The measurements of all runs that have ended.

    Raises:
        ValueError: a run in ``out`` was made with other settings.
    """
    for run in runs:
        path = out / run.folder / "study.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        if result["settings"] != dict(run.settings):
            raise ValueError(
                f"--out must hold runs of the same settings, got {result['settings']} in {path} instead of "
                f"{dict(run.settings)}; use another folder"
            )
        yield result


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rec", required=True, help="folder with train.rec and ldmk_5points.csv to train on")
    parser.add_argument("--val", required=True, nargs="+", help=".bin sets; crops of the first, aligned one are moved")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/kprpe_study"), help="folder for runs and tables")
    parser.add_argument("--epochs", type=int, default=5, help="on --rec; drawn faces get one more")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each network")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="runs of each network with fewer keypoints")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of each set that are moved")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args(arguments)


def main() -> None:
    """Train and measure what is missing, then write the tables."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(0)
    runs = plan_runs(options)
    done = list(finished(runs, options.out))
    sets = {
        "real": [open_verification(target) for target in options.val],
        "drawn": [open_verification(target) for target in ("synthetic", "synthetic_unaligned")],
    }
    for number, run in enumerate(runs, 1):
        folder = options.out / run.folder
        if (folder / "study.json").is_file():
            continue
        print(f"[{number}/{len(runs)}] {run.folder}", flush=True)
        started = time.process_time()
        loss = train_run(run, folder)
        net = load_run(folder)
        results = measure(net, sets[run.data], options.pairs)
        effect = keypoint_effect(net, sets[run.data][0], options.pairs)
        seconds = round(time.process_time() - started, 1)
        result = {"data": run.data, "network": run.label, "seed": run.seed, "settings": dict(run.settings)}
        result |= {"loss": loss, "cpu_seconds": seconds, "accuracy": results, "keypoint_effect": effect}
        write_atomically(folder / "study.json", (json.dumps(result, indent=2) + "\n").encode())
        logger.info("%s: loss %.2f, accuracy %s, %.0f s", run.folder, loss, results["sets"], seconds)
        done.append(result)
        write_report(done, options.out)
    print(write_report(done, options.out))


if __name__ == "__main__":
    main()
