"""Packs of hand-made ONNX files, ready in milliseconds, for tests of what runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS
from insightface_kprpe.packs.metadata import DFA_DETECTOR, METADATA_PREFIX

DIM = 16
DETECTOR_SIDE, FACE = 256, 32  # a face is a bright 8x8 cell of the detector's input; its box has this side
CPU = {"providers": ["CPUExecutionProvider"]}


def save(path: Path, nodes: list, inputs: dict, outputs: dict, constants: dict, metadata: dict | None = None) -> Path:
    """Write an ONNX file; shapes of inputs and outputs by name, all float32."""
    declare = {
        kind: [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
        for kind, values in (("inputs", inputs), ("outputs", outputs))
    }
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", declare["inputs"], declare["outputs"], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=METADATA_PREFIX + key, value=value)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (3 * 49, DIM)).astype(np.float32), rng.normal(0, 10, (10, DIM)).astype(np.float32)


def write_recognition(path: Path, with_keypoints: bool, ours: bool = True) -> Path:
    """Mean colors of 7x7 cells and keypoints, each times a matrix; without the input, the template's keypoints."""
    nodes = [
        helper.make_node("AveragePool", ["images"], ["cells"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("MatMul", ["flat", "color"], ["seen"]),
        helper.make_node("Reshape", ["keypoints", "ten"], ["points"]),
        helper.make_node("MatMul", ["points", "place"], ["placed"]),
        helper.make_node("Add", ["seen", "placed"], ["embedding"]),
    ]
    color, place = weights()
    constants = {"color": color, "place": place, "ten": np.array([-1, 10])}
    inputs = {"images": ["batch", 3, 112, 112]}
    if with_keypoints:
        inputs["keypoints"] = ["batch", 5, 2]
    else:
        constants["keypoints"] = CANONICAL_KEYPOINTS[None]
    metadata = {"inputs": "+".join(inputs), "mean": "127.5", "std": "127.5", "licence": "MIT"} if ours else None
    return save(path, nodes, inputs, {"embedding": ["batch", DIM]}, constants, metadata)


def embedding_of(crop: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """What the recognition file computes, in NumPy."""
    color, place = weights()
    pixels = (crop[..., ::-1].astype(np.float32) - 127.5) / 127.5
    cells = pixels.reshape(7, 16, 7, 16, 3).mean((1, 3)).transpose(2, 0, 1)
    return cells.reshape(-1) @ color + np.asarray(keypoints, np.float32).reshape(10) @ place


def write_detector(path: Path) -> Path:
    """SCRFD's layout: a face wherever an 8x8 cell is bright, with landmarks that differ from cell to cell."""
    cells = DETECTOR_SIDE // 8
    counts = {stride: 2 * (DETECTOR_SIDE // stride) ** 2 for stride in (8, 16, 32)}
    rng = np.random.default_rng(1)
    points = (ARCFACE_TEMPLATE_112 / 112 - 0.5) * FACE + rng.normal(0, 1, (counts[8], 5, 2))
    constants = {
        "axes": np.array([1]),
        "rows": np.array([cells * cells, 1]),
        "score_shape": np.array([-1, 1]),
        "half": np.float32(0.5),
        "bbox_8": np.full((counts[8], 4), FACE / 2 / 8, np.float32),
        "kps_8": (points.reshape(-1, 10) / 8).astype(np.float32),
    }
    for stride in (16, 32):
        constants[f"score_{stride}"] = np.zeros((counts[stride], 1), np.float32)
        constants[f"bbox_{stride}"] = np.zeros((counts[stride], 4), np.float32)
        constants[f"kps_{stride}"] = np.zeros((counts[stride], 10), np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["gray"], keepdims=1),
        helper.make_node("AveragePool", ["gray"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["pooled", "rows"], ["column"]),
        helper.make_node("Mul", ["column", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "half"], ["first"]),  # brightness in [0, 1]
        helper.make_node("Sub", ["first", "first"], ["second"]),  # of a cell's two anchors, one never sees a face
        helper.make_node("Concat", ["first", "second"], ["both"], axis=1),
        helper.make_node("Reshape", ["both", "score_shape"], ["score_8"]),
    ]
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    widths = {"score": 1, "bbox": 4, "kps": 10}
    outputs = {name: [counts[int(name.split("_")[1])], widths[name.split("_")[0]]] for name in names}
    outputs_of = {f"{name}_out": shape for name, shape in outputs.items()}
    nodes += [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names]
    return save(path, nodes, {"image": [1, 3, DETECTOR_SIDE, DETECTOR_SIDE]}, outputs_of, constants)


def write_aligner(path: Path, score: float = 0.9) -> Path:
    """A DFA in a detector's layout, whose one face is the template's, moved by how bright the crop is."""
    counts = {stride: 2 * (160 // stride) ** 2 for stride in (8, 16, 32)}
    constants = {"axes": np.array([1, 2, 3]), "flat": np.array([-1, 1, 1])}
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=1),
        helper.make_node("Reshape", ["mean", "flat"], ["bright"]),
    ]
    outputs = {}
    # first anchor: the face; all others: none
    face = {
        "score": (np.array([score]), 0.0),
        "bbox": (np.array([-2.0, -2, 18, 18]), 0.0),
        "kps": ((ARCFACE_TEMPLATE_112 * 160 / 112 / 8).reshape(10), 1.0),
    }
    for kind, (values, slope) in face.items():
        for stride in (8, 16, 32):
            table = np.zeros((1, counts[stride], len(values)), np.float32)
            if stride == 8:
                table[0, 0] = values
            constants[f"{kind}_{stride}_table"] = table
            constants[f"{kind}_{stride}_slope"] = np.float32(slope if stride == 8 else 0)
            nodes += [
                helper.make_node("Mul", ["bright", f"{kind}_{stride}_slope"], [f"{kind}_{stride}_moved"]),
                helper.make_node("Add", [f"{kind}_{stride}_moved", f"{kind}_{stride}_table"], [f"{kind}_{stride}"]),
            ]
            outputs[f"{kind}_{stride}"] = ["batch", counts[stride], len(values)]
    metadata = {"inputs": "image", "task": "detection", "detector": DFA_DETECTOR, "keypoint_source": "dfa"}
    return save(path, nodes, {"image": ["batch", 3, 160, 160]}, outputs, constants, metadata)


def write_pack(
    root: Path, name: str = "tiny", aligner: bool = False, twin: bool = True, manifest: bool = False
) -> Path:
    """A whole pack under ``root/models``; with ``manifest`` also in insightface 2's form."""
    folder = root / "models" / name
    write_detector(folder / "detection.onnx")
    write_recognition(folder / "recognition.onnx", with_keypoints=False)
    if twin:
        write_recognition(folder / "keypoints" / "recognition.onnx", with_keypoints=True)
    if aligner:
        write_aligner(folder / "keypoints" / "dfa.onnx")
    if manifest:
        (folder / "MODEL.LICENSE").write_text("MIT\n")
        tasks = {
            "detection": {"file": "detection.onnx"},
            "recognition": {"file": "recognition.onnx", "embedding_dimension": DIM},
        }
        document = {"manifest_version": 2, "model_id": name, "tasks": tasks, "license": "MODEL.LICENSE"}
        (folder / "manifest.json").write_text(json.dumps(document))
    return folder


def draw_picture(cells: list[tuple[int, int]], seed: int = 0, side: int = DETECTOR_SIDE) -> np.ndarray:
    """A dark image in which the tiny detector finds a face at each of these cells (column, row)."""
    picture = np.random.default_rng(seed).integers(0, 100, (side, side, 3), dtype=np.uint8)
    scale = side // (DETECTOR_SIDE // 8)
    for column, row in cells:
        shade = 230 + (3 * column + 5 * row) % 20
        picture[row * scale : (row + 1) * scale, column * scale : (column + 1) * scale] = shade
    return picture
