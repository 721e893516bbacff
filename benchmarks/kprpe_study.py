"""Does KPRPE help, and when? Train small ViTs that differ in their position encoding alone; test them on moved faces.

    python benchmarks/study_data.py --fiw fiw --lfw lfw --detector scrfd_500m_kps.onnx --out study_data
    python benchmarks/kprpe_study.py real --data study_data --faces faces --out study
    python benchmarks/kprpe_study_report.py --out study

The first argument is one of the parts of ``PARTS``, or several. Every run is a folder of ``--out``: its training, then
``run.json`` with its accuracies and ``scores.npz`` with the cosine of every test pair. Started again, a part goes on
where it stopped; two processes may share one. ``--faces`` (YouTube Faces) may be left out: it is only tested on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from study_tests import SetOfPairs, measure

from insightface_kprpe.backbones import Backbone, get_model, register_backbone
from insightface_kprpe.files import atomic_path, write_atomically
from insightface_kprpe.inference.models import TorchEmbedder
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.trainer import train
from insightface_kprpe.weights.network import load_run

# The network: 49 patches, 0.4M parameters. What is compared are its positions.
SMALL = {"patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 4}
NETWORKS = {"ViT": "vit_n", "iRPE": "vit_n_irpe", "KPRPE": "vit_n_kprpe"}
YOUTUBE = "rec"  # folder in --faces: aligned faces of YouTube Faces
# How crops are moved in training, each by its own amount; drawn loose ones are turned and scaled already.
SLIGHTLY = {"rotation": 10.0, "scale": 0.1, "translation": 0.04}
MOVED = {"rotation": 40.0, "scale": 0.3, "translation": 0.1}
MOVED_MORE = {"rotation": 20.0, "scale": 0.2, "translation": 0.08}
COMMON = {
    "embedding_size": 128, "batch_size": 64, "lr": 0.002, "weight_decay": 0.05, "scheduler": "cosine",
    "warmup_epoch": 0.5, "loss": "margin", "margin_list": (1.0, 0.0, 0.1), "logit_scale": 16.0, "precision": "fp32",
    "num_workers": 0, "verbose": 10**9, "frequent": 50, "val_targets": (), "keep_checkpoints": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One network trained once.

    Attributes:
        part: of the study.
        name: of what is compared; runs that differ in their seed alone share it.
        network: "ViT", "iRPE" or "KPRPE".
        seed: of weights, order and augmentation.
        rec: folder in ``--data`` to train on, or ``YOUTUBE``.
        settings: of the config, beside ``COMMON``.
        base: folder of the run whose weights and class centers this one starts from; None: random ones.
    """

    part: str
    name: str
    network: str
    seed: int
    rec: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None

    @property
    def folder(self) -> str:
        """Its folder in ``--out``."""
        return f"{self.part}/{self.name.replace(' ', '_')}_seed{self.seed}"


def run_parts(parts: Sequence[str], data: Path, faces: Path | None, out: Path) -> None:
    """Train and measure what is missing of some parts."""
    runs = [run for part in parts for run in PARTS[part]]
    if faces is None and any(run.rec == YOUTUBE for run in runs):
        raise ValueError(f"--faces must name the folder of {YOUTUBE}/ for the part youtube, got none")
    tests: dict[str, list[SetOfPairs]] = {}
    for number, run in enumerate(runs, 1):
        folder = out / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process is at it
                continue
            if (folder / "run.json").is_file():
                continue
            print(f"[{number}/{len(runs)}] {run.folder}", flush=True)
            started = time.process_time()
            train_run(run, faces if run.rec == YOUTUBE else data, out)
            kind = run.rec.split("_")[0]
            tests[kind] = tests.get(kind) or open_tests(kind, data, faces)
            finish_run(run, folder, tests[kind], started)


def train_run(run: Run, source: Path, out: Path) -> None:
    """Train one network through the package's own loop on a folder of ``source``."""
    config = load_config("base")
    config.update(COMMON)
    config.update(
        rec=str(source / run.rec), network=NETWORKS[run.network], seed=run.seed, output=str(out / run.folder),
        network_kwargs={**SMALL, **run.settings.get("network_kwargs", {})}, resume=True,
    )  # fmt: skip
    config.update({key: value for key, value in run.settings.items() if key != "network_kwargs"})
    if run.base:
        config.update(init_from=str(out / run.base), init_min_match=0.5)
    train(config)


