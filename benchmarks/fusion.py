"""Which fusion copes best with bad frames? All fusions side by side on an IJB set with blurred and shifted ones.

    python benchmarks/fusion.py faces/ijb --model NAME=work_dirs/run --aligner work_dirs/dfa --out work_dirs/fusion

A share of the frames is made worse, drawn by a seed: one half of it is blurred, the other gets landmarks that lie
off the face, so that its aligned crop is shifted. Everything else is unchanged. The original set comes first, for
comparison.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from insightface_kprpe.dfa import load_dfa
from insightface_kprpe.evaluation import ijb, protocols
from insightface_kprpe.evaluation.fusion import FUSION_METHODS
from insightface_kprpe.evaluation.report import format_text, write_report
from insightface_kprpe.evaluation.result import Result
from insightface_kprpe.inference.embedding import EmbedOptions
from insightface_kprpe.inference.models import open_model


def degrade(folder: Path, out: Path, target: str, share: float, blur: float, shift: float, seed: int) -> int:
    """Copy an IJB set with some frames made worse.

    Args:
        folder: holds ``meta`` and ``loose_crop``.
        out: where the copy goes.
        target: ``IJBB`` or ``IJBC``.
        share: of the frames that are made worse.
        blur: sigma of the blur, as a share of the distance between the eyes.
        shift: how far landmarks are moved, as a share of the same.
        seed: of the choice and the directions.

    Returns:
        The number of frames that were made worse.
    """
    meta = ijb.read_meta(folder, target)
    rng = np.random.default_rng(seed)
    count = len(meta.names)
    chosen = rng.permutation(count)[: round(share * count)]
    blurred, shifted = np.array_split(chosen, 2)
    eyes = np.linalg.norm(meta.landmarks_px[:, 1] - meta.landmarks_px[:, 0], axis=-1)
    angle = rng.uniform(0, 2 * np.pi, count)
    landmarks = meta.landmarks_px.copy()
    landmarks[shifted] += (shift * eyes[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1))[shifted, None]

    shutil.copytree(folder / "meta", out / "meta")
    rows = zip(meta.names, landmarks.reshape(-1, 10), meta.detector_scores, strict=True)
    lines = (" ".join([name, *(f"{value:.3f}" for value in points), f"{score:.6f}"]) for name, points, score in rows)
    (out / "meta" / f"{target.lower()}_name_5pts_score.txt").write_text("\n".join(lines) + "\n")
    shutil.copytree(folder / "loose_crop", out / "loose_crop")
    for index in blurred:
        path = out / "loose_crop" / meta.names[index]
        image = cv2.GaussianBlur(cv2.imread(str(path)), (0, 0), float(max(blur * eyes[index], 0.1)))
        path.unlink()  # a copy of a read-only file is read-only
        cv2.imwrite(str(path), image)
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="set in the layout of InsightFace's IJB scripts")
    parser.add_argument("--model", action="append", required=True, help="NAME=PATH, as for insightface-kprpe evaluate")
    parser.add_argument("--aligner", type=Path, required=True, help="DFA: output folder of train-dfa, or weights file")
    parser.add_argument("--target", default="IJBC", help="IJBC (default) or IJBB")
    parser.add_argument("--share", type=float, default=0.5, help="share of the frames made worse (default 0.5)")
    parser.add_argument("--blur", type=float, default=0.15, help="sigma over the eyes' distance (default 0.15)")
    parser.add_argument("--shift", type=float, default=0.6, help="landmarks' shift over the same (default 0.6)")
    parser.add_argument("--seed", type=int, default=0, help="of the frames and directions")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    arguments = parser.parse_args()

    options = EmbedOptions(aligner=load_dfa(arguments.aligner), aligner_name=f"DFA {arguments.aligner}")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as temporary:
        worse = Path(temporary)
        keys = ("target", "share", "blur", "shift", "seed")
        count = degrade(arguments.folder, worse, **{key: getattr(arguments, key) for key in keys})
        for name, folder in (("as it is", arguments.folder), (f"{count} frames worse", worse)):
            for model in arguments.model:
                label, _, path = model.rpartition("=")
                embed = open_model(path, name=label or None)
                found = protocols.run_ijb(embed, folder, arguments.target, FUSION_METHODS, options)
                results += [replace(result, protocol=f"{result.protocol}, {name}") for result in found]
    sys.stdout.write(format_text(results) + "\n")
    write_report(results, arguments.out)


if __name__ == "__main__":
    main()
