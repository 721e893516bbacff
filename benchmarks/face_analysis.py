"""How many faces per second does a recognition model embed: one by one, in batches, in torch, in onnxruntime?

    python benchmarks/face_analysis.py [--networks vit_s_kprpe vit_b_kprpe] [--stock mobilefacenet.onnx] [--faces 32]
        [--precisions fp32 fp16 int8] [--threads 1] [--out face_analysis.json]

From (112, 112, 3) uint8 crops of drawn faces to embeddings in memory, without detector and alignment, which cost the
same whatever recognizes. Weights are random: they do not matter for the time. "One" embeds crop after crop, as
``FaceAnalysis.get`` does; "batch" is one call of ``embed_aligned``, which ``get_batch`` ends in; ``--photos 8`` has
these two themselves on pictures of six faces, by the clock (with a detector that takes no time). ``--stock`` takes any
recognition file of InsightFace, for scale. Best of ``--repeats`` after a warm-up; faces a second of the clock, and of
CPU time, which other work on the machine disturbs less. All of it on the CPU, and on the GPU where torch or onnxruntime
has one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import torch
from insightface.app import FaceAnalysis
from insightface.model_zoo.arcface_onnx import ArcFaceONNX

import insightface_kprpe as ik
from insightface_kprpe.app.face_analysis import checked_get, embed_aligned, get_batch
from insightface_kprpe.app.recognizer import KeypointRecognizer
from insightface_kprpe.data.face_dataset import to_network_input
from insightface_kprpe.data.synthetic import SyntheticFaces
from insightface_kprpe.deployment.onnx_export import export_onnx
from insightface_kprpe.deployment.precision import WRITERS
from insightface_kprpe.files import write_atomically
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS

ROWS, COLUMNS = 2, 3
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
Embed = Callable[[list[np.ndarray]], np.ndarray]


def draw_crops(count: int) -> list[np.ndarray]:
    """Aligned faces, (112, 112, 3) uint8 BGR."""
    faces = SyntheticFaces(count, 1)
    return [np.ascontiguousarray(faces[i][0][..., ::-1]) for i in range(count)]


def torch_embedder(net: torch.nn.Module, device: str) -> Embed:
    """The network as it was trained, fed as carefully as onnxruntime is."""
    net = net.to(device)
    template = torch.tensor(CANONICAL_KEYPOINTS, device=device)

    def embed(crops: list[np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(crops)[..., ::-1].copy()).to(device).permute(0, 3, 1, 2)
            return net(to_network_input(pixels), template.expand(len(crops), 5, 2)).cpu().numpy()

    return embed


def open_recognizer(path: Path, device: str, threads: int) -> ArcFaceONNX:
    """A file as ``FaceAnalysis`` loads it after ``register()``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[device]])
    kind = KeypointRecognizer if len(session.get_inputs()) == 2 else ArcFaceONNX
    return kind(str(path), session)


def onnx_embedder(path: Path, device: str, threads: int) -> Embed:
    """A file as ``FaceAnalysis`` runs it after ``register()``."""
    app = SimpleNamespace(models={"recognition": open_recognizer(path, device, threads)})
    return lambda crops: embed_aligned(app, crops)


class KnownFaces:
    """A detector that takes no time, as a real one takes as much either way: it knows where ``photos`` have faces."""

    def detect(self, *args: object, **kwargs: object) -> tuple[np.ndarray, np.ndarray]:
        corners = np.float32([[column * 112, row * 112] for row in range(ROWS) for column in range(COLUMNS)])
        boxes = np.column_stack([corners, corners + 112, np.ones(len(corners))]).astype(np.float32)
        return boxes, corners[:, None] + CANONICAL_KEYPOINTS * np.float32(112)


def photos(count: int) -> list[np.ndarray]:
    """Pictures of six drawn faces each, (224, 336, 3) uint8 BGR."""
    crops = np.stack(draw_crops(count * ROWS * COLUMNS)).reshape(count, ROWS, COLUMNS, 112, 112, 3)
    return list(np.ascontiguousarray(crops.swapaxes(2, 3)).reshape(count, ROWS * 112, COLUMNS * 112, 3))


