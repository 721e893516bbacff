"""What do relative positions cost? Images a second of ViTs with iRPE and KPRPE over those of the plain one.

    python benchmarks/attention.py [--sizes vit_n vit_s cvlface_vit_b] [--batches 1 8 32] [--out attention.json]

Forward passes, training steps (forward and backward) and onnxruntime. In every round each network runs once, and the
ratio to the plain network is taken within the round; the table has the median over rounds. The column "mask" is the
floor: the plain network with ready-made attention biases (B, H, N, N) that no one computed and no one learns. On a CPU
one thread works, and its own CPU time is what counts, so that neighbors disturb little; with ``--threads 2`` wall time
does. On a GPU: the same in float32 and bfloat16, eager, compiled, and KPRPE through FlexAttention; no onnxruntime.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn as nn
from torch.nn.attention.flex_attention import flex_attention

from insightface_kprpe import get_model
from insightface_kprpe.backbones.relative_position import template_keypoints
from insightface_kprpe.deployment.onnx_export import eval_on_cpu, save_graph
from insightface_kprpe.deployment.precision import WRITERS
from insightface_kprpe.files import write_atomically

POSITIONS = ("plain", "mask", "irpe", "kprpe")
MINIMAL_ROUNDS, MAXIMAL_ROUNDS = 3, 40


class ReadyMadeMask(nn.Module):
    """A plain network whose attention gets biases that cost nothing to make, the same for all layers."""

    def __init__(self, net: nn.Module, batch: int) -> None:
        super().__init__()
        self.net = net
        heads, patches = net.blocks[0].attn.num_heads, net.pos_embed.shape[1]
        kept = int(patches * (1 - net.mask_ratio))
        self.register_buffer("mask", torch.randn(batch, heads, patches, patches) * 0.1)
        self.register_buffer("kept_mask", torch.randn(batch, heads, kept, kept) * 0.1)
        for block in net.blocks:
            block.attn.register_forward_pre_hook(self._add_mask, with_kwargs=True)

    def _add_mask(self, attention: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        tokens = arguments[0]
        mask = self.mask if tokens.shape[1] == self.mask.shape[-1] else self.kept_mask
        return arguments, {**named, "attn_mask": mask.to(tokens.dtype)}

    def forward(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        return self.net(images, keypoints)


class FlexKPRPE(nn.Module):
    """KPRPE whose biases are never written down: FlexAttention's kernel reads them from the tables."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.flex_attention = torch.compile(flex_attention)
        net.keypoint_linear.attention_bias = lambda tables, layer, _: [t[layer % len(t)] for t in tables]
        for block in net.blocks:
            block.attn.forward = functools.partial(self._attend, block.attn)

    def _attend(self, attention: nn.Module, x: torch.Tensor, attn_mask: list, is_causal: bool = False) -> torch.Tensor:
        column, slope, image = attn_mask
        columns, bucket = self.net.keypoint_linear.columns, self.net.keypoint_linear.bucket
        query = (column[:, None] + columns[:, None, None] * slope[:, None, None]).flatten(1, 2)  # (H, N, R)
        q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)

        def add_bias(score, b, h, i, j):
            return score + query[h, i, bucket[i, j]] - image[b, h, bucket[i, j]]

        return attention.proj(self.flex_attention(q, k, v, score_mod=add_bias).transpose(1, 2).flatten(2))

    def forward(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        return self.net(images, keypoints)


def build(size: str, position: str, batch: int, depth: int | None) -> nn.Module:
    """A network of one size; its position tables are random, since zeros could be special."""
    torch.manual_seed(0)
    settings = {"depth": depth} if depth else {}
    names = {"plain": size, "mask": size, "irpe": f"{size}_irpe"}
    net = get_model(names.get(position, f"{size}_kprpe"), **settings)
    for name, parameter in net.named_parameters():
        if "keypoint_linear" in name or "lookup_table" in name:
            nn.init.normal_(parameter, std=0.1)
    if position == "mask":
        return ReadyMadeMask(net, batch)
    return FlexKPRPE(net) if position == "flex" else net


def example(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(batch, 3, 112, 112) * 2 - 1, template_keypoints(batch) + torch.randn(batch, 5, 2) * 0.05


def forward(net: nn.Module, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> Callable[[], None]:
    net.eval()

    def run() -> None:
        with torch.inference_mode(), torch.autocast(inputs[0].device.type, precision, precision != torch.float32):
            net(*inputs)

    return run


def training(net: nn.Module, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> Callable[[], None]:
    net.train()

    def run() -> None:
        net.zero_grad()
        with torch.autocast(inputs[0].device.type, precision, precision != torch.float32):
            embeddings = net(*inputs)
        embeddings.square().sum().backward()

    return run


def export(net: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    """Write one network as ONNX."""
    names = ("images", "keypoints") if getattr(net, "position", None) == "kprpe" else ("images",)
    with eval_on_cpu(net):
        save_graph(_OneInput(net).eval() if len(names) == 1 else net, inputs[: len(names)], path, names, ["y"], {})


def onnx_forward(path: Path, precision: str, inputs: tuple[torch.Tensor, ...], threads: int) -> Callable[[], None]:
    """One exported network in onnxruntime, in float32 or as packs have it in a lower precision."""
    if precision != "fp32":
        full, path = path, path.with_suffix(f".{precision}.onnx")
        WRITERS[precision](full, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {taken.name: value.numpy() for taken, value in zip(session.get_inputs(), inputs, strict=False)}
    return lambda: session.run(None, feeds)


class _OneInput(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images, None)


def interleave(runs: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]) -> dict[str, list]:
    """Times of all runs, round by round, after a warm-up; each gets about ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, done = MAXIMAL_ROUNDS, -2
    while done < rounds:
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
        done += 1
        if done == 0:
            rounds = int(np.clip(seconds / max(min(taken) for taken in times.values()), MINIMAL_ROUNDS, MAXIMAL_ROUNDS))
    return {name: taken[2:] for name, taken in times.items()}


def row(labels: dict, times: dict[str, list], batch: int) -> dict:
    """Images a second of the plain network and the median ratio of every other to it."""
    plain = np.array(times["plain"])
    ratios = {name: round(float(np.median(plain / np.array(taken))), 3) for name, taken in times.items()}
    return {**labels, "batch": batch, "plain images/s": round(batch / statistics.median(plain), 2), "ratio": ratios}


def measure_cpu(size: str, batch: int, arguments: argparse.Namespace) -> list[dict]:
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    inputs, rows = example(batch), []
    nets = {position: build(size, position, batch, arguments.depth) for position in arguments.positions}
    for name, make in (("forward", forward), ("training", training)):
        if name in arguments.passes and not (name == "training" and batch == 1):  # BatchNorm needs two images
            runs = {position: make(net, inputs, torch.float32) for position, net in nets.items()}
            labels = {"engine": "torch", "pass": name, "size": size}
            rows.append(row(labels, interleave(runs, arguments.seconds, clock), batch))
    if "onnx" in arguments.passes:
        with tempfile.TemporaryDirectory() as folder:
            paths = {position: Path(folder) / f"{position}.onnx" for position in nets}
            for position, path in paths.items():
                export(nets[position], inputs, path)
            for precision in arguments.precisions:
                runs = {name: onnx_forward(path, precision, inputs, arguments.threads) for name, path in paths.items()}
                labels = {"engine": f"onnxruntime {precision}", "pass": "forward", "size": size}
                rows.append(row(labels, interleave(runs, arguments.seconds, clock), batch))
    return rows


def measure_cuda(size: str, batch: int, arguments: argparse.Namespace) -> list[dict]:
    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    inputs, rows = tuple(value.cuda() for value in example(batch)), []
    for compiled in (False, True):
        for precision in (torch.float32, torch.bfloat16):
            positions = (*arguments.positions, "flex")
            nets = {position: build(size, position, batch, arguments.depth).cuda() for position in positions}
            if compiled:
                for net in nets.values():
                    net.compile()
            for name, make in (("forward", forward), ("training", training))[: 1 if batch == 1 else 2]:
                if name == "training" and nets["plain"].mask_ratio > 0:  # its tables know whole grids alone
                    nets.pop("flex", None)
                runs = {position: make(net, inputs, precision) for position, net in nets.items()}
                engine = f"cuda {str(precision)[6:]}{' compiled' if compiled else ''}"
                labels = {"engine": engine, "pass": name, "size": size}
                rows.append(row(labels, interleave(runs, arguments.seconds, clock), batch))
    return rows


def format_row(row: dict) -> str:
    ratios = "".join(f"{name} {ratio:.3f}  " for name, ratio in row["ratio"].items() if name != "plain")
    where = f"{row['size']:14} {row['engine']:16} {row['pass']:9} batch {row['batch']:3}"
    return f"{where}  plain {row['plain images/s']:8.1f}/s  {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["vit_n", "vit_s", "cvlface_vit_b"], help="registered names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--positions", nargs="+", default=POSITIONS, choices=POSITIONS)
    parser.add_argument("--passes", nargs="+", default=["forward", "training", "onnx"], help="default: all three")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["fp32", *WRITERS], help="in onnxruntime")
    parser.add_argument("--depth", type=int, help="layers, where fewer will do (default: all; ratios hardly change)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--seconds", type=float, default=10, help="for each network and row of the table (default 10)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {platform.machine()}, {arguments.threads} thread(s)"
    report = {"machine": machine, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "rows": []}
    for size in arguments.sizes:
        for batch in arguments.batches:
            for measured in (measure_cuda if cuda else measure_cpu)(size, batch, arguments):
                report["rows"].append(measured)
                sys.stdout.write(format_row(measured) + "\n")
                sys.stdout.flush()
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
