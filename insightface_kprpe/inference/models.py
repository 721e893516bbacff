"""Recognition models from any supported file, each a callable that embeds a batch of crops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..backbones import Backbone
from ..fingerprint import fingerprint
from ..hub import is_hub_source, local_source
from ..packs.layout import KEYPOINT_RECOGNITION, MANIFEST, RECOGNITION, onnx_files, read_manifest
from ..packs.metadata import input_convention, read_metadata
from ..packs.providers import settle_providers
from ..packs.routing import stock_route
from ..weights.sources import load_published

ModelPrecision = Literal["fp32", "bf16"]
# (images (B, 3, 112, 112) float RGB in [-1, 1], keypoints (B, 5, 2) in [0, 1]) -> (B, D)
EmbedFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

PACKS = "~/.insightface/models"


class Embedder(ABC):
    """A model as protocols use it: images and keypoints in, embeddings out.

    Attributes:
        name: its name in reports.
        device: of its input images.
        precision: in which it computes.
        needs_keypoints: embeddings depend on the keypoints passed.
        finds_keypoints: it finds the keypoints itself.
        locate: images -> its own keypoints (B, 5, 2) in [0, 1] and their scores (B,); None if it tells none.
    """

    name: str = "model"
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    needs_keypoints: bool = True
    finds_keypoints: bool = False
    locate: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    @abstractmethod
    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        """Embed one batch.

        Args:
            images: (B, 3, 112, 112) float RGB in [-1, 1].
            keypoints: (B, 5, 2) float in [0, 1] of the crops.

        Returns:
            (B, D) float, not normalized.
        """

    @abstractmethod
    def describe(self) -> str:
        """What it is, for reports."""

    def fingerprint(self) -> str | None:
        """Identifies this model; None if that is impossible, so that its embeddings cannot be cached."""
        return None


class FunctionEmbedder(Embedder):
    """Any function of images and keypoints as an :class:`Embedder`."""

    def __init__(self, function: EmbedFunction) -> None:
        self.function = function
        self.name = type(function).__name__

    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        """Embed one batch."""
        return self.function(images, keypoints)

    def describe(self) -> str:
        """What it is, for reports."""
        return self.name


def as_embedder(embed: Embedder | EmbedFunction) -> Embedder:
    """The model itself, or a function wrapped as one."""
    return embed if isinstance(embed, Embedder) else FunctionEmbedder(embed)


class TorchEmbedder(Embedder):
    """A network as an :class:`Embedder`: in eval mode, on its own device, without gradients.

    Args:
        net: a backbone ``(images, keypoints) -> embeddings``; one that finds its keypoints itself does so.
        name: its name in reports.
        precision: "bf16" computes in bfloat16 where that is safe.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(self, net: Backbone, name: str = "network", precision: ModelPrecision = "fp32") -> None:
        _check_precision(precision)
        self.net, self.name, self.precision = net, name, precision
        self.device = next(net.parameters()).device
        self.finds_keypoints = net.finds_keypoints
        self.needs_keypoints = net.needs_keypoints and not self.finds_keypoints
        self.locate = net.dfa.locate if self.finds_keypoints else None

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        """Embed one batch; the network's mode is restored."""
        was_training = self.net.training
        self.net.eval()
        try:
            keypoints = None if self.finds_keypoints else keypoints.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return self.net(images.to(self.device), keypoints).float().cpu()
        finally:
            self.net.train(was_training)

    def fingerprint(self) -> str:
        """Identifies this network."""
        return fingerprint(type(self.net).__name__, *self.net.state_dict().values())

    def describe(self) -> str:
        """What it is, for reports."""
        return f"torch {type(self.net).__name__}, RGB in [-1, 1], {self.precision} on {self.device.type}"


