"""The whole path once, on drawn faces: data -> training -> verification -> ONNX -> model pack -> FaceAnalysis.

Everything it makes lies in one folder. The faces are synthetic: the numbers show that the path works, not how well a
network recognizes real people.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn as nn

from ..backbones import get_model
from ..data.face_dataset import LANDMARK_FILE
from ..data.image_codec import encode_jpeg
from ..data.landmark_csv import write_landmark_csv
from ..data.reading import end_with_parent
from ..data.record_tools import pack_drawn
from ..data.synthetic import SyntheticFaces, SyntheticScene, draw_face, draw_scene, verification_pairs
from ..data.verification_bin import write_verification_bin
from ..data.verification_pairs import FIRST_UNSEEN_IDENTITY, open_verification
from ..deployment import model_pack
from ..evaluation.tinyface import identification
from ..evaluation.verification import verify
from ..files import write_atomically
from ..inference.embedding import embed_images
from ..inference.models import TorchEmbedder
from ..progress import Progress
from ..state_dict import load_weights
from ..training.run_folder import METRICS
from .landmarks import DETECTOR_SIZE, PEOPLE, landmark_error, train_both

ALIGNED_PER_PERSON = LOOSE_PER_PERSON = 15
UNSEEN_PEOPLE, PAIRS = 60, 600
PHOTOS = 5
NETWORK, PLAIN = "vit_n_kprpe", "vit_n"  # alike but for the keypoints, which the second does not see
FIRST_SEED = 2048
PACK = "kprpe"
LICENCE = "MIT (trained on drawn faces)"
_LINUX, _PARENT_DEATH_SIGNAL = sys.platform == "linux", 1  # of prctl


def run_quickstart(output: Path, seed: int = 0) -> dict[str, float]:
    """Run all steps and print what they give.

    Args:
        output: folder for everything; an earlier quickstart there is written over.
        seed: of the networks' weights and training; the people are always the same.

    Returns:
        Accuracies and rank-1 as fractions, seconds taken, and what became of the faces in the photos.
    """
    started = time.perf_counter()
    output = Path(output)
    data, run, plain_run = output / "data", output / "run", output / "run_without_keypoints"
    with _step(1, "drawing faces"):
        draw_data(data)
    detector, dfa = output / "detector.onnx", output / "dfa.pt"
    with _step(2, "training a face detector and a DFA on drawn pictures, side by side"):
        losses = train_both(detector, dfa, LICENCE, seed=seed)
        print("  losses {:.2f} and {:.2f} at the end".format(*losses))
    with _step(3, f"training {NETWORK} and, beside it, {PLAIN} (train_v2.py recognition_configs/quickstart.py)"):
        train_recognition(data, {NETWORK: run, PLAIN: plain_run}, seed)
    with _step(4, "verifying people who were not trained on"):
        net = with_aligner(run, dfa)
        results = evaluate(data, run, plain_run, net)
    with _step(5, "exporting ONNX and building the model pack, DFA inside"):
        root = output / "insightface"
        folder = model_pack.build(
            recognition=net, detector=detector, name=PACK, root=root, licence=LICENCE, detector_licence=LICENCE
        )
        print(f"  {folder}")
    with _step(6, "recognizing faces in group photos with the stock insightface FaceAnalysis"):
        results |= recognize(root, output)
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
    """Draw a training set as RecordIO and two verification sets as ``.bin``, all with their landmarks.

    Half of the faces to train on are aligned, half are loose crops: only where keypoints vary is there something to
    learn from them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [(person, i) for person in range(PEOPLE) for i in range(ALIGNED_PER_PERSON + LOOSE_PER_PERSON)]
    with ProcessPoolExecutor(os.cpu_count(), initializer=end_with_parent) as pool:
        drawn = list(Progress(pool.map(_draw, pictures, chunksize=50), "  training set", len(pictures)))
        aligned = pool.submit(verification_pairs, UNSEEN_PEOPLE, PAIRS, first_identity=FIRST_UNSEEN_IDENTITY)
        loose = pool.submit(
            verification_pairs, UNSEEN_PEOPLE, PAIRS, first_identity=FIRST_UNSEEN_IDENTITY, aligned=False
        )
        pack_drawn(folder, drawn)
        for name, future in (("aligned", aligned), ("unaligned", loose)):
            images, is_same, keypoints = future.result()
            write_verification_bin(folder / f"{name}.bin", [encode_jpeg(image) for image in images], is_same)
            write_landmark_csv(folder / f"{name}_{LANDMARK_FILE}", keypoints)
    print(f"  {len(drawn)} images of {PEOPLE} people to train on, 2 x {PAIRS} pairs of {UNSEEN_PEOPLE} other people")


def _draw(picture: tuple[int, int]) -> tuple[np.ndarray, int, np.ndarray]:
    """The image, label and keypoints of a person's picture; the first ones are aligned."""
    person, instance = picture
    image, keypoints = draw_face(person, instance, aligned=instance < ALIGNED_PER_PERSON)
    return image, person, keypoints


