"""The quickstart's two landmark networks: a face detector for whole pictures and a DFA for crops of one face.

Both are trained on drawn people, side by side on one CPU core each, in about a minute and a half.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.face_dataset import to_network_input
from ..data.landmark_augmentation import LandmarkAugmentation
from ..data.landmark_dataset import UNKNOWN, FaceSample
from ..data.reading import end_with_parent
from ..data.synthetic import SyntheticFaces, draw_scene
from ..deployment.detector_export import export_detector
from ..dfa import DFA
from ..dfa.loss import DFALoss
from ..dfa.network import RetinaFaceNet
from ..files import atomic_path
from ..geometry import CANONICAL_KEYPOINTS
from ..training.landmark_trainer import train_landmarks

PEOPLE = 100
# The detector is trained on small pictures of at most one face and then looks at larger ones of many.
SCENE_SIZE, DETECTOR_SIZE = 96, 320
DETECTOR_ANCHORS = ((24, 32), (40, 50), (64, 80))


class DrawnScenes(Dataset):
    """Pictures of one drawn person.

    Args:
        count: how many.
        size: side in pixels.
        face_size: least and greatest height of the face in pixels.
        faceless: every so many-th picture shows no face but what stands below one, as group photos do; 0: none.
    """

    def __init__(self, count: int, size: int, face_size: tuple[float, float], faceless: int = 0) -> None:
        self.count, self.size, self.face_size, self.faceless = count, size, face_size, faceless
        self.drawn: dict[int, FaceSample] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> FaceSample:
        if index not in self.drawn:
            self.drawn[index] = self._draw(index)
        return self.drawn[index]

    def _draw(self, index: int) -> FaceSample:
        keypoints, box = np.full((5, 2), UNKNOWN, np.float32), np.full(4, UNKNOWN, np.float32)
        faceless = self.faceless and index % self.faceless == self.faceless - 1
        height = 3 * self.size if faceless else self.size
        scene = draw_scene([index % PEOPLE], (height, self.size), face_size=self.face_size, instance=index)
        image = scene.image
        if faceless:
            chin = round(float(scene.boxes[0, 3])) if len(scene.boxes) else 0
            top = chin if chin <= 2 * self.size else 0  # a face that is so low leaves room above it
            image = image[top : top + self.size]
        elif len(scene.boxes):
            keypoints, box = scene.landmarks_px[0] / self.size, scene.boxes[0] / self.size
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        return FaceSample(torch.from_numpy(image), torch.from_numpy(keypoints), torch.from_numpy(box))


def train_both(
    detector: Path, dfa: Path, licence: str, scenes: int = 3600, crops: int = 1200, seed: int = 0
) -> tuple[float, float]:
    """Train the detector and DFA at the same time and write their files.

    Args:
        detector: ONNX file to write, in the layout of InsightFace's detectors.
        dfa: weights file to write.
        licence: stored in the detector's file.
        scenes: pictures to train the detector on.
        crops: pictures to train DFA on.
        seed: of weights, order and augmentation.

    Returns:
        The losses of the last steps.
    """
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        futures = [
            pool.submit(_train_detector, detector, licence, scenes, seed),
            pool.submit(_train_dfa, dfa, crops, seed),
        ]
        return futures[0].result(), futures[1].result()


def _train_detector(path: Path, licence: str, count: int, seed: int) -> float:
    """RetinaFace-MobileNet0.25, exported with the input size that it will be used at."""
    torch.manual_seed(seed)
    net = RetinaFaceNet(aggregator=False, image_size=SCENE_SIZE, anchor_sizes=DETECTOR_ANCHORS)
    scenes = DrawnScenes(count, SCENE_SIZE, face_size=(30, 84), faceless=12)
    loss = _train(
        net, scenes, "  detector", loss=DFALoss(face_weight=0.0), epochs=4, lr=0.008, warmup_epochs=1.0, seed=seed
    )
    larger = RetinaFaceNet(aggregator=False, image_size=DETECTOR_SIZE, anchor_sizes=DETECTOR_ANCHORS)
    larger.load_state_dict(net.state_dict())
    export_detector(larger, path, licence)
    return loss


def _train_dfa(path: Path, count: int, seed: int) -> float:
    torch.manual_seed(seed)
    net = RetinaFaceNet()
    crops = DrawnScenes(count, net.image_size, face_size=(90, 140))
    # Grown and shifted, so that the face also fills the crop as it does once it is aligned.
    augmentation = LandmarkAugmentation(scale=(0.9, 1.4), shift=0.08, rotation=20.0)
    loss = _train(net, crops, "  DFA", augmentation=augmentation, epochs=5, lr=0.004, warmup_epochs=0.5, seed=seed)
    with atomic_path(path) as temporary:
        torch.save(net.state_dict(), temporary)
    return loss


def _train(net: RetinaFaceNet, dataset: Dataset, description: str, **settings) -> float:
    torch.set_num_threads(1)  # the networks are small: threads would wait for each other longer than they compute
    net.to(memory_format=torch.channels_last)  # a third faster on CPUs
    return train_landmarks(net, dataset, batch_size=16, description=description, **settings)


def landmark_error(dfa: DFA, first_identity: int, people: int) -> tuple[float, float]:
    """Mean distance of DFA's landmarks from the true ones on loose crops of drawn people, and the template's.

    Returns:
        Both as a fraction of the crop's side.
    """
    faces = SyntheticFaces(people, 2, first_identity=first_identity, aligned=False)
    images, _, keypoints = zip(*(faces[i] for i in range(len(faces))), strict=True)
    truth = np.stack(keypoints)
    with torch.inference_mode():
        found, *_ = dfa.locate(to_network_input(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)))
    guesses = found.numpy(), CANONICAL_KEYPOINTS
    return tuple(float(np.linalg.norm(guess - truth, axis=-1).mean()) for guess in guesses)
