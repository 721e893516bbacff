"""Train a small KPRPE ViT and a DFA on public research data, and make a model pack of them: some hours of a CPU core.

    python benchmarks/small_pack.py --fiw fiw --lfw lfw --detector scrfd_500m_kps.onnx --landmarks faces/landmarks \\
        --retinaface retinaface_mobilenet0.25.pth --out work_dirs/small_pack

Every step is a command of this package, printed before it runs. Started again, it leaves out the steps that have ended
and continues the one that was interrupted. The pack is OUT/insightface/models/kprpe_small; OUT/MODEL_CARD.md says what
it was trained on, what it may be used for, and how well it does on Labeled Faces in the Wild.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.dfa import load_dfa
from insightface_kprpe.evaluation.protocols.pairs import run_pairs
from insightface_kprpe.files import write_atomically
from insightface_kprpe.inference.embedding import EmbedOptions
from insightface_kprpe.inference.models import open_model

NAME = "kprpe_small"
LICENCE = "research only (trained on Families in the Wild)"
DETECTOR_LICENCE = "InsightFace: non-commercial research"
SLIGHT = {"rotation": 10.0, "scale": 0.1, "translation": 0.04}  # augmentation of the first epochs
FOLDS = 5  # of LFW's ten official ones are in the pairs
CUTS = {"raw": "images as they are", "box": "detector's boxes", "aligned": "aligned by the detector's landmarks"}
INPUTS = {
    "fiw": "Families in the Wild, a folder a person (F0001_MID1/)",
    "lfw": "Labeled Faces in the Wild, images/ and pairs.txt",
    "detector": "SCRFD with landmarks, ONNX",
    "landmarks": "labeled faces, train/ and val/ with label.txt in RetinaFace's format",
    "retinaface": "public weights of RetinaFace-MobileNet0.25, from which DFA starts",
}


def build(fiw: Path, lfw: Path, detector: Path, landmarks: Path, retinaface: Path, out: Path) -> None:
    """Do what is missing."""
    data, aligned, run, dfa, root = (out / name for name in ("data", "aligned", "run", "dfa", "insightface"))
    study_data = Path(__file__).with_name("study_data.py")
    call(study_data, "--fiw", fiw, "--lfw", lfw, "--detector", detector, "--out", data, "--no-drawn")
    train = ["-m", "insightface_kprpe.cli", "train", "small_vit_n_kprpe", "resume=True", "val_targets=()"]
    # From scratch on moved faces the loss stays at chance for epochs; aligned ones get the network started.
    step(aligned, *train, f"rec={data / 'fiw_aligned'}", f"augment={SLIGHT}", "num_epoch=3", f"output={aligned}")
    step(run, *train, f"rec={data / 'fiw_both'}", f"init_from={aligned}", f"output={run}")
    train = ["-m", "insightface_kprpe.cli", "train-dfa", "dfa_small", "resume=True", f"init_from={retinaface}"]
    step(dfa, *train, f"data={landmarks / 'train'}", f"val={landmarks / 'val'}", f"output={dfa}")
    pack = root / "models" / NAME
    if not pack.is_dir():
        parts = ["--detector", detector, "--aligner", dfa / "model.pt", "--root", root, "--name", NAME]
        licences = ["--licence", LICENCE, "--detector-licence", DETECTOR_LICENCE]
        call("-m", "insightface_kprpe.cli", "pack", run, *parts, *licences)
    write_atomically(out / "MODEL_CARD.md", model_card(pack, run, dfa, data, detector.name).encode())
    print((out / "MODEL_CARD.md").read_text())


def step(folder: Path, *command: str) -> None:
    """A command that leaves a run in a folder, unless it has ended before."""
    ended = folder / "ended"
    if not ended.is_file():
        call(*command)
        ended.touch()


def call(*command: str | Path) -> None:
    """Run Python on a script or module; what it prints is shown."""
    arguments = [str(part) for part in command]
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def model_card(pack: Path, run: Path, dfa: Path, data: Path, detector: str) -> str:
    """Measure a run on LFW, by the keypoints of the detector and by DFA's."""
    embed = open_model(run)
    by_detector, by_dfa = EmbedOptions(), EmbedOptions(aligner=load_dfa(dfa))
    rows = []
    for cut, what in CUTS.items():
        pairs = replace(open_verification(str(data / f"lfw_{cut}.bin")), folds=FOLDS)
        found = [run_pairs(embed, pairs, options)[0].metrics for options in (by_detector, by_dfa)]
        rows.append(f"| {what} | " + " | ".join(f"{100 * each['accuracy']:.1f} %" for each in found) + " |")
    table = "\n".join(
        [
            f"| LFW, {len(pairs.is_same):,} pairs | the detector's keypoints | DFA's keypoints |",
            "| --- | --- | --- |",
            *rows,
        ]
    )
    config = json.loads((run / "config.json").read_text())
    return f"""# {NAME}

A face recognition pack for InsightFace: `FaceAnalysis(name="{NAME}", root="{pack.parents[1]}")`.

**A small network trained on little data**: to try things out with, not to tell strangers apart. Published weights are
in another class.

- Network: `{config["network"]}`, {config["embedding_size"]} dimensions, trained by
  `recognition_configs/small_vit_n_kprpe.py`. DFA: `recognition_configs/dfa_small.py`.
- Data: {config["num_image"]:,} crops of {config["num_classes"]:,} people of Families in the Wild, each image twice: as
  a detector cut it, and aligned; landmarks by {detector}. DFA: labeled faces, starting from
  RetinaFace's public weights (MIT).
- License: research only, as the terms of the data say. The detector is InsightFace's, for non-commercial research.
- Accuracy over LFW's official folds 1 to {FOLDS}, with the mirrored crop added. A few celebrities may be in both data
  sets:

{table}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in INPUTS.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/small_pack"))
    options = parser.parse_args(arguments)
    for name in INPUTS:
        if not getattr(options, name).exists():
            sys.exit(f"--{name} must be there, got {getattr(options, name)}: {INPUTS[name]}")
    try:
        build(**vars(options))
    except subprocess.CalledProcessError as error:
        sys.exit(f"A step ended with status {error.returncode}, see above. The same command continues from there.")


if __name__ == "__main__":
    main()