def _stop_with_parent() -> None:
    """Ask Linux to stop this process, as by SIGTERM, when the one that started it is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def train_recognition(data: Path, runs: Mapping[str, Path], seed: int) -> None:
    """Train networks side by side, as a user would: from a checkout its ``train_v2.py``, else the installed module.

    Args:
        data: folder with ``train.rec`` and the validation sets.
        runs: network -> folder for its run. What the first one logs is shown, all of it is in ``training.log``.
        seed: added to the config's.
    """
    script = Path(__file__).resolve().parents[2] / "train_v2.py"
    target = [str(script)] if script.is_file() else ["-m", "insightface_kprpe.training.trainer"]
    threads = max(1, (os.cpu_count() or 1) // len(runs))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    started: list[subprocess.Popen] = []
    try:
        for network, run in runs.items():
            command = [sys.executable, *target, "quickstart", f"network={network}", f"rec={data}", f"output={run}"]
            command += ["val_targets=('aligned','unaligned')", f"seed={FIRST_SEED + seed}"]
            shown = None if not started else subprocess.DEVNULL
            started.append(
                subprocess.Popen(
                    command, stdout=shown, env=environment, preexec_fn=_stop_with_parent if _LINUX else None
                )
            )
        for process in started:
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)
    finally:
        for process in started:
            process.kill()


def with_aligner(run: Path, dfa: Path) -> nn.Module:
    """The trained network with a DFA inside, which then finds the keypoints itself."""
    config = json.loads((run / "config.json").read_text())
    settings = {"num_features": config["embedding_size"], **config["network_kwargs"]}
    net = get_model(f"{config['network']}_dfa", dfa_weights=dfa, **settings)
    return load_weights(net, run / "model.pt").eval()


def evaluate(data: Path, run: Path, plain_run: Path, net: nn.Module) -> dict[str, float]:
    """Verification with and without keypoints, aligned by DFA, and rank-1; and how far DFA's landmarks are off."""
    kprpe, plain = last_accuracies(run), last_accuracies(plain_run)
    print(f"  {'verification accuracy':36} {NETWORK:>12} {PLAIN:>12}")
    for name in kprpe:
        print(f"  {name + ' pairs':36} {100 * kprpe[name]:10.2f} % {100 * plain[name]:10.2f} %")
    results = {f"accuracy/{name}": value for name, value in kprpe.items()}
    results |= {f"accuracy/{name}, {PLAIN}": value for name, value in plain.items()}

    def align_and_embed(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        face = net.dfa(images)
        return net(face.aligned, face.aligned_keypoints)

    with torch.inference_mode():
        pairs = open_verification("unaligned", data)
        by_dfa = verify(align_and_embed, pairs, flip=False).accuracy
    faces = SyntheticFaces(UNSEEN_PEOPLE, 6, first_identity=FIRST_UNSEEN_IDENTITY)
    images, labels, keypoints = zip(*(faces[i] for i in range(len(faces))), strict=True)
    embeddings = embed_images(TorchEmbedder(net), images, np.stack(keypoints), label="  embedding")
    labels = np.array(labels)
    gallery = np.arange(len(labels)) % 6 == 0
    ranks = identification(embeddings[~gallery], embeddings[gallery], labels[~gallery], labels[gallery], ranks=(1, 5))
    results |= {"accuracy/unaligned, aligned by DFA": by_dfa, **ranks}
    for name, value in {"unaligned pairs, aligned by DFA": by_dfa, **ranks}.items():
        print(f"  {name:36} {100 * value:10.2f} %")
    print(f"  (chance: 50 % for accuracy, {100 / UNSEEN_PEOPLE:.1f} % for rank-1)")
    error, template = landmark_error(net.dfa, FIRST_UNSEEN_IDENTITY, UNSEEN_PEOPLE)
    print(
        f"  DFA's landmarks on loose crops are {100 * error:.1f} % of the side off, the template {100 * template:.1f} %"
    )
    return results | {"landmark_error": error, "landmark_error_of_template": template}


def last_accuracies(run: Path) -> dict[str, float]:
    """What a training run measured last on each validation set, as a fraction; its file has percent."""
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    found = {key: value for row in rows for key, value in row.items()}
    return {key.removeprefix("accuracy/"): value / 100 for key, value in found.items() if key.startswith("accuracy/")}


def recognize(root: Path, output: Path) -> dict[str, int]:
    """Name the people of drawn group photos by portraits of them, with insightface's own ``FaceAnalysis``."""
    from insightface.app import FaceAnalysis

    logging.getLogger("insightface").setLevel(logging.WARNING)
    app = FaceAnalysis(name=PACK, root=str(root), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_thresh=0.7, det_size=(DETECTOR_SIZE, DETECTOR_SIZE))
    people = [FIRST_UNSEEN_IDENTITY + i for i in range(6)]
    gallery = np.stack([_portrait_embedding(app, person) for person in people])
    photos = range(1, PHOTOS + 1)
    counts = np.sum([_recognize_photo(app, gallery, people, number, output) for number in photos], 0)
    drawn, found, nobody, right = map(int, counts)
    print(f"  {PHOTOS} photos of them, {drawn} faces: {found} found, {right} named correctly, {nobody} where nobody is")
    return {"faces_drawn": drawn, "faces_found": found, "faces_where_nobody_is": nobody, "faces_named_rightly": right}


def _recognize_photo(app, gallery: np.ndarray, people: list[int], number: int, output: Path) -> tuple[int, ...]:
    """Name the faces of one photo; the first photo is also printed and written.

    Returns:
        How many faces are drawn, how many found, how many of these are nobody's, and how many are named correctly.
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
    return len(scene.boxes), len(faces), truths.count(None), right


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
    """Whose drawn box holds the center of a detected one."""
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
