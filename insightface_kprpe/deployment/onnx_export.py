"""Networks -> ONNX files that describe their inputs, checked against torch before they appear."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
import torch.nn as nn

from ..backbones import Backbone
from ..backbones.relative_position import template_keypoints
from ..data.synthetic import SyntheticFaces
from ..dfa import DFA
from ..files import atomic_path
from ..packs.metadata import KEYPOINT_CONVENTION, save_onnx, set_metadata

logger = logging.getLogger(__name__)

# The first that torch's exporter targets, and old enough for onnxruntime 1.14 and TensorRT 8.6.
OPSET = 18
BATCHES = (1, 2, 5)  # that a file is compared with torch in
MINIMAL_COSINE = 0.9999
_MAX_BYTES = 2**31 - 2**20

WITHOUT_KEYPOINTS = {
    "dfa": "found by the built-in aligner; if its face score is below dfa_threshold, the template's are used",
    "template": "faces must be aligned to the template",
    "none": "faces must be aligned to the template",
}


class ExportError(RuntimeError):
    """The exported file does not compute what the network computes; nothing was written."""


class ExportReport(NamedTuple):
    """What was written and how close it is to torch."""

    path: Path
    inputs: tuple[str, ...]
    cosine: float  # smallest over all batches tried
    metadata: dict[str, str]


class ImageOnly(nn.Module):
    """A KPRPE network for hosts that pass only images: every face is assumed to be perfectly aligned.

    Args:
        net: ``(images, keypoints) -> embeddings``.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("keypoints", template_keypoints(1).clone(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) float RGB in [-1, 1] -> (B, D)."""
        return self.net(images, self.keypoints.expand(images.shape[0], -1, -1))


def keypoint_source(net: nn.Module, image_only: bool) -> str:
    """Where the keypoints of an exported network come from: "input", "dfa", "template", or "none" if unused."""
    if not net.needs_keypoints:
        return "none"
    if not image_only:
        return "input"
    return "dfa" if net.finds_keypoints else "template"


def export_onnx(
    net: nn.Module,
    path: str | Path,
    image_only: bool = False,
    licence: str = "unknown",
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Export a recognition network with a dynamic batch and check it in onnxruntime.

    Input ``images`` is (batch, 3, 112, 112) float32 RGB in [-1, 1], ``keypoints`` (if there is one) is
    (batch, 5, 2) float32 in [0, 1], output ``embedding`` is (batch, D) float32, not normalized.

    Args:
        net: a backbone.
        path: where to write; appears only when all checks have passed.
        image_only: leave the keypoints input out, so that InsightFace's stock loader accepts the file. The aligner of a
            self-aligned network then goes into the file; other KPRPE networks get the canonical template. Networks
            without keypoints are always exported so.
        licence: of the weights; stored in the file.
        metadata: more entries to store in the file.

    Returns:
        What was written.

    Raises:
        ValueError: the network is not a backbone in float32, or is wrapped; the message says what to pass.
        ExportError: the file's embeddings differ from torch's, or do not depend on the keypoints.
    """
    check_exportable(net)
    source = keypoint_source(net, image_only)
    inputs = ("images", "keypoints") if source == "input" else ("images",)
    size = net.img_size
    entries = {
        "inputs": "+".join(inputs),
        "colour_order": "RGB",
        "mean": "127.5",
        "std": "127.5",
        "keypoint_source": source,
        "keypoint_convention": KEYPOINT_CONVENTION if source == "input" else f"none: {WITHOUT_KEYPOINTS[source]}",
        "licence": licence,
        **({"dfa_threshold": net.dfa_threshold} if source == "dfa" else {}),
        **(metadata or {}),
    }
    with eval_on_cpu(net), atomic_path(path) as temporary:
        module = ImageOnly(net).eval() if source == "template" else net
        save_graph(module, example_inputs(2, size)[: len(inputs)], temporary, inputs, ["embedding"], entries)
        cosine = _check(module, temporary, inputs, size)
    logger.info("%s: %s, opset %d, cosine to torch >= %.6f", path, " + ".join(inputs), OPSET, cosine)
    return ExportReport(Path(path), inputs, cosine, entries)


def check_exportable(net: nn.Module, kind: type[nn.Module] = Backbone) -> None:
    """Refuse what torch's exporter cannot handle, and say what to pass.

    Args:
        net: what is to be exported.
        kind: of network that it must be.

    Raises:
        ValueError: a wrapped network, one of another kind or not in float32, or one too large for a file.
    """
    if hasattr(net, "_orig_mod"):
        raise ValueError("net must be the network itself, got one compiled by torch.compile; pass net._orig_mod")
    if not isinstance(net, kind) and isinstance(getattr(net, "module", None), nn.Module):
        raise ValueError(f"net must be the network itself, got it wrapped in {type(net).__name__}; pass net.module")
    if isinstance(net, DFA) and kind is Backbone:
        raise ValueError("net must be a recognition network, got a DFA; write it with detector_export.export_detector")
    if not isinstance(net, kind):
        raise ValueError(f"net must be a {kind.__module__}.{kind.__name__} or derive from it, got {type(net).__name__}")
    types = {parameter.dtype for parameter in net.parameters()} - {torch.float32}
    if types:
        found = ", ".join(sorted(str(kind) for kind in types))
        raise ValueError(f"net must have float32 weights, got {found}; call net.float() first")
    if (size := sum(parameter.nbytes for parameter in net.parameters())) >= _MAX_BYTES:
        raise ValueError(
            f"net must have less than 2 GiB of weights, the limit of one ONNX file, got {size / 2**30:.1f} GiB; "
            "use a smaller network"
        )


def save_graph(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
    dynamic_batch: bool = True,
) -> None:
    """Write a module as ONNX, in this package's opset and with this package's metadata.

    Args:
        module: in eval mode on the CPU.
        example: what to trace it with; more than one image if the batch is dynamic.
        path: the file.
        inputs: their names.
        outputs: their names.
        metadata: read back by :func:`read_metadata`.
        dynamic_batch: whether the first dimension of all inputs is free.
    """
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=tuple({0: batch} for _ in inputs) if dynamic_batch else None,
            opset_version=OPSET,
            verbose=False,
        )
    model = program.model_proto
    set_metadata(model, metadata)
    save_onnx(model, path)


