"""What stands between KPRPE and free: the attention of one layer, piece by piece, in torch and in onnxruntime.

    python benchmarks/attention_layer.py [--shapes 8,16,14,32 32,4,8,32] [--rounds 40] [--out attention_layer.json]

A shape is images, heads, patches along a side, width of a head. One thread; milliseconds of its CPU time, the least of
interleaved rounds. In torch: plain attention, attention with ready-made biases, KPRPE's, and how long the biases alone
take to be read from their lines. In onnxruntime: the exported chain of operators with several ways to make the biases,
and the same through the fused operator com.microsoft.MultiHeadAttention. "block" takes query patches column by column,
so that biases are copied in runs of one key row; for the others order does not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from insightface_kprpe.backbones import offset_attention
from insightface_kprpe.backbones.relative_position import bucket_index
from insightface_kprpe.files import write_atomically

R = 49


def least(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each run: the least over rounds, since other work on the machine only adds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.thread_time()
            run()
            times[name].append(time.thread_time() - started)
    return {name: round(1000 * min(taken), 3) for name, taken in times.items()}


def torch_runs(batch: int, heads: int, side: int, width: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    length, index = side * side, offset_attention.line_index(bucket_index(side))
    qkv = torch.randn(batch, length, 3, heads, width)
    q = qkv.permute(2, 0, 3, 1, 4)[0]
    mask = torch.randn(batch, heads, length, length) * 0.1
    table, slope = torch.randn(batch, heads, side, R) * 0.1, torch.randn(heads, R) * 0.1
    lines = offset_attention.Lines(table, slope, index, F.one_hot(index, R).float(), None)
    learning = [value.clone().requires_grad_() for value in (qkv, table, slope)]
    gradient = torch.randn(batch, length, heads, width)

    def train(attend: Callable[..., torch.Tensor]) -> None:
        for value in learning:
            value.grad = None
        attend(*learning).backward(gradient)

    def plain(qkv: torch.Tensor, *_: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def biases() -> None:
        slopes = offset_attention._slope_lines(slope, index)
        for chunk in offset_attention.image_chunks(q):
            room = mask[: chunk.stop - chunk.start]
            offset_attention._fill(room, table[chunk], slopes, index, None)

    def kprpe(qkv: torch.Tensor, table: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return offset_attention.offset_attention(qkv, lines._replace(table=table, slope=slope), width**-0.5)

    return {
        "torch plain": lambda: plain(qkv),
        "torch ready-made mask": lambda: plain(qkv, mask=mask),
        "torch KPRPE": lambda: kprpe(qkv, table, slope),
        "torch KPRPE, biases alone": biases,
        "torch plain, training": lambda: train(plain),
        "torch ready-made mask, training": lambda: train(lambda *args: plain(*args, mask=mask)),
        "torch KPRPE, training": lambda: train(kprpe),
    }


class Graph:
    """Nodes and constants of a small ONNX graph, whose inputs are tokens, image tables and ready-made biases."""

    def __init__(self, batch: int, heads: int, side: int, width: int) -> None:
        rng = np.random.default_rng(0)
        self.heads, self.side, self.width, self.length = heads, side, width, side * side
        shapes = {
            "qkv": (self.length, 3 * heads * width),
            "image": (heads, R),
            "mask": (heads, self.length, self.length),
        }
        self.feeds = {name: rng.normal(size=(batch, *shape)).astype(np.float32) for name, shape in shapes.items()}
        self.nodes: list = []
        self.constants: list = []

    def constant(self, value: np.ndarray) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes) -> str | list[str]:
        names = [f"value{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names if outputs > 1 else names[0]

    def expand(self, index: np.ndarray) -> str:
        """The same index for every image."""
        count = self.add("Shape", "image", start=0, end=1)
        shape = self.add("Concat", count, self.constant(np.array([self.heads, *index.shape])), axis=0)
        return self.add("Expand", self.constant(index[None, None]), shape)

    def biases(self, way: str) -> str:
        bucket = bucket_index(self.side).numpy()
        rng, full = np.random.default_rng(1), np.array([0, self.heads, self.length, self.length])
        if way == "gather":  # of every query's table, as exported
            table = rng.normal(size=(1, self.heads, self.length, R)).astype(np.float32)
            image = self.add("Unsqueeze", "image", self.constant(np.array([2])))
            return self.add(
                "GatherElements", self.add("Sub", self.constant(table), image), self.expand(bucket), axis=-1
            )
        if way == "product":  # with a one-hot matrix
            spread = self.add("MatMul", "image", self.constant(np.eye(R, dtype=np.float32)[bucket.ravel()].T))
        else:  # "block": spread over key columns, then whole key rows are copied
            columns = bucket[: self.side, : self.side] % 7
            rows = bucket[:: self.side, :: self.side] // 7
            image = self.add("Reshape", "image", self.constant(np.array([0, 0, 1, 7, 7])))
            table = self.constant(rng.normal(size=(1, self.heads, self.side, 7, 7)).astype(np.float32))
            index = np.broadcast_to(columns[:, None], (self.side, 7, self.side))
            spread = self.add("GatherElements", self.add("Sub", table, image), self.expand(index), axis=-1)
            spread = self.add("Gather", spread, self.constant(rows.ravel()), axis=3)
        query = self.constant(rng.normal(size=(1, self.heads, self.length, self.length)).astype(np.float32))
        return self.add("Sub", query, self.add("Reshape", spread, self.constant(full)))

    def attend(self, bias: str, fused: bool) -> str:
        if fused:
            q, k, v = self.add("Split", "qkv", outputs=3, axis=2, num_outputs=3)
            inputs = (q, k, v, "", "", bias)
            return self.add("MultiHeadAttention", *inputs, domain="com.microsoft", num_heads=self.heads)
        shape = self.constant(np.array([0, 0, 3, self.heads, self.width]))
        qkv = self.add("Transpose", self.add("Reshape", "qkv", shape), perm=(2, 0, 3, 1, 4))
        axis = self.constant(np.array([0]))
        q, k, v = (self.add("Squeeze", part, axis) for part in self.add("Split", qkv, outputs=3, axis=0, num_outputs=3))
        q = self.add("Mul", q, self.constant(np.float32(self.width**-0.5)))
        logits = self.add("MatMul", q, self.add("Transpose", k, perm=(0, 1, 3, 2)))
        weights = self.add("Softmax", self.add("Add", logits, bias) if bias else logits, axis=-1)
        out = self.add("Transpose", self.add("MatMul", weights, v), perm=(0, 2, 1, 3))
        return self.add("Reshape", out, self.constant(np.array([0, 0, self.heads * self.width])))

    def run(self, output: str) -> Callable[[], object]:
        used = {name for node in self.nodes for name in node.input}
        feeds = {name: value for name, value in self.feeds.items() if name in used}
        kind = TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info(name, kind, ["b", *v.shape[1:]]) for name, v in feeds.items()]
        outputs = [helper.make_tensor_value_info(output, kind, None)]
        graph = helper.make_graph(self.nodes, "attention", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, feeds)


def onnx_runs(*shape: int) -> dict[str, Callable[[], object]]:
    runs = {}
    for engine in ("chain", "fused"):
        for way in ("plain", "ready-made mask", "gather", "product", "block"):
            graph = Graph(*shape)
            bias = {"plain": "", "ready-made mask": "mask"}.get(way) if way in ("plain", "ready-made mask") else None
            output = graph.attend(graph.biases(way) if bias is None else bias, engine == "fused")
            runs[f"onnxruntime {engine}, {way}"] = graph.run(output)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8,16,14,32", "32,4,8,32"], help="default: ViT-B's, ViT-N's")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "milliseconds": {}}
    for text in arguments.shapes:
        shape = [int(number) for number in text.split(",")]
        measured = {**least(torch_runs(*shape), arguments.rounds), **least(onnx_runs(*shape), arguments.rounds)}
        report["milliseconds"][text] = measured
        sys.stdout.write(f"{text}\n" + "".join(f"  {name:36} {value:8.2f} ms\n" for name, value in measured.items()))
        sys.stdout.flush()
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
