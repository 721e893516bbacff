"""What lies next to weights and in packs, with entries of other types or cut off: one sentence that names the file."""

from __future__ import annotations

import json
import random

import pytest
import tiny_packs as tiny
import torch
from safetensors.torch import save_file

import insightface_kprpe as ik
from insightface_kprpe.deployment import installed_packs, model_pack
from insightface_kprpe.dfa.weights import load_dfa
from insightface_kprpe.packs.metadata import read_metadata
from insightface_kprpe.weights.network import load_run
from insightface_kprpe.weights.sources import load_published

COUNT = 24
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}
RUN = {
    "network": "vit_n_kprpe",
    "network_kwargs": TINY,
    "embedding_size": 16,
    "published": {"source": "", "licence": ""},
}
DFA = {"body": "mobilenet0.25", "aggregator": True, "image_size": 160}
YAML = {
    "name": "base", "color_space": "RGB", "output_dim": 16, "yaml_path": "models/vit_kprpe/configs/v1_base.yaml",
    "rpe_config": {"name": "KPRPE_shared", "rpe_on": "k", "ratio": 1.9, "ctx_type": "rel_keypoint", "num_keypoints": 5},
}  # fmt: skip
VALUES = (None, [], {}, "x", -1, 10**12, 1.5, True, "", [1], {"a": 1}, float("nan"), 0)


def places(content, path=()):
    """Where the entries of a document are."""
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*path, key))


def damaged(content, seed):
    """A document as JSON, which YAML can be too, with one entry missing or of another kind, or cut off."""
    rng = random.Random(seed)
    content = json.loads(json.dumps(content))
    *path, last = rng.choice(list(places(content))[1:])
    inner = content
    for key in path:
        inner = inner[key]
    inner[last] = rng.choice(VALUES)
    if rng.random() < 0.2:
        del inner[last]
    text = json.dumps(content)
    return text[: rng.randrange(len(text))] if rng.random() < 0.2 else text


def check(read, path, name):
    """A reader takes a file, or refuses it by its name."""
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:
        assert name in str(error), error


@pytest.mark.parametrize(
    ("state", "name", "content", "reads"),
    [
        ("vit", "config.json", RUN, (load_published, load_run)),
        ("dfa", "config.json", DFA, (load_published, load_dfa)),
        ("vit", "model.yaml", YAML, (load_published,)),
    ],
)
def test_descriptions_beside_weights(tmp_path, state, name, content, reads):
    net = ik.DFA() if state == "dfa" else ik.get_model("vit_n_kprpe", num_features=16, **TINY)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    for seed in range(COUNT):
        (tmp_path / name).write_text(damaged(content, seed))
        for read in reads:
            check(read, tmp_path, tmp_path.name)


def test_headers_of_converted_weights(tmp_path):
    state = ik.get_model("vit_n_kprpe", num_features=16, **TINY).state_dict()
    path = tmp_path / "net.safetensors"
    for seed in range(COUNT):
        save_file(state, path, {"insightface_kprpe": damaged(RUN, seed)})
        check(load_published, path, path.name)
        path.write_bytes(path.read_bytes()[: random.Random(seed).randrange(3000)])
        check(load_published, path, path.name)


def test_manifests_and_files_of_packs(tmp_path):
    source = tiny.write_pack(tmp_path, "source")
    recognition = source / "keypoints" / "recognition.onnx"
    folder = model_pack.build(recognition=recognition, detector=source / "detection.onnx", root=tmp_path / "root")
    manifest = json.loads((folder / "pack.json").read_text())
    numbers = {"minimal_cosine": 1.0, "mean_cosine": 1.0, "accuracy_fp32": 99.0, "accuracy": 99.0, "pairs": "drawn"}
    manifest["files"]["recognition.onnx"] |= {
        "change": numbers, "evaluation": {"set": "lfw", "pairs": 9, "accuracy": 99.0, "thresholds": {"0.1": 0.2}},
    }  # fmt: skip
    for seed in range(4 * COUNT):
        (folder / "pack.json").write_text(damaged(manifest, seed))
        check(installed_packs.describe, folder, "pack.json")
        assert installed_packs.rebuild_command(folder).startswith("insightface-kprpe pack")
    whole = recognition.read_bytes()
    for seed in range(COUNT):
        recognition.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
        check(read_metadata, recognition, "recognition.onnx")
