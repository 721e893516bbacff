"""How fast does DFA align, against scikit-image's per-face transform, and how many faces per second does it see?

    python benchmarks/dfa.py [--faces 256] [--threads 1] [--out dfa.json]

Transform: both sides turn the same landmarks (N, 5, 2) into the sampling matrices theta (N, 2, 3). One side is a loop
of ``skimage.transform.SimilarityTransform``, one estimate and one 3x3 inverse per face, put together to a tensor on
the device; the other is ``similarity_transform`` and ``theta_from_similarity`` on the whole batch, on the device.
Align: the same followed by the warp of the (N, 3, 160, 160) crops to 112x112, by ``affine_grid`` and ``grid_sample`` on
one side, by ``align`` on the other. DFA: faces a second of the whole aligner, crop in, landmarks and aligned face out,
and of the file that packs hold, which leaves the warp to OpenCV. Medians after warm-up; one thread on a CPU is measured
by its CPU time, which neighbours disturb less.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from skimage.transform import SimilarityTransform

from insightface_kprpe.deployment.detector_export import export_detector
from insightface_kprpe.dfa import DFA
from insightface_kprpe.dfa.aligner import align
from insightface_kprpe.files import write_atomically
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, similarity_transform, theta_from_similarity

CROP, ALIGNED = 160, 112
TEMPLATE = torch.tensor(ARCFACE_TEMPLATE_112)
# from [-1, 1] to pixels of the aligned face, and from pixels of the crop to [-1, 1]
TO_ALIGNED = np.array([[ALIGNED / 2, 0, ALIGNED / 2], [0, ALIGNED / 2, ALIGNED / 2], [0, 0, 1]])
FROM_CROP = np.array([[2 / CROP, 0, -1], [0, 2 / CROP, -1], [0, 0, 1]])


def estimate(points: np.ndarray) -> np.ndarray:
    """(3, 3) matrix by scikit-image, whose constructor from points replaced a method in 0.26."""
    if hasattr(SimilarityTransform, "from_estimate"):
        return SimilarityTransform.from_estimate(points, ARCFACE_TEMPLATE_112).params
    transform = SimilarityTransform()
    transform.estimate(points, ARCFACE_TEMPLATE_112)
    return transform.params


def loop(landmarks: torch.Tensor) -> torch.Tensor:
    """Theta by scikit-image, face by face."""
    thetas = []
    for points in landmarks.cpu().numpy() * CROP:
        thetas.append((FROM_CROP @ np.linalg.inv(estimate(points)) @ TO_ALIGNED)[:2])
    return torch.tensor(np.stack(thetas), dtype=torch.float32, device=landmarks.device)


def batched(landmarks: torch.Tensor) -> torch.Tensor:
    """Theta by this package, all faces at once."""
    similarity = similarity_transform(landmarks * CROP, TEMPLATE.to(landmarks))
    return theta_from_similarity(similarity, CROP, ALIGNED)


def warp(images: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """The aligned faces (N, 3, 112, 112), black outside the crops."""
    grid = F.affine_grid(theta, [len(images), 3, ALIGNED, ALIGNED], align_corners=True)
    return F.grid_sample(images + 1, grid, align_corners=True) - 1


def median_seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of ``work`` after two warm-up runs."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats + 2):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[2:])


def compare_transforms(faces: int, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of both ways, and their ratio, for the transform alone and with the warp."""
    generator = torch.Generator().manual_seed(0)
    landmarks = (TEMPLATE / ALIGNED + 0.03 * torch.randn(faces, 5, 2, generator=generator)).to(device)
    images = (torch.rand(faces, 3, CROP, CROP, generator=generator) * 2 - 1).to(device)
    torch.testing.assert_close(loop(landmarks), batched(landmarks), atol=1e-4, rtol=0)
    results = {}
    for name, ways in {
        "transform": [lambda way=way: way(landmarks) for way in (loop, batched)],
        "align": [lambda: warp(images, loop(landmarks)), lambda: align(images, landmarks)],
    }.items():
        with torch.inference_mode():
            slow, fast = (1000 * median_seconds(way, device, repeats) for way in ways)
        results[name] = {
            "scikit_image_ms": round(slow, 3),
            "batched_ms": round(fast, 3),
            "ratio": round(slow / fast, 1),
        }
    return results


def dfa_faces_per_second(batch: int, device: str, repeats: int) -> dict[str, float]:
    """The whole aligner in torch, and in onnxruntime where it has a provider for the device."""
    dfa = DFA().eval().to(device)
    images = torch.rand(batch, 3, CROP, CROP, device=device) * 2 - 1
    with torch.inference_mode():
        results = {"torch": batch / median_seconds(lambda: dfa(images), device, repeats)}
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider in onnxruntime.get_available_providers():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "aligner.onnx", Path(folder) / "detector.onnx"]
            torch.onnx.export(dfa.cpu(), (images.cpu(),), paths[0], dynamo=True, opset_version=18, verbose=False)
            export_detector(dfa, paths[1])
            sessions = [onnxruntime.InferenceSession(path, options, providers=[provider]) for path in paths]
        for name, session in zip(("onnxruntime", "onnxruntime_pack"), sessions, strict=True):
            feed = {session.get_inputs()[0].name: images.cpu().numpy()}
            run = functools.partial(session.run, None, feed)
            results[name] = batch / median_seconds(run, "cpu", repeats)
    return {name: round(value, 1) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=int, default=256, help="faces to align (default 256)")
    parser.add_argument("--batch", type=int, default=32, help="batch of the whole aligner (default 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="runs of which the median counts (default 15)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    report = {
        "faces": arguments.faces,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        report[device] = compare_transforms(arguments.faces, device, arguments.repeats)
        report[device]["dfa_faces_per_second"] = dfa_faces_per_second(arguments.batch, device, arguments.repeats)
        for name, row in report[device].items():
            sys.stdout.write(f"{device} {name}: " + ", ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
