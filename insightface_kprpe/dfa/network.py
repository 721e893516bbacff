"""The landmark network: a RetinaFace for one face a crop, with or without DFA's Mixer aggregator.

Paper: "KeyPoint Relative Position Encoding for Face Recognition" (CVPR 2024), supplementary sections 3 and 6. Parameter
names are those of the published weights of both models, so attributes such as ``ClassHead`` and ``conv5X5_1`` stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .._timm import MixerBlock, create_model
from ..state_dict import load_weights, read_state_dict, strip_prefixes
from .anchors import DFA_ANCHOR_SIZES, decode_boxes, decode_points, make_anchors

ANCHORS_PER_CELL = 2
AT_ONCE = 16  # images, whose features stay in a CPU's cache
VALUES_PER_ANCHOR = 4 + 2 + 10  # box, background / face, five points
# RetinaFaceNet(**RETINAFACE) reads the public RetinaFace-MobileNet0.25 weights (WIDER FACE) as they were trained: for
# faces of any size in an image, on BGR pixels minus their mean, with plain ReLUs.
RETINAFACE = {
    "aggregator": False,
    "anchor_sizes": ((10, 20), (32, 64), (128, 256)),
    "pixel_mean": (104.0, 117.0, 123.0),
    "pixel_std": 1.0,
    "negative_slope": 0.0,
}


class NetworkOutput(NamedTuple):
    """What the network says of each crop; A anchors, coordinates in [0, 1] of the crop.

    Attributes:
        bbox_regression: (B, A, 4) relative to the anchors.
        class_logits: (B, A, 2) background, face.
        landmark_regression: (B, A, 10) relative to the anchors.
        keypoints: (B, 5, 2) the one face's points.
        bbox: (B, 4) its box x1, y1, x2, y2.
        score: (B,) probability in [0, 1] that the crop shows a face.
    """

    bbox_regression: torch.Tensor
    class_logits: torch.Tensor
    landmark_regression: torch.Tensor
    keypoints: torch.Tensor
    bbox: torch.Tensor
    score: torch.Tensor


def infers_on_cpu(images: torch.Tensor) -> bool:
    """Whether a CPU is to compute this now, with no one who records operations for gradients or to run them later."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(images) is not torch.Tensor
    return images.device.type == "cpu" and not recorded and not torch.is_grad_enabled()


class _ConvNorms(nn.Sequential):
    """Convolutions, each with its BatchNorm behind it, and activations; in eval mode the two are one convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x)
        layers = iter(self)
        for layer in layers:
            x = _convolve(x, layer, next(layers)) if isinstance(layer, nn.Conv2d) else layer(x)
        return x


def _convolve(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    """A convolution and the BatchNorm behind it, whose numbers are few against the pixels."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)


def _conv_bn(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, slope: float | None = None
) -> list[nn.Module]:
    """Convolution and BatchNorm, then LeakyReLU unless ``slope`` is None."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    activation = [] if slope is None else [nn.LeakyReLU(slope, inplace=True)]
    return [conv, nn.BatchNorm2d(out_channels), *activation]


class MobileNetBody(nn.Module):
    """MobileNet v1 at a quarter of its width; features of 64, 128 and 256 channels at strides 8, 16, 32."""

    channels = (64, 128, 256)

    def __init__(self, slope: float) -> None:
        super().__init__()

        def block(in_channels: int, out_channels: int, stride: int = 1) -> _ConvNorms:
            depthwise = _conv_bn(in_channels, in_channels, stride=stride, groups=in_channels, slope=slope)
            return _ConvNorms(*depthwise, *_conv_bn(in_channels, out_channels, kernel=1, slope=slope))

        stem = _ConvNorms(*_conv_bn(3, 8, stride=2, slope=slope))
        self.stage1 = nn.Sequential(
            stem, block(8, 16), block(16, 32, 2), block(32, 32), block(32, 64, 2), block(64, 64)
        )
        self.stage2 = nn.Sequential(block(64, 128, 2), *(block(128, 128) for _ in range(5)))
        self.stage3 = nn.Sequential(block(128, 256, 2), block(256, 256))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        stride8 = self.stage1(x)
        stride16 = self.stage2(stride8)
        return [stride8, stride16, self.stage3(stride16)]


def _resnet50_body() -> nn.Module:
    """timm's ResNet-50 without its classifier; features at strides 8, 16, 32, parameter names as torchvision's."""
    return create_model("resnet50", features_only=True, out_indices=(2, 3, 4))


class FeaturePyramid(nn.Module):
    """Brings the three levels to one width and adds each coarser level to the next finer one."""

    def __init__(self, in_channels: Sequence[int], width: int, slope: float) -> None:
        super().__init__()
        self.output1, self.output2, self.output3 = (
            _ConvNorms(*_conv_bn(channels, width, kernel=1, slope=slope)) for channels in in_channels
        )
        self.merge1 = _ConvNorms(*_conv_bn(width, width, slope=slope))
        self.merge2 = _ConvNorms(*_conv_bn(width, width, slope=slope))

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        fine, middle, coarse = self.output1(features[0]), self.output2(features[1]), self.output3(features[2])
        middle = self.merge2(middle + F.interpolate(coarse, size=middle.shape[-2:], mode="nearest"))
        fine = self.merge1(fine + F.interpolate(middle, size=fine.shape[-2:], mode="nearest"))
        return [fine, middle, coarse]


class ContextModule(nn.Module):
    """SSH: three receptive fields (3x3, 5x5, 7x7, made of 3x3 convolutions) side by side."""

    def __init__(self, width: int, slope: float) -> None:
        super().__init__()
        quarter = width // 4
        self.conv3X3 = _ConvNorms(*_conv_bn(width, width // 2))
        self.conv5X5_1 = _ConvNorms(*_conv_bn(width, quarter, slope=slope))
        self.conv5X5_2 = _ConvNorms(*_conv_bn(quarter, quarter))
        self.conv7X7_2 = _ConvNorms(*_conv_bn(quarter, quarter, slope=slope))
        self.conv7x7_3 = _ConvNorms(*_conv_bn(quarter, quarter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.conv5X5_1(x)
        wide = self.conv7x7_3(self.conv7X7_2(shared))
        return torch.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(shared), wide], 1))


class Head(nn.Module):
    """A 1x1 convolution read as ``size`` numbers per anchor, cell by cell: (B, cells * anchors, size)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv1x1 = nn.Conv2d(width, ANCHORS_PER_CELL * size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.size)