class OnnxEmbedder(Embedder):
    """An ONNX file in onnxruntime as an :class:`Embedder`, fed as InsightFace's ``ArcFaceONNX`` would feed it.

    Args:
        path: a file of this package, with or without input for keypoints, or any one-input ArcFace model.
        name: its name in reports; None: after the file.
        device: where to compute; CUDA needs onnxruntime-gpu, without which the CPU does it.

    Attributes:
        device: preferred for an aligner.
        mean, std: the file takes (pixel in [0, 255] - mean) / std, RGB.
        locate: None, as a file does not report its keypoints.

    Raises:
        ValueError: the file is not an ONNX file, or not a recognition model for 112 x 112 crops.
    """

    def __init__(self, path: str | Path, name: str | None = None, device: str | torch.device = "cpu") -> None:
        import onnxruntime

        self.path, self.name = Path(path), name or Path(path).stem
        self.device = torch.device(device)
        cuda = self.device.type == "cuda"
        gpu = ("CUDAExecutionProvider", {"device_id": self.device.index or 0})
        providers = [gpu] * cuda + ["CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # as many threads as torch's networks get
        asked = {"providers": providers, "sess_options": options}
        metadata = read_metadata(path)
        try:
            self.session = onnxruntime.InferenceSession(str(path), **settle_providers(asked))
        except Exception as error:  # onnxruntime's errors have no common base class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{path} could not be loaded by onnxruntime ({reason}); copy or export it again"
            ) from error
        self.inputs = self.session.get_inputs()
        self.needs_keypoints = metadata.get("inputs") == "images+keypoints"
        self.finds_keypoints = metadata.get("keypoint_source") == "dfa"
        shape = self.inputs[0].shape
        if len(self.inputs) != 1 + self.needs_keypoints or len(shape) != 4 or tuple(shape[2:]) != (112, 112):
            found = ", ".join(f"{value.name} {value.shape}" for value in self.inputs)
            raise ValueError(
                f"{path} must take images (batch, 3, 112, 112), and keypoints where this package wrote it, got {found}"
            )
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.mean, self.std = _input_convention(self.path, metadata)

    def __reduce__(self) -> tuple:
        return OnnxEmbedder, (self.path, self.name, self.device)  # a session is opened anew where it arrives

    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor) -> torch.Tensor:
        """Embed one batch, in parts if the file has a fixed batch size."""
        values = [(images.cpu() * 127.5 + (127.5 - self.mean)) / self.std, keypoints.cpu()][: len(self.inputs)]
        types = [np.float16 if value.type == "tensor(float16)" else np.float32 for value in self.inputs]
        feeds = [np.ascontiguousarray(v.numpy(), dtype=t) for v, t in zip(values, types, strict=True)]
        step = self.batch or len(images)
        parts = [self._run([feed[i : i + step] for feed in feeds], step) for i in range(0, len(images), step)]
        return torch.from_numpy(np.concatenate(parts)).float()

    def _run(self, feeds: list[np.ndarray], step: int) -> np.ndarray:
        count = len(feeds[0])
        if count < step:  # the end of a set, and a file with a fixed batch
            feeds = [np.concatenate([feed, np.repeat(feed[-1:], step - count, 0)]) for feed in feeds]
        names = [value.name for value in self.inputs]
        return self.session.run(None, dict(zip(names, feeds, strict=True)))[0][:count]

    def fingerprint(self) -> str:
        """Identifies this file."""
        beside = [self.path, self.path.with_name(f"{self.path.name}.data")]
        return fingerprint(*(path.read_bytes() for path in beside if path.is_file()))

    def describe(self) -> str:
        """What it is, for reports."""
        provider = self.session.get_providers()[0].removesuffix("ExecutionProvider")
        return f"ONNX {self.path.name}, RGB, (pixel - {self.mean:g}) / {self.std:g}, fp32 on {provider}"


def _input_convention(path: Path, metadata: dict[str, str]) -> tuple[float, float]:
    """Mean and std that the file expects: from its metadata, else as InsightFace's loader guesses them."""
    if "inputs" in metadata:  # exported by this package; in a pack, other files have metadata, too
        return input_convention(metadata, path)
    route = stock_route(path)
    if route.task != "recognition" or route.outputs != 1:
        raise ValueError(f"{path} must be a recognition model with one output, InsightFace loads it as {route.kind}")
    return route.input_mean, route.input_std


def open_model(
    path: str | Path,
    network: str | None = None,
    precision: ModelPrecision = "fp32",
    device: str | torch.device = "cpu",
    name: str | None = None,
) -> TorchEmbedder | OnnxEmbedder:
    """Open a recognition model.

    Args:
        path: an ``.onnx`` file; a FaceAnalysis pack, by folder or by its name in ``~/.insightface/models``; or torch
            weights as :func:`~insightface_kprpe.weights.sources.load_published` takes them: a training run, a
            ``.pt`` or ``.safetensors`` file, a published model; all of them, and ``.onnx`` files, also on the Hub
            ("hf:owner/name[/path][@revision]"). Of a pack that this package built, the model with keypoints is taken
            where there is one.
        network: name of the backbone of the weights, if neither the files next to them nor their shapes determine it.
        precision: "fp32" or "bf16"; ONNX files have their own.
        device: where to compute.
        name: its name in reports; None: after the file or folder.

    Raises:
        FileNotFoundError: there is no such file, folder or pack.
        ImportError, RuntimeError: it is on the Hub, and huggingface_hub is not installed, or the download failed.
        ValueError: it holds no recognition model, or the network of the weights is unknown.
    """
    _check_precision(precision)
    source, path = path, _find(path)
    name = name or default_name(source if is_hub_source(source) else path)
    if path.is_dir() and (onnx_files(path) or (path / MANIFEST).is_file()):
        path = _recognition_file(path)
    if path.suffix == ".onnx":
        if precision != "fp32" or network is not None:
            raise ValueError(f"{path} is an ONNX file, which fixes network and precision; leave both options out")
        return OnnxEmbedder(path, name, device)
    net, description = load_published(path, network)
    if description.task != "recognition":
        raise ValueError(f"model must be a recognition network, {path} holds an {description.task}")
    return TorchEmbedder(net.to(device).eval(), name, precision)


def default_name(path: str | Path) -> str:
    """The name of a model in reports if none was given: that of its file or folder."""
    path = Path(path)
    return path.parent.name if path.name == "model.pt" else path.stem if path.is_file() else path.name


def _find(path: str | Path) -> Path:
    """The path itself, the installed pack of that name, or what was downloaded from the Hub."""
    found = local_source(path)
    if found.exists():
        return found
    pack = Path(PACKS).expanduser() / str(path)
    if len(found.parts) == 1 and pack.is_dir():
        return pack
    raise FileNotFoundError(f"model not found: {path} is neither a file nor a folder nor a pack in {PACKS}")


def _recognition_file(folder: Path) -> Path:
    """The recognition model of a pack, as FaceAnalysis finds it; of ours, the one with keypoints."""
    if (folder / MANIFEST).is_file():
        files = read_manifest(folder)["files"]
        return folder / (KEYPOINT_RECOGNITION if KEYPOINT_RECOGNITION in files else RECOGNITION)
    for path in onnx_files(folder):
        if stock_route(path).task == "recognition":
            return path
    raise ValueError(
        f"{folder} is not a pack with a recognition model: InsightFace loads none of its .onnx files as one"
    )


def _check_precision(precision: str) -> None:
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, got {precision!r}")