def finish_run(run: Run, folder: Path, tests: Sequence[SetOfPairs], started: float) -> None:
    """Measure a trained network and write what the report needs."""
    net = load_run(folder)
    accuracy, scores = measure(TorchEmbedder(net), tests, uses_keypoints=run.network == "KPRPE")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    tables = [net.get_parameter(name).abs().mean().item() for name in sorted(net.position_tables())]
    result = {
        "part": run.part, "name": run.name, "network": run.network, "seed": run.seed, "rec": run.rec,
        "settings": dict(run.settings), "base": run.base, "loss": last.get("loss"), "steps": last.get("step"),
        "keypoints": {key: value for key, value in last.items() if key.startswith("keypoints/")},
        "tables": float(np.mean(tables)) if tables else None,
        "cpu_seconds": round(time.process_time() - started, 1), "accuracy": accuracy,
    }  # fmt: skip
    with atomic_path(folder / "scores.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **scores)
    write_atomically(folder / "run.json", (json.dumps(result, indent=2) + "\n").encode())
    print(f"{run.folder}: loss {result['loss']:.2f}, {result['cpu_seconds']:.0f} s, {accuracy}", flush=True)


def open_tests(kind: str, data: Path, faces: Path | None) -> list[SetOfPairs]:
    """What networks trained on one kind of faces are tested on."""
    if kind == "drawn":
        return [SetOfPairs.open(data / f"drawn_val_{name}.bin") for name in ("loose", "aligned")]
    if kind == YOUTUBE:  # whose people were chosen from LFW's: tested on their own kind alone
        return [SetOfPairs.open(faces / f"{name}.bin") for name in ("ytf_val_unaligned", "ytf_val")]
    paths = [data / f"{name}.bin" for name in ("lfw_loose", "lfw_box", "lfw_aligned", "lfw_raw")]
    paths += [data / f"fiw_val_{name}.bin" for name in ("unaligned", "aligned")]
    if faces is not None:
        paths += [faces / "ytf_val_unaligned.bin", faces / "ytf_val.bin"]
    return [SetOfPairs.open(path) for path in paths]


def random_tables(**settings: Any) -> Backbone:
    """KPRPE whose tables start at random instead of zero."""
    net = get_model("vit_n_kprpe", **settings)
    for name in net.position_tables():
        torch.nn.init.normal_(net.get_parameter(name), std=0.1)
    return net


def compare(part: str, rec: str, seeds: int, variants: Mapping[str, tuple[str, dict]], **common: Any) -> list[Run]:
    """Runs of some networks, seed by seed, so that a part that is stopped has whole seeds."""
    base = common.pop("base", None)
    return [
        Run(part, name, network, seed, rec, {**common, **settings}, base)
        for seed in range(seeds)
        for name, (network, settings) in variants.items()
    ]


def scaled(network: str, *scales: float) -> dict[str, tuple[str, dict]]:
    """A network by the scale of its tables' learning rate."""
    return {f"{network} x{scale:g}": (network, {"position_lr_scale": float(scale)}) for scale in scales}


def rates(*lrs: float) -> dict[str, tuple[str, dict]]:
    """The plain ViT by its learning rate."""
    return {f"ViT lr {lr:g}": ("ViT", {"lr": lr}) for lr in lrs}


def kprpe(**settings: Any) -> tuple[str, dict]:
    """KPRPE at a scale of 30; arguments of the network go to ``network_kwargs``."""
    inner = {key: settings.pop(key) for key in ("kprpe_sharing", "num_keypoints") if key in settings}
    return "KPRPE", {"position_lr_scale": 30.0, "network_kwargs": inner, **settings}


# One plain ViT for each kind of faces, trained first; its weights are where the networks to compare start from.
BASES = {
    "real": Run("base", "real", "ViT", 0, "fiw_unaligned", {"num_epoch": 6, "augment": SLIGHTLY}),
    "drawn": Run("base", "drawn", "ViT", 0, "drawn_aligned", {"num_epoch": 7, "augment": SLIGHTLY}),
}
REAL = {"num_epoch": 8, "augment": MOVED, "base": BASES["real"].folder}
DRAWN = {"num_epoch": 7, "augment": MOVED_MORE, "base": BASES["drawn"].folder}

SGD = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.0005}
RANDOM = {"network": "vit_n_kprpe_random_tables"}

