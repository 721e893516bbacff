"""Images a second and peak memory of training steps on one GPU, with and without compile, and the loader's share.

    python benchmarks/train_gpu.py [--networks vit_s vit_s_kprpe ...] [--batch 128] [--rec FOLDER] [--out gpu.json]

Each network takes the trainer's own steps (forward, PartialFC with AdaFace, backward, clipping, AdamW), first on one
batch that stays on the device, then on batches of the trainer's loader (RecordIO read and decoded by workers, the
paper's augmentation on the device). The loader's share is the time that the second takes longer. Medians after
warm-up, per step, of wall time around a synchronized device. Without ``--rec``, 2,000 drawn faces are packed first.
Without a GPU it runs on the CPU, which is for trying it out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from insightface_kprpe import PartialFC, get_model
from insightface_kprpe.data.augmentation import build_augmentation
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.feed import BadImages, DeviceFeed, ReadableFaces
from insightface_kprpe.data.record_tools import pack_drawn
from insightface_kprpe.data.sampler import EpochSampler
from insightface_kprpe.data.synthetic import SyntheticFaces
from insightface_kprpe.files import write_atomically
from insightface_kprpe.training.build import margin_loss
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.loop import build_loader
from insightface_kprpe.training.state import Plan, build_state
from insightface_kprpe.training.trainer import prepare, train_step

NETWORKS = [f"vit_{size}{position}" for size in "sbl" for position in ("", "_irpe", "_kprpe")]
PEOPLE = 205_990  # WebFace4M


def seconds_a_step(step: Callable[[], object], device: torch.device, warm_up: int, steps: int) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(warm_up + steps):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[warm_up:])


def endless(feed: DeviceFeed) -> Iterator[list[torch.Tensor]]:
    """Batches of one epoch after the other."""
    for epoch in itertools.count():
        feed.batch_sampler.set_position(epoch, 0)
        yield from feed


def measure(network: str, compiled: bool, rec: Path, device: torch.device, arguments: argparse.Namespace) -> dict:
    """Speed and memory of one network."""
    config = load_config("base", ["loss=adaface", f"precision={arguments.precision}", "sample_rate=0.6"])
    backbone = get_model(network, num_features=512).to(device)
    if compiled:
        backbone.compile()
    loss = PartialFC(margin_loss(config), 512, arguments.people, config.sample_rate).to(device)
    state = build_state(config, backbone, loss, Plan(1000, 1), device)
    backbone.train()
    faces = open_faces(rec)
    sampler = EpochSampler(len(faces), arguments.batch)
    loader = build_loader(ReadableFaces(faces), sampler, arguments.workers, device, 0)
    batches = endless(DeviceFeed(loader, device, BadImages(faces, 0.001)))
    augment = build_augmentation("paper")
    fixed = prepare(next(batches), device, (0,), augment)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def with_loader() -> None:
        train_step(backbone, [prepare(next(batches), device, (1,), augment)], state, config)

    timed = {"warm_up": arguments.warm_up, "steps": arguments.steps}
    alone = seconds_a_step(lambda: train_step(backbone, [fixed], state, config), device, **timed)
    loaded = seconds_a_step(with_loader, device, **timed)
    result = {
        "network": network,
        "compiled": compiled,
        "images_per_second": round(arguments.batch / alone, 1),
        "images_per_second_with_loader": round(arguments.batch / loaded, 1),
        "loader_share_percent": round(100 * max(0.0, 1 - alone / loaded), 1),
    }
    if device.type == "cuda":
        result["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="default: vit_s/b/l, plain, iRPE and KPRPE")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--batch", type=int, default=128, help="images a step (default 128)")
    parser.add_argument("--people", type=int, default=PEOPLE, help=f"class centers (default {PEOPLE}, WebFace4M)")
    parser.add_argument("--workers", type=int, default=8, help="reader processes (default 8)")
    parser.add_argument("--warm-up", type=int, default=10, help="steps before measuring (default 10)")
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default 30)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled networks out")
    parser.add_argument("--rec", type=Path, help="folder with train.rec; default: drawn faces")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {platform.machine()}"
    settings = {key: getattr(arguments, key) for key in ("precision", "batch", "people", "workers")}
    report = {"machine": machine, "torch": torch.__version__, **settings, "runs": []}
    sys.stdout.write(f"{machine}, torch {torch.__version__}, {settings}\n")
    with tempfile.TemporaryDirectory() as temporary:
        rec = arguments.rec or Path(temporary)
        if arguments.rec is None:
            faces = SyntheticFaces(100, 20)
            pack_drawn(rec, (faces[i] for i in range(len(faces))))
        for network in arguments.networks:
            for compiled in (False,) if arguments.no_compile else (False, True):
                report["runs"].append(measure(network, compiled, rec, device, arguments))
                sys.stdout.write(", ".join(f"{key} {value}" for key, value in report["runs"][-1].items()) + "\n")
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