def example_inputs(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn faces, in which an aligner finds something, and slightly displaced keypoints."""
    generator = torch.Generator().manual_seed(batch)
    drawn = SyntheticFaces(batch, 1, size=size)
    images = torch.from_numpy(np.stack([drawn[i][0] for i in range(batch)])).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(batch, 5, 2, generator=generator) * 0.05
    return images, template_keypoints(batch) + noise


def smallest_cosine(embeddings: np.ndarray, expected: np.ndarray) -> float:
    """Smallest cosine between the rows of two (B, D) arrays; NaN if one is zero."""
    norms = np.linalg.norm(embeddings, axis=1) * np.linalg.norm(expected, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(((embeddings * expected).sum(1) / norms).min())


def _check(module: nn.Module, path: Path, inputs: tuple[str, ...], size: int) -> float:
    """Smallest cosine between torch's and the file's embeddings over all ``BATCHES``."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    cosines = []
    for batch in BATCHES:
        example = example_inputs(batch, size)[: len(inputs)]
        with torch.no_grad():
            expected = module(*example).numpy()
        feeds = {name: value.numpy() for name, value in zip(inputs, example, strict=True)}
        got = session.run(["embedding"], feeds)[0]
        if got.shape != expected.shape or not np.isfinite(got).all():
            raise ExportError(f"batch of {batch}: embeddings are {got.shape}, expected finite {expected.shape}")
        cosines.append(smallest_cosine(got, expected))
    if not min(cosines) >= MINIMAL_COSINE:
        raise ExportError(
            f"embeddings differ from torch: cosine {min(cosines):.6f}, expected at least {MINIMAL_COSINE}"
        )
    if "keypoints" in inputs:
        moved = session.run(["embedding"], {**feeds, "keypoints": feeds["keypoints"][:, ::-1].copy()})[0]
        if np.abs(moved - got).max() <= 1e-6 * np.abs(got).max():
            raise ExportError(
                "changing the keypoints does not change the embeddings: the network's keypoint_linear is all zeros "
                "(an untrained network?) or the export lost it"
            )
    return min(cosines)


@contextlib.contextmanager
def eval_on_cpu(net: nn.Module) -> Iterator[None]:
    """Eval mode on the CPU, with unfused attention: torch's exporter gets the layout of the fused kernel wrong."""
    device, was_training = next(net.parameters()).device, net.training
    fused = [(module, module.fused_attn) for module in net.modules() if hasattr(module, "fused_attn")]
    for module, _ in fused:
        module.fused_attn = False
    net.eval().cpu()
    try:
        yield
    finally:
        for module, value in fused:
            module.fused_attn = value
        net.train(was_training).to(device)