PARTS: dict[str, list[Run]] = {
    "base": list(BASES.values()),
    "real": compare("real", "fiw_unaligned", 3, rates(0.002) | scaled("KPRPE", 30), **REAL),
    "irpe": compare("real", "fiw_unaligned", 3, scaled("iRPE", 10), **REAL),
    # Is it the tables' rate, and would another rate help the plain ViT as much?
    "controls": compare("real", "fiw_unaligned", 1, rates(0.004) | scaled("KPRPE", 1) | rates(0.001), **REAL),
    # What is the best scale, and has every network its own best rate?
    "scale": compare("drawn", "drawn_loose", 1, rates(0.002) | scaled("KPRPE", 30, 1, 10, 100, 3), **DRAWN),
    "tuning": compare("drawn", "drawn_loose", 1, rates(0.001, 0.004) | scaled("iRPE", 10, 1, 30), **DRAWN),
    "drawn": compare("drawn", "drawn_loose", 3, rates(0.002) | scaled("KPRPE", 30) | scaled("iRPE", 10), **DRAWN),
    # Trained on aligned crops that are not moved.
    "aligned": compare(
        "aligned", "fiw_aligned", 1, rates(0.002) | scaled("KPRPE", 30), **{**REAL, "augment": {}, "num_epoch": 3}
    ),
    "aligned_drawn": compare(
        "aligned_drawn", "drawn_aligned", 1, rates(0.002) | scaled("KPRPE", 30), **{**DRAWN, "augment": {}}
    ),
    # From scratch: the scale of the logits, and the margin.
    "logits": compare(
        "logits", "fiw_unaligned", 1, {
            f"ViT s {s:g} margin {m:g}": ("ViT", {"logit_scale": s, "margin_list": (1.0, 0.0, m)})
            for s, m in ((64.0, 0.2), (16.0, 0.1), (24.0, 0.2))
        }, num_epoch=2, augment=SLIGHTLY,
    ),
    "variants": compare(
        "drawn", "drawn_loose", 1, {"KPRPE x30, no warm-up": kprpe(warmup_epoch=0.0)}
        | {f"KPRPE x30, {what} shared": kprpe(kprpe_sharing=what) for what in ("layers", "heads", "both")}
        | {f"KPRPE x30, {k} points": kprpe(num_keypoints=k) for k in (2, 3, 4)}, **DRAWN,
    ),
    "optimizer": compare(
        "optimizer", "drawn_loose", 1, {
            "ViT SGD": ("ViT", SGD), "KPRPE x1, SGD": ("KPRPE", SGD),
            "KPRPE x30, SGD": ("KPRPE", {"position_lr_scale": 30.0, **SGD}),
            "KPRPE x300, SGD": ("KPRPE", {"position_lr_scale": 300.0, **SGD}),
            "KPRPE x1, random start": ("KPRPE", RANDOM),
            "KPRPE x30, random start": ("KPRPE", {"position_lr_scale": 30.0, **RANDOM}),
        }, **DRAWN,
    ),
    # Faces of other people, aligned, and moved in training.
    "youtube": compare(
        "youtube", YOUTUBE, 3, rates(0.002) | scaled("KPRPE", 30), **{**REAL, "num_epoch": 20}
    ),
    "long": compare("long", "drawn_loose", 1, rates(0.002) | scaled("KPRPE", 1, 30), **{**DRAWN, "num_epoch": 28}),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, default=Path("study_data"), help="what study_data.py made")
    parser.add_argument("--faces", type=Path, help="folder of ytf_val.bin and ytf_val_unaligned.bin")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    register_backbone(RANDOM["network"], random_tables)
    try:
        run_parts(options.parts, options.data, options.faces, options.out)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
