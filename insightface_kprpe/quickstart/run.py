"""The whole path once, on drawn faces: data -> training -> verification -> ONNX -> model pack -> FaceAnalysis.

Everything it makes lies in one folder. The faces are synthetic: the numbers show that the path works, not how well a
network recognises real people.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from ..backbones import get_model
from ..data.face_dataset import LANDMARK_FILE
from ..data.image_codec import encode_jpeg
from ..data.landmark_csv import write_landmark_csv
from ..data.record_tools import pack_drawn
from ..data.synthetic import SyntheticFaces, SyntheticScene, draw_scene, verification_pairs
from ..data.verification_bin import write_verification_bin
from ..data.verification_pairs import FIRST_UNSEEN_IDENTITY, open_verification
from ..deployment import model_pack
from ..evaluation.tinyface import identification
from ..evaluation.verification import verify
from ..files import write_atomically
from ..inference.embedding import embed_images
from ..inference.models import TorchEmbedder
from ..state_dict import load_weights
from .landmarks import DETECTOR_SIZE, PEOPLE, landmark_error, train_both

IMAGES_PER_PERSON = 30
UNSEEN_PEOPLE, PAIRS = 60, 600
PHOTOS = 5
PACK = "kprpe"
LICENCE = "MIT (trained on drawn faces)"


def run_quickstart(output: Path) -> dict[str, float]:
    """Run all steps and print what they give.

    Args:
        output: folder for everything; an earlier quickstart there is written over.

    Returns:
        Accuracies and rank-1 in percent, seconds taken, and how many people in the photos were named rightly.
    """
    started = time.perf_counter()
    output = Path(output)
    data, run = output / "data", output / "run"
    with _step(1, "drawing faces"):
        draw_data(data)
    detector, dfa = output / "detector.onnx", output / "dfa.pt"
    with _step(2, "training a face detector and a DFA on drawn pictures, side by side"):
        losses = train_both(detector, dfa, LICENCE)
        print("  losses {:.2f} and {:.2f} at the end".format(*losses))
    with _step(3, "training vit_n_kprpe (torchrun train_v2.py recognition_configs/quickstart.py)"):
        train_recognition(data, run)
    with _step(4, "verifying people who were not trained on"):
        net = with_aligner(run, dfa)
        results = evaluate(data, run, net)
    with _step(5, "exporting ONNX and building the model pack, DFA inside"):
        root = output / "insightface"
        folder = model_pack.build(
            recognition=net, detector=detector, name=PACK, root=root, licence=LICENCE, detector_licence=LICENCE
        )
        print(f"  {folder}")
    with _step(6, "recognising faces in group photos with the stock insightface FaceAnalysis"):
        results |= recognise(root, output)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_atomically(output / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    print(
        f"\nDone in {results['seconds'] / 60:.1f} minutes. Drawn faces: this shows that the path works, nothing more."
        f"\n  results        {output / 'results.json'}"
        f"\n  training run   {run} (model.pt, training.log, metrics.jsonl, checkpoints)"
        f"\n  photo          {output / 'photo.jpg'} -> {output / 'annotated.jpg'}"
        f"\n  model pack     {folder}"
        f"\n  use it         FaceAnalysis(name={PACK!r}, root={str(root)!r})"
    )
    return results


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    print(f"\n[{number}/6] {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)


def draw_data(folder: Path) -> None:
    """Draw a training set as RecordIO and two verification sets as ``.bin``, all with their landmarks."""
    folder.mkdir(parents=True, exist_ok=True)
    faces = SyntheticFaces(PEOPLE, IMAGES_PER_PERSON)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(faces.__getitem__, range(len(faces)), chunksize=50)
        drawn = list(tqdm(drawn, "  training set", len(faces), disable=None))
        aligned = pool.submit(verification_pairs, UNSEEN_PEOPLE, PAIRS, first_identity=FIRST_UNSEEN_IDENTITY)
        loose = pool.submit(
            verification_pairs, UNSEEN_PEOPLE, PAIRS, first_identity=FIRST_UNSEEN_IDENTITY, aligned=False
        )
        pack_drawn(folder, drawn)
        for name, future in (("aligned", aligned), ("unaligned", loose)):
            images, is_same, keypoints = future.result()
            write_verification_bin(folder / f"{name}.bin", [encode_jpeg(image) for image in images], is_same)
            write_landmark_csv(folder / f"{name}_{LANDMARK_FILE}", keypoints)
    print(f"  {len(faces)} images of {PEOPLE} people to train on, 2 x {PAIRS} pairs of {UNSEEN_PEOPLE} other people")


def train_recognition(data: Path, run: Path) -> None:
    """Train with torchrun, as a user would: from a checkout its ``train_v2.py``, else the installed module."""
    script = Path(__file__).resolve().parents[1] / "train_v2.py"
    target = [str(script)] if script.is_file() else ["-m", "insightface_kprpe.training.trainer"]
    processes = max(1, min(2, os.cpu_count() or 1))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *target]
    command += ["quickstart", f"rec={data}", "val_targets=('aligned','unaligned')", f"output={run}"]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def with_aligner(run: Path, dfa: Path) -> nn.Module:
    """The trained network with a DFA inside, which then finds the keypoints itself."""
    config = json.loads((run / "config.json").read_text())
    net = get_model(f"{config['network']}_dfa", num_features=config["embedding_size"], dfa_weights=dfa)
    return load_weights(net, run / "model.pt").eval()


def evaluate(data: Path, run: Path, net: nn.Module) -> dict[str, float]:
    """Verification with true landmarks and aligned by DFA, rank-1 with DFA's, and how far those are from the truth."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = {key: value for key, value in lines[-1].items() if key.startswith("accuracy/")}

    def align_and_embed(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        face = net.dfa(images)
        return net(face.aligned, face.aligned_keypoints)

    with torch.inference_mode():
        pairs = open_verification("unaligned", data)
        results["accuracy/unaligned, aligned by DFA"] = verify(align_and_embed, pairs, flip=False).accuracy
    faces = SyntheticFaces(UNSEEN_PEOPLE, 6, first_identity=FIRST_UNSEEN_IDENTITY)
    images, labels, keypoints = zip(*(faces[i] for i in range(len(faces))), strict=True)
    embeddings = embed_images(TorchEmbedder(net), images, np.stack(keypoints), label="  embedding")
    labels = np.array(labels)
    gallery = np.arange(len(labels)) % 6 == 0
    results |= identification(
        embeddings[~gallery], embeddings[gallery], labels[~gallery], labels[gallery], ranks=(1, 5)
    )
    for name, value in results.items():
        print(f"  {name:36} {value:6.2f} %")
    print(f"  (chance: 50 % for accuracy, {100 / UNSEEN_PEOPLE:.1f} % for rank-1)")
    error, template = landmark_error(net.dfa, FIRST_UNSEEN_IDENTITY, UNSEEN_PEOPLE)
    print(
        f"  DFA's landmarks on loose crops are {100 * error:.1f} % of the side off, the template {100 * template:.1f} %"
    )
    return results | {"landmark_error": error, "landmark_error_of_template": template}


def recognise(root: Path, output: Path) -> dict[str, int]:
    """Name the people of drawn group photos by portraits of them, with insightface's own ``FaceAnalysis``."""
    from insightface.app import FaceAnalysis

    logging.getLogger("insightface").setLevel(logging.WARNING)
    app = FaceAnalysis(name=PACK, root=str(root), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_thresh=0.7, det_size=(DETECTOR_SIZE, DETECTOR_SIZE))
    people = [FIRST_UNSEEN_IDENTITY + i for i in range(6)]
    gallery = np.stack([_portrait_embedding(app, person) for person in people])
    counts = np.sum([_recognise_photo(app, gallery, people, photo, output) for photo in range(1, PHOTOS + 1)], 0)
    drawn, found, right = map(int, counts)
    print(f"  in {PHOTOS} photos of them {found} faces found, {drawn} drawn, {right} named rightly")
    return {"faces_drawn": drawn, "faces_found": found, "faces_named_rightly": right}


def _recognise_photo(app, gallery: np.ndarray, people: list[int], number: int, output: Path) -> tuple[int, int, int]:
    """Name the faces of one photo; the first photo is also printed and written.

    Returns:
        How many faces are drawn, found, and named rightly.
    """
    scene = draw_scene(people, (480, 640), face_size=(90, 150), instance=number)
    photo = np.ascontiguousarray(scene.image[..., ::-1])
    faces = sorted(app.get(photo), key=lambda face: face.bbox[0])
    truths = [_who(scene, face.bbox) for face in faces]
    similarities = [gallery @ face.normed_embedding for face in faces]
    right = sum(people[similarity.argmax()] == truth for similarity, truth in zip(similarities, truths, strict=True))
    if number == 1:
        cv2.imwrite(str(output / "photo.jpg"), photo)
        names = [chr(ord("A") + i) for i in range(len(people))]
        print("  photo.jpg: cosine similarity of its faces to the portraits")
        print("  face   " + "".join(f"{name:>7}" for name in names) + "   named   is")
        for face_number, (face, similarity, truth) in enumerate(zip(faces, similarities, truths, strict=True), 1):
            named = int(similarity.argmax())
            is_name = names[people.index(truth)] if truth is not None else "nobody"
            row = "".join(f"{value:7.2f}" for value in similarity)
            wrong = "" if people[named] == truth else "   <- wrong"
            print(f"  {face_number:4}   {row}   {names[named]:5}   {is_name}{wrong}")
            _annotate(photo, face, f"{names[named]} {similarity[named]:.2f}")
        cv2.imwrite(str(output / "annotated.jpg"), photo)
    return len(scene.boxes), len(faces), right


def _portrait_embedding(app, person: int) -> np.ndarray:
    """Unit mean embedding of some portraits."""
    embeddings = []
    for instance in range(8):
        portrait = draw_scene([person], (480, 640), face_size=(110, 150), instance=instance).image[..., ::-1]
        found = app.get(np.ascontiguousarray(portrait), max_num=1)
        embeddings += [face.normed_embedding for face in found]
    if not embeddings:
        raise RuntimeError("the detector found no face in any portrait; the quickstart's detector did not learn")
    mean = np.mean(embeddings, 0)
    return mean / np.linalg.norm(mean)


def _who(scene: SyntheticScene, bbox: np.ndarray) -> int | None:
    """Whose drawn box holds the centre of a detected one."""
    x, y = (bbox[:2] + bbox[2:]) / 2
    inside = (scene.boxes[:, :2] <= (x, y)).all(1) & (scene.boxes[:, 2:] >= (x, y)).all(1)
    return int(scene.identities[inside.argmax()]) if inside.any() else None


def _annotate(photo: np.ndarray, face, text: str) -> None:
    left, top, right, bottom = face.bbox.astype(int)
    cv2.rectangle(photo, (left, top), (right, bottom), (80, 220, 80), 2, cv2.LINE_AA)
    for x, y in face.kps:
        cv2.circle(photo, (round(float(x)), round(float(y))), 2, (60, 60, 255), -1, cv2.LINE_AA)
    cv2.rectangle(photo, (left, max(0, top - 22)), (left + 80, top), (80, 220, 80), -1)
    cv2.putText(photo, text, (left + 4, max(16, top - 5)), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
