"""Readers of networks: weights, what lies beside them, ONNX files and packs."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from pathlib import Path

import onnx
import tiny_packs as tiny
import torch
from safetensors.torch import save_file

import insightface_kprpe as ik
from fuzz.harness import Reader
from fuzz.mutator import mutate, mutate_document
from insightface_kprpe.app import registration
from insightface_kprpe.app.doctor_packs import examine_packs
from insightface_kprpe.deployment.installed_packs import describe, rebuild_command
from insightface_kprpe.deployment.pack_files import check_detector, check_recognition
from insightface_kprpe.deployment.pack_sources import find_detector, open_aligner
from insightface_kprpe.dfa.weights import load_dfa
from insightface_kprpe.inference.models import open_model
from insightface_kprpe.losses import AdaFace
from insightface_kprpe.packs.layout import load_note
from insightface_kprpe.packs.metadata import METADATA_PREFIX, read_metadata
from insightface_kprpe.partial_fc import PartialFC
from insightface_kprpe.training import arcface_torch_checkpoint
from insightface_kprpe.training.initialization import initialize
from insightface_kprpe.weights.network import load_run
from insightface_kprpe.weights.sources import load_published

_SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}
_RUN = {
    "network": "vit_n_kprpe",
    "network_kwargs": _SIZES,
    "embedding_size": 16,
    "published": {"source": "", "licence": ""},
}
_DFA = {"body": "mobilenet0.25", "aggregator": True, "image_size": 160}
_YAML = {
    "name": "base", "color_space": "RGB", "output_dim": 16, "yaml_path": "models/vit_kprpe/configs/v1_base.yaml",
    "rpe_config": {"name": "KPRPE_shared", "rpe_on": "k", "ratio": 1.9, "ctx_type": "rel_keypoint", "num_keypoints": 5},
}  # fmt: skip
_MEASURED = {
    "change": {"minimal_cosine": 1.0, "mean_cosine": 1.0, "accuracy_fp32": 99.0, "accuracy": 99.0, "pairs": "drawn"},
    "evaluation": {"set": "lfw", "pairs": 9, "accuracy": 99.0, "thresholds": {"0.1": 0.2}},
}


def _net() -> ik.Backbone:
    return ik.get_model("vit_n_kprpe", num_features=16, **_SIZES)


def _make_run(folder: Path) -> None:
    torch.save(_net().state_dict(), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(_RUN))


def _read_run(folder: Path) -> None:
    load_published(folder)
    load_run(folder)
    open_model(folder)


def _make_iresnet(folder: Path) -> None:
    settings = {"layers": [1, 1, 1, 1], "widths": [8, 8, 8, 8]}
    torch.save(ik.get_model("r18", num_features=16, **settings).state_dict(), folder / "model.pt")
    config = {"network": "r18", "network_kwargs": settings, "embedding_size": 16}
    (folder / "config.json").write_text(json.dumps(config))


def _make_dfa(folder: Path) -> None:
    torch.save(ik.DFA().state_dict(), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(_DFA))


def _read_dfa(folder: Path) -> None:
    load_published(folder)
    load_dfa(folder)


def _make_cvlface(folder: Path) -> None:
    """The published sizes are too large for a test: the weights never fit, which is a sentence too."""
    torch.save(_net().state_dict(), folder / "model.pt")
    (folder / "model.yaml").write_text(json.dumps(_YAML))  # which is YAML, too
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def _unless_it_does_not_fit(folder: Path) -> None:
    try:
        load_published(folder)
    except ValueError as error:
        if "claims to be" not in str(error):
            raise


def _make_safetensors(folder: Path) -> None:
    save_file(_net().state_dict(), folder / "model.safetensors", {"insightface_kprpe": json.dumps(_RUN)})


def _mutate_header(data: bytes, seed: str) -> bytes:
    """Damage the JSON at the start of a safetensors file, and say its length rightly again."""
    (length,) = struct.unpack("<Q", data[:8])
    header = mutate_document(data[8 : 8 + length], seed)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _mutate_description(data: bytes, seed: str) -> bytes:
    """Damage what this package wrote into the header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = mutate_document(json.dumps(_RUN).encode(), seed).decode("utf-8", "replace")
    header["__metadata__"]["insightface_kprpe"] = text
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def mutate_entry(data: bytes, seed: str) -> bytes:
    """Damage one entry of what torch.save wrote."""
    rng = random.Random(seed)
    content = torch.load(io.BytesIO(data), weights_only=True)
    inner, key = content, rng.choice(list(content))
    while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
        inner, key = inner[key], rng.choice(list(inner[key]))
    if rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(
            (
                None, 3, -1, "x", [], {}, {"x": torch.zeros(2)}, torch.zeros(0), torch.zeros(()), torch.ones(3, 3),
                torch.zeros(1).expand(10**11), torch.zeros(2, 2).to_sparse(), torch.full((4, 16), float("nan")),
                torch.zeros(4, 16, dtype=torch.int32), torch.zeros(4, 16, dtype=torch.complex64),
            )
        )  # fmt: skip
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _compress(data: bytes, seed: str) -> bytes:
    """What torch.save wrote, compressed; a second part larger than all else."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return mutate(file.getvalue(), seed) if random.Random(seed).random() < 0.5 else file.getvalue()


def _make_arcface_torch(folder: Path) -> None:
    net, partial_fc = _net(), PartialFC(AdaFace(), 16, 4)
    content = {
        "epoch": 1,
        "state_dict_backbone": net.state_dict(),
        "state_dict_softmax_fc": {"weight": partial_fc.class_centers.detach()},
        "state_optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}},
    }
    torch.save(content, folder / "checkpoint_gpu_0.pt")


def _read_arcface_torch(folder: Path) -> None:
    initialize(_net(), PartialFC(AdaFace(), 16, 4), folder)
    arcface_torch_checkpoint.find(folder)


def _read_recognition(folder: Path) -> None:
    path = folder / "recognition.onnx"
    read_metadata(path)
    embed = open_model(path)
    embed(torch.zeros(1, 3, 112, 112), torch.zeros(1, 5, 2))
    check_recognition(path)
    registration._get_model(str(path), providers=["CPUExecutionProvider"])


def _read_detector(folder: Path) -> None:
    path = folder / "detection.onnx"
    find_detector(path)
    check_detector(path)


def _mutate_metadata(data: bytes, seed: str) -> bytes:
    """Damage what an ONNX file says of itself."""
    rng = random.Random(seed)
    model = onnx.load_from_string(data)
    chosen = rng.choice(model.metadata_props)
    if rng.random() < 0.2:
        chosen.key = METADATA_PREFIX + "x"
    else:
        chosen.value = rng.choice(("", "nan", "0", "inf", "-1", "x", "1e400", "images+keypoints", "{", "[" * 9999))
    return model.SerializeToString()


def _make_pack(folder: Path) -> None:
    pack = tiny.write_pack(folder, "p", aligner=True)
    record = {"sha256": "0", "source": "here", "licence": "MIT", "task": "recognition"}
    names = ("detection.onnx", "recognition.onnx", "keypoints/recognition.onnx", "keypoints/dfa.onnx")
    files = {name: dict(record) for name in names}
    files["recognition.onnx"] |= _MEASURED
    (pack / "pack.json").write_text(json.dumps({"name": "p", "format": "insightface-kprpe pack", "files": files}))


def _read_pack(folder: Path) -> None:
    pack = folder / "models" / "p"
    rebuild_command(pack)
    try:
        describe(pack)
        load_note(pack / "recognition.onnx")
        open_model(pack)
    finally:
        examine_packs(folder)


def _of_pack(name: str) -> Reader:
    return Reader(_make_pack, f"models/p/{name}", lambda folder: examine_packs(folder), heals=True, share=0.2)


def _beside(make, name: str, read, mutate=mutate_document, **options) -> Reader:
    return Reader(make, name, read, mutate, **options)


MODEL_READERS = {
    "run config.json": _beside(_make_run, "config.json", _read_run),
    "run config.json, bytes": _beside(_make_run, "config.json", _read_run, mutate),
    "run config.json, IResNet": _beside(_make_iresnet, "config.json", _read_run, share=0.5),
    "train-dfa config.json": _beside(_make_dfa, "config.json", _read_dfa, share=0.5),
    "model.pt": _beside(_make_run, "model.pt", _read_run, mutate),
    "model.pt, entries": _beside(_make_run, "model.pt", _read_run, mutate_entry),
    "model.pt, compressed": _beside(_make_run, "model.pt", _read_run, _compress, share=0.3),
    "dfa model.pt": _beside(_make_dfa, "model.pt", _read_dfa, mutate, share=0.5),
    "model.yaml": _beside(_make_cvlface, "model.yaml", _unless_it_does_not_fit),
    "model.yaml, bytes": _beside(_make_cvlface, "model.yaml", _unless_it_does_not_fit, mutate),
    "model card": _beside(_make_cvlface, "README.md", _unless_it_does_not_fit, mutate, heals=True, share=0.3),
    "safetensors": _beside(_make_safetensors, "model.safetensors", load_published, mutate),
    "safetensors header": _beside(_make_safetensors, "model.safetensors", load_published, _mutate_header),
    "safetensors description": _beside(_make_safetensors, "model.safetensors", load_published, _mutate_description),
    "checkpoint_gpu_0.pt": _beside(_make_arcface_torch, "checkpoint_gpu_0.pt", _read_arcface_torch, mutate),
    "checkpoint_gpu_0.pt, entries": _beside(
        _make_arcface_torch, "checkpoint_gpu_0.pt", _read_arcface_torch, mutate_entry
    ),
    "recognition.onnx": Reader(
        lambda f: tiny.write_recognition(f / "recognition.onnx", True), "recognition.onnx", _read_recognition
    ),
    "recognition.onnx, metadata": Reader(
        lambda f: tiny.write_recognition(f / "recognition.onnx", True),
        "recognition.onnx",
        _read_recognition,
        _mutate_metadata,
    ),
    "detection.onnx": Reader(lambda f: tiny.write_detector(f / "detection.onnx"), "detection.onnx", _read_detector),
    "dfa.onnx": Reader(
        lambda f: tiny.write_aligner(f / "dfa.onnx"), "dfa.onnx", lambda f: open_aligner(f / "dfa.onnx")
    ),
    "pack.json": _beside(_make_pack, "models/p/pack.json", _read_pack, share=0.3),
    "doctor: recognition.onnx": _of_pack("recognition.onnx"),
    "doctor: detection.onnx": _of_pack("detection.onnx"),
}