def measure_photos(path: Path, device: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Photos a second one by one and with ``get_batch``, taking turns, and the median ratio of the rounds."""
    recognizer = open_recognizer(path, device, arguments.threads)
    app = FaceAnalysis.__new__(FaceAnalysis)  # as after register(), without a pack on disk
    app.models, app.det_model = {"detection": KnownFaces(), "recognition": recognizer}, KnownFaces()
    app.addons = {}
    app.get, pictures = checked_get(FaceAnalysis.get).__get__(app), photos(arguments.photos)
    ways = {"get": lambda: [app.get(picture) for picture in pictures], "get_batch": lambda: get_batch(app, pictures)}
    seconds = {name: [] for name in ways}
    for _ in range(1 + arguments.repeats):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    taken = {name: np.array(values[1:]) for name, values in seconds.items()}
    rates = {name: round(arguments.photos / float(np.median(values)), 2) for name, values in taken.items()}
    return rates | {"ratio": round(float(np.median(taken["get"] / taken["get_batch"])), 3)}


def faces_per_second(work: Callable[[], object], faces: int, repeats: int) -> dict[str, float]:
    """By the clock and by CPU time, each the best of some runs."""
    work()
    clock, cpu = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {"faces_per_second": round(faces / min(clock), 2), "faces_per_cpu_second": round(faces / min(cpu), 2)}


def measure(embed: Embed, crops: list[np.ndarray], repeats: int) -> dict[str, dict[str, float]]:
    """Both ways of embedding, after seeing that they agree."""
    few = crops[: max(1, len(crops) // 4)]
    together = embed(crops)[: len(few)]
    alone = np.concatenate([embed([crop]) for crop in few])
    cosine = (together * alone).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(alone, axis=1)
    return {
        "one": faces_per_second(lambda: [embed([crop]) for crop in few], len(few), repeats),
        "batch": faces_per_second(lambda: embed(crops), len(crops), repeats),
        "cosine_of_both": round(float(cosine.min()), 6),
    }


def models(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, torch.nn.Module | Path]]:
    """Everything to measure: its name, its device, and the network in torch or the file."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    runtimes = [name for name, provider in PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
    for network in arguments.networks:
        torch.manual_seed(0)
        net = ik.get_model(network).eval()
        if hasattr(net, "keypoint_linear"):  # starts at zero, and such a file is refused
            torch.nn.init.normal_(net.keypoint_linear.weight, std=0.1)
        for device in devices:
            yield f"{network} torch fp32 {device}", device, net
        full = folder / f"{network}.onnx"
        export_onnx(net.cpu(), full)
        for precision in arguments.precisions:
            path = full if precision == "fp32" else folder / f"{network}_{precision}.onnx"
            if path != full:
                WRITERS[precision](full, path)
            for device in runtimes:
                yield f"{network} onnxruntime {precision} {device}", device, path
    for path in arguments.stock:
        for device in runtimes:
            yield f"{path.stem} onnxruntime as it is {device}", device, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=["vit_s_kprpe", "vit_b_kprpe"], help="registered names")
    parser.add_argument("--stock", nargs="*", type=Path, default=[], help="recognition files of InsightFace")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", *WRITERS], default=["fp32", *WRITERS])
    parser.add_argument("--faces", type=int, default=32, help="faces of a batch; a quarter of them one by one")
    parser.add_argument("--photos", type=int, default=0, help="also so many of six faces, by get and by get_batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    crops = draw_crops(arguments.faces)
    report = {
        "faces": arguments.faces,
        "threads": arguments.threads,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "results": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, device, model in models(arguments, Path(folder)):
            in_torch = isinstance(model, torch.nn.Module)
            embed = torch_embedder(model, device) if in_torch else onnx_embedder(model, device, arguments.threads)
            result = report["results"][name] = measure(embed, crops, arguments.repeats)
            rates = {way: tuple(result[way].values()) for way in ("one", "batch")}
            shown = ", ".join(
                f"{way} {clock:.1f} a second, {cpu:.1f} a CPU second" for way, (clock, cpu) in rates.items()
            )
            if arguments.photos and not in_torch:
                result["photos"] = measure_photos(model, device, arguments)
                shown += "; photos " + ", ".join(f"{key} {value}" for key, value in result["photos"].items())
            sys.stdout.write(f"{name:<36} {shown}\n")
            sys.stdout.flush()
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
