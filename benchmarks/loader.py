"""How many training images per second does one core read, decode and augment? One process, one thread, CPU seconds.

    python benchmarks/loader.py [--rec FOLDER] [--out loader.json]

Ours: records through a memory map, decoded by OpenCV to uint8, collated, and augmented in batches of 64 (on a CPU
here; in training on the device). The baseline is what arcface_torch does, image by image: PIL decodes and mirrors, then
the image becomes floats and is normalized; with the recipe, PIL's and NumPy's forms of the same operations come before
that. Without ``--rec`` the images are 2,000 drawn faces, packed as JPEG of quality 95. Other work on the machine slows
all forms down, CPU time or not: trust the rates of a quiet machine, and the ratios elsewhere.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import default_collate

from insightface_kprpe.data.augmentation import PAPER, build_augmentation
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.feed import ReadableFaces
from insightface_kprpe.data.record_tools import pack_drawn
from insightface_kprpe.data.recordio import RecordReader
from insightface_kprpe.data.synthetic import SyntheticFaces

BATCH, ROUNDS, IMAGES = 64, 5, 1024
GOALS = {"read + decode": 5000, "read + decode + recipe": 1500}


def pil_decode(payload: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(payload)).convert("RGB")
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """ToTensor and Normalize(0.5, 0.5)."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    return tensor.sub_(0.5).div_(0.5)


def pil_recipe(image: Image.Image) -> Image.Image:
    """The paper's recipe, one image at a time."""
    low, high = PAPER["color_magnitude"]
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color, ImageEnhance.Sharpness)
    for _ in range(PAPER["color_operations"]):
        number = random.randrange(7)
        factor = 1 + random.choice((-1, 1)) * random.randint(low, high) * 0.03
        if number < 4:
            image = enhancers[number](image).enhance(factor)
        elif number < 6:
            image = ImageOps.equalize(image) if number == 4 else image.convert("L").convert("RGB")
    if random.random() < PAPER["degrade_probability"]:
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 3)))
        else:
            side = random.randint(16, 96)
            image = image.resize((side, side), Image.BILINEAR).resize((112, 112), Image.BILINEAR)
    angle = math.radians(random.uniform(-20, 20)) if random.random() < PAPER["rotation_probability"] else 0.0
    zoom, shift = random.uniform(0.8, 1.2), [random.uniform(-11.2, 11.2) for _ in range(2)]
    a, b = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = -56 - shift[0], -56 - shift[1]
    image = image.transform(
        (112, 112), Image.AFFINE, (a, b, a * x + b * y + 56, -b, a, a * y - b * x + 56), Image.BILINEAR
    )
    if random.random() < PAPER["erase_probability"]:
        pixels = np.array(image)
        height, width = random.randint(16, 64), random.randint(16, 64)
        top, left = random.randint(0, 112 - height), random.randint(0, 112 - width)
        if random.random() < 0.5:
            pixels[top : top + height, left : left + width] = 0
        else:
            kept = pixels[top : top + height, left : left + width].copy()
            pixels[:] = 0
            pixels[top : top + height, left : left + width] = kept
        image = Image.fromarray(pixels)
    return image


def forms(folder: Path) -> dict[str, Callable[[list[int]], object]]:
    """What is measured, by name: each takes the indices of a batch."""
    reader, faces = RecordReader(folder), ReadableFaces(open_faces(folder))
    keys, augment, generator = reader.image_keys, build_augmentation("paper"), torch.Generator().manual_seed(0)

    def read(batch: list[int]) -> list[bytes]:
        return [reader[int(keys[i])][1] for i in batch]

    def decode(batch: list[int]) -> list[torch.Tensor]:
        return default_collate([faces[i] for i in batch])

    def recipe(batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images, _, keypoints, _ = decode(batch)
        return augment(images, keypoints, generator)

    return {
        "read": read,
        "read + decode": decode,
        "read + decode + recipe": recipe,
        "PIL: read + decode + mirror": lambda batch: torch.stack([pil_to_tensor(pil_decode(p)) for p in read(batch)]),
        "PIL: read + decode + recipe": lambda batch: torch.stack(
            [pil_to_tensor(pil_recipe(pil_decode(p))) for p in read(batch)]
        ),
    }


def measure(folder: Path) -> dict[str, float]:
    """Images a CPU second: the median over rounds, in which the forms take turns."""
    order = np.random.default_rng(0).permutation(len(RecordReader(folder).image_keys))
    count = min(IMAGES, len(order)) // BATCH * BATCH
    batches = order[:count].reshape(-1, BATCH).tolist()
    rates: dict[str, list[float]] = {}
    measured = forms(folder)
    for _ in range(ROUNDS + 1):
        for name, form in measured.items():
            started = time.process_time()
            for batch in batches:
                form(batch)
            rates.setdefault(name, []).append(count / (time.process_time() - started))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first warms up


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rec", type=Path, help="folder with train.rec; default: drawn faces")
    parser.add_argument("--out", help="also write the figures as JSON")
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.rec is None:
            faces = SyntheticFaces(100, 20)
            pack_drawn(temporary, (faces[i] for i in range(len(faces))))
        rates = measure(arguments.rec or Path(temporary))
    ratios = {
        "read + decode": rates["read + decode"] / rates["PIL: read + decode + mirror"],
        "read + decode + recipe": rates["read + decode + recipe"] / rates["PIL: read + decode + recipe"],
    }
    print(f"{'images / s of one core':30} {'rate':>8}   against PIL   goal")
    for name, rate in rates.items():
        ratio = f"{ratios[name]:.2f} x" if name in ratios else ""
        print(f"{name:30} {rate:8,.0f}   {ratio:>11}   {GOALS.get(name, '')}")
    if arguments.out:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread used, CPU time"
        results = {"machine": machine, "data": str(arguments.rec or "drawn faces"), "images_per_s": rates}
        with open(arguments.out, "w") as file:
            json.dump({**results, "ratio_to_pil": ratios, "goals": GOALS}, file, indent=2)


if __name__ == "__main__":
    main()