class RetinaFaceNet(nn.Module):
    """One face's landmarks, box and score from a square crop.

    With the aggregator (DFA, Eq. 13-15) a small Mixer looks at what all anchors say and weighs them; without it the
    best-scoring anchor is read, which is RetinaFace for one face.

    Args:
        body: "mobilenet0.25" (width 64 in pyramid and heads) or "resnet50" (width 256), as RetinaFace's two models.
        aggregator: weigh the anchors by a Mixer instead of reading the best one.
        image_size: side of the input in pixels; fixed, since the Mixer has weights per anchor.
        anchor_sizes: sides in pixels of the two anchors per cell at strides 8, 16, 32.
        pixel_mean: blue, green, red; what is subtracted from pixels in 0..255 before the first convolution.
        pixel_std: what the difference is divided by. The defaults are pixels in [-1, 1].
        negative_slope: of the leaky ReLUs; by default 0.1 for MobileNet and 0 for ResNet, as RetinaFace.

    Raises:
        ValueError: an unknown body, or anchor sizes that are not two per stride.
    """

    def __init__(
        self,
        body: str = "mobilenet0.25",
        aggregator: bool = True,
        image_size: int = 160,
        anchor_sizes: Sequence[Sequence[int]] = DFA_ANCHOR_SIZES,
        pixel_mean: Sequence[float] = (127.5, 127.5, 127.5),
        pixel_std: float = 127.5,
        negative_slope: float | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        if body == "mobilenet0.25":
            slope = 0.1 if negative_slope is None else negative_slope
            self.body, channels, width = MobileNetBody(slope), MobileNetBody.channels, 64
        elif body == "resnet50":
            slope = 0.0 if negative_slope is None else negative_slope
            self.body, channels, width = _resnet50_body(), (512, 1024, 2048), 256
        else:
            raise ValueError(f'body must be "mobilenet0.25" or "resnet50", got {body!r}')
        if [len(sides) for sides in anchor_sizes] != [ANCHORS_PER_CELL] * len(channels):
            raise ValueError(f"anchor_sizes must be two sides for each of three strides, got {anchor_sizes}")
        self.fpn = FeaturePyramid(channels, width, slope)
        self.ssh1, self.ssh2, self.ssh3 = (ContextModule(width, slope) for _ in channels)
        self.ClassHead = nn.ModuleList(Head(width, 2) for _ in channels)
        self.BboxHead = nn.ModuleList(Head(width, 4) for _ in channels)
        self.LandmarkHead = nn.ModuleList(Head(width, 10) for _ in channels)
        # Not persistent: published weights have none of these.
        self.register_buffer("anchors", make_anchors(image_size, anchor_sizes), persistent=False)
        mean = torch.tensor(pixel_mean, dtype=torch.float32).view(1, 3, 1, 1)
        self.register_buffer("input_shift", (127.5 - mean) / pixel_std, persistent=False)
        self.input_scale = 127.5 / pixel_std
        self.aggregator = None
        if aggregator:
            mixers = [MixerBlock(VALUES_PER_ANCHOR, len(self.anchors)) for _ in range(3)]
            self.aggregator = nn.Sequential(*mixers, nn.Linear(VALUES_PER_ANCHOR, 1))

    def forward(self, images: torch.Tensor) -> NetworkOutput:
        """Read one face a crop.

        Args:
            images: (B, 3, image_size, image_size) float BGR in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images must be (B, 3, {side}, {side}) BGR in [-1, 1], got {tuple(images.shape)}; "
                "DFA pads and resizes crops of any size"
            )
        if self.training or not infers_on_cpu(images):
            return self._look(images)
        # A CPU is quicker with the channels of a pixel side by side, and with what stays in its cache.
        parts = (some.contiguous(memory_format=torch.channels_last) for some in images.split(AT_ONCE))
        return NetworkOutput(*map(torch.cat, zip(*map(self._look, parts), strict=True)))

    def _look(self, images: torch.Tensor) -> NetworkOutput:
        x = torch.add(self.input_shift, images, alpha=self.input_scale)
        levels = self.fpn(self.body(x))
        levels = [self.ssh1(levels[0]), self.ssh2(levels[1]), self.ssh3(levels[2])]
        # Under autocast the heads give 16-bit numbers, in which a coordinate is good to half a pixel only.
        heads = [
            torch.cat([head(level) for head, level in zip(group, levels, strict=True)], 1).to(self.anchors.dtype)
            for group in (self.BboxHead, self.ClassHead, self.LandmarkHead)
        ]
        return NetworkOutput(*heads, *self._read_face(*heads))

    def _read_face(
        self, bbox_regression: torch.Tensor, class_logits: torch.Tensor, landmark_regression: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        boxes = decode_boxes(bbox_regression, self.anchors)
        points = decode_points(landmark_regression, self.anchors)
        values = torch.cat([boxes, class_logits, points], -1)  # (B, A, 16)
        if self.aggregator is None:
            best = (class_logits[..., 1] - class_logits[..., 0]).argmax(1)
            face = values.gather(1, best[:, None, None].expand(-1, 1, VALUES_PER_ANCHOR)).squeeze(1)
        else:
            # (B, A, 1); in 16 bits, a thousand weights would not add up to 1.
            weights = self.aggregator(values).to(values.dtype).softmax(1)
            face = (weights * values).sum(1)  # not a matmul: autocast would round the coordinates
        return face[:, 6:].unflatten(1, (5, 2)), face[:, :4], face[:, 4:6].softmax(1)[:, 1]


def start_from_retinaface(net: RetinaFaceNet, source: str | Path | Mapping[str, torch.Tensor]) -> None:
    """Load the public RetinaFace weights to train from; an aggregator, which they lack, keeps its own.

    They expect the pixels of ``RETINAFACE``. Where ``net`` takes others, the difference moves into the first
    convolution and its BatchNorm, so that the body sees what it was trained on (except for the image's border, where
    the convolution's zero padding is another color now).

    Args:
        net: with the body of the weights.
        source: a file, or a state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes differ.
    """
    state = strip_prefixes(source if isinstance(source, Mapping) else read_state_dict(source))
    load_weights(net, {key: value for key, value in net.state_dict().items() if "aggregator" in key} | state)
    stem = net.body.stage1[0] if isinstance(net.body, MobileNetBody) else (net.body.conv1, net.body.bn1)
    # trained on: pixel - mean = scale * (what the convolution sees now) + shift
    scale = 127.5 / net.input_scale
    mean = net.input_shift.new_tensor(RETINAFACE["pixel_mean"]).view(1, 3, 1, 1)
    shift = 127.5 - mean - scale * net.input_shift
    with torch.no_grad():
        stem[1].running_mean -= (stem[0].weight * shift).sum((1, 2, 3))
        stem[0].weight *= scale


def count_parameters_and_flops(net: nn.Module, inputs: torch.Tensor) -> tuple[int, int]:
    """Parameters of a network and the floating point operations (2 per multiply-add) of one forward pass."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        net(inputs)
    return sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops()


def describe(body: str = "mobilenet0.25") -> dict[str, float]:
    """Size and cost of DFA for one face: ``parameters``, ``gflop``, ``anchors``, ``image_size``."""
    net = RetinaFaceNet(body).eval()
    parameters, flops = count_parameters_and_flops(net, torch.zeros(1, 3, net.image_size, net.image_size))
    return {
        "parameters": parameters,
        "gflop": round(flops / 1e9, 3),
        "anchors": len(net.anchors),
        "image_size": net.image_size,
    }
