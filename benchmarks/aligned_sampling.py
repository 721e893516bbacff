"""Should an aligned face be sampled from the crop, or from the resized square that the landmark network sees?

    python benchmarks/aligned_sampling.py lfw_raw.bin lfw_box.bin --model model.onnx [--folds 5] [--out sampling.json]

Every crop of verification sets with landmarks (the same ones for both sides) is moved onto the template twice: sampled
from the crop, ``DFA``'s default, and from its resize to 160 pixels (``aligned_from="square"``, as CVLface does). Prints
how far pixels and embeddings differ, and the verification accuracy of both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from insightface_kprpe.data.face_dataset import to_network_input
from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.dfa.aligner import align, fit_to_square
from insightface_kprpe.evaluation.metrics import kfold_accuracy, unit_rows
from insightface_kprpe.files import write_atomically
from insightface_kprpe.inference.embedding import embed_images
from insightface_kprpe.inference.models import open_model
from insightface_kprpe.progress import Progress

SQUARE = 160  # pixels of DFA's input
BATCH = 64


def align_both_ways(images: Sequence[np.ndarray], keypoints: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By what they were sampled from: (N, 112, 112, 3) uint8 aligned faces and (N, 5, 2) their keypoints."""
    faces: dict[str, list] = {"crop": [], "square": []}
    points: list[np.ndarray] = []
    for start in Progress(range(0, len(images), BATCH), desc="align"):
        batch = np.stack([images[i] for i in range(start, min(start + BATCH, len(images)))])
        crops = to_network_input(torch.from_numpy(batch).permute(0, 3, 1, 2))
        where = torch.tensor(keypoints[start : start + BATCH], dtype=torch.float32)
        for name, source in (("crop", crops), ("square", fit_to_square(crops, SQUARE))):
            aligned, moved, _ = align(source, where)
            faces[name].append(aligned.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
        points.append(moved.numpy())
    return {name: (np.concatenate(parts), np.concatenate(points)) for name, parts in faces.items()}


def compare(path: str, models: Sequence[str], folds: int) -> list[dict]:
    """One row a model."""
    pairs = open_verification(path)
    aligned = align_both_ways(pairs.images, pairs.keypoints)
    difference = np.abs(aligned["crop"][0].astype(np.float32) - aligned["square"][0]) / 127.5
    rows = []
    for model in models:
        name, _, source = model.rpartition("=")
        embed = open_model(source)
        row = {"set": Path(path).stem, "model": name or Path(source).stem, "images": len(pairs.images)}
        row |= {"pixels, largest": float(difference.max()), "pixels, mean": float(difference.mean())}
        embeddings = {side: embed_images(embed, *faces, flip=True) for side, faces in aligned.items()}
        cosine = (unit_rows(embeddings["crop"]) * unit_rows(embeddings["square"])).sum(1)
        row |= {"cosine, median": float(np.median(cosine)), "cosine, lowest": float(cosine.min())}
        for side, both in embeddings.items():
            row[f"accuracy, {side}"] = 100 * kfold_accuracy(both[::2], both[1::2], pairs.is_same, folds).accuracy
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare both on each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help=".bin files with ldmk_5points.csv next to them")
    parser.add_argument("--model", action="append", required=True, help="NAME=FILE; may be given again")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args(arguments)
    try:
        rows = [row for path in options.sets for row in compare(path, options.model, options.folds)]
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if options.out:
        write_atomically(options.out, (json.dumps(rows, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
