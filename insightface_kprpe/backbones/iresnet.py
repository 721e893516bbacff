"""The convolutional networks that InsightFace, AdaFace and CVLface publish weights of: IResNets and MobileFaceNet.

Parameter names, layers and initial weights are those of the published networks: recognition/arcface_torch/backbones
(iresnet.py, mobilefacenet.py) of deepinsight/insightface for :class:`IResNet` and :class:`MobileFaceNet`, net.py of
mk-minchul/AdaFace and models/iresnet of mk-minchul/CVLface for :class:`IRNet`. None of them uses keypoints.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn as nn

from .interface import Backbone, own_half_precision

WIDTHS = (64, 128, 256, 512)  # channels of the four stages
FINAL_SIZE = 7  # pixels per side of the last feature map: 112 halved four times


class ConvolutionalBackbone(Backbone):
    """Base of the networks in this file: convolutions in half precision if requested, the head in float32.

    Args:
        num_features: length of the embedding.
        fp16: run the convolutions under float16 autocast by itself on CUDA, as arcface_torch's networks do.
    """

    img_size = 112

    def __init__(self, num_features: int, fp16: bool) -> None:
        super().__init__()
        self.num_features, self.fp16 = num_features, fp16

    @abstractmethod
    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) float RGB in [-1, 1] -> what goes into the head."""

    @abstractmethod
    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """What :meth:`forward_features` returns -> (B, num_features) embeddings."""

    def forward(self, images: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        """Embed face crops.

        Args:
            images: (B, 3, 112, 112) float RGB in [-1, 1].
            keypoints: ignored: faces must be aligned to the template.

        Returns:
            (B, num_features) float32 embeddings, not normalized.
        """
        with own_half_precision(self.fp16, images):
            features = self.forward_features(images)
        return self.forward_head(features.float() if self.fp16 else features).float()


class IResNet(ConvolutionalBackbone):
    """arcface_torch's r18 to r200.

    Args:
        layers: residual blocks of the four stages.
        widths: channels of the four stages.
        num_features: length of the embedding.
        dropout: share of the head's inputs that are dropped in training.
        fp16: see :class:`ConvolutionalBackbone`.
    """

    def __init__(
        self,
        layers: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = WIDTHS,
        num_features: int = 512,
        dropout: float = 0.0,
        fp16: bool = False,
    ) -> None:
        super().__init__(num_features, fp16)
        self.conv1 = _conv(3, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        inputs = (widths[0], *widths)
        for stage, (count, width) in enumerate(zip(layers, widths, strict=True)):
            first = IResNetBlock(inputs[stage], width, 2)
            rest = (IResNetBlock(width, width, 1) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1] * FINAL_SIZE**2, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) -> (B, 25088): the last feature map, flat."""
        maps = self.prelu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.dropout(self.bn2(maps).flatten(1))

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 25088) -> (B, num_features)."""
        return self.features(self.fc(features))


class IResNetBlock(nn.Module):
    """Two convolutions, the second with the stride, each between normalizations; the shortcut is convolved to fit.

    Args:
        inputs, outputs: channels.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _conv(outputs, outputs, 3, stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, inputs, S, S) -> (B, outputs, S / stride, S / stride)."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        return self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(maps)))))) + shortcut


class IRNet(ConvolutionalBackbone):
    """AdaFace's ir_18 to ir_101, and CVLface's ir18 to ir101, which differ in the color order of their weights.

    Args:
        layers: residual blocks of the four stages.
        bgr: the weights are for BGR, like AdaFace's; images are still passed as RGB.
        widths: channels of the four stages.
        num_features: length of the embedding.
        dropout: share of the head's inputs that are dropped in training.
        fp16: see :class:`ConvolutionalBackbone`.
    """

    def __init__(
        self,
        layers: Sequence[int] = (2, 2, 2, 2),
        bgr: bool = False,
        widths: Sequence[int] = WIDTHS,
        num_features: int = 512,
        dropout: float = 0.4,
        fp16: bool = False,
    ) -> None:
        super().__init__(num_features, fp16)
        self.bgr = bgr
        self.input_layer = nn.Sequential(_conv(3, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0]))
        blocks, inputs = [], widths[0]
        for count, width in zip(layers, widths, strict=True):
            blocks += [IRBlock(width if i else inputs, width, 1 if i else 2) for i in range(count)]
            inputs = width
        self.body = nn.Sequential(*blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(inputs * FINAL_SIZE**2, num_features),
            nn.BatchNorm1d(num_features, affine=False),
        )
        _initialize_by_fan_out(self)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) -> (B, 25088): the last feature map, flat."""
        images = images.flip(1) if self.bgr else images
        return self.output_layer[:3](self.body(self.input_layer(images)))

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 25088) -> (B, num_features)."""
        return self.output_layer[3:](features)


class IRBlock(nn.Module):
    """Like :class:`IResNetBlock`, but a shortcut that keeps its channels is only subsampled.

    Args:
        inputs, outputs: channels.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if stride != 1 else nn.Identity()
        if inputs != outputs:
            self.shortcut_layer = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            _conv(inputs, outputs, 3),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            _conv(outputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, inputs, S, S) -> (B, outputs, S / stride, S / stride)."""
        return self.res_layer(maps) + self.shortcut_layer(maps)


class MobileFaceNet(ConvolutionalBackbone):
    """arcface_torch's mbf.

    Args:
        blocks: depthwise blocks of the three stages after the first.
        scale: channels, in multiples of 64 for the first half and of 128 for the second.
        num_features: length of the embedding.
        fp16: see :class:`ConvolutionalBackbone`.
    """

    def __init__(
        self, blocks: Sequence[int] = (4, 6, 2), scale: int = 2, num_features: int = 512, fp16: bool = False
    ) -> None:
        super().__init__(num_features, fp16)
        narrow, wide, last = 64 * scale, 128 * scale, 512
        self.layers = nn.ModuleList([_conv_block(3, narrow, 3, 2), _conv_block(narrow, narrow, 3, groups=64)])
        # Channels before and after, groups of the block that halves the map, groups of the residual ones.
        for count, (inputs, outputs, halving, groups) in zip(
            blocks, ((narrow, narrow, 128, 128), (narrow, wide, 256, 256), (wide, wide, 512, 256)), strict=True
        ):
            residual = (_depthwise_block(outputs, outputs, groups, 1, Residual) for _ in range(count))
            self.layers += [_depthwise_block(inputs, outputs, halving, 2), Layers(*residual)]
        self.conv_sep = _conv_block(wide, last, 1)
        self.features = Layers(
            Layers(nn.Conv2d(last, last, FINAL_SIZE, groups=last, bias=False), nn.BatchNorm2d(last)),
            nn.Flatten(),
            nn.Linear(last, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )
        _initialize_by_fan_out(self)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 112, 112) -> (B, 256, 7, 7)."""
        for layer in self.layers:
            images = layer(images)
        return images

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 256, 7, 7) -> (B, num_features)."""
        return self.features(self.conv_sep(features))


class Layers(nn.Module):
    """Layers one after the other, whose parameters have ``layers.`` in their names, as MobileFaceNet's."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps through all layers."""
        return self.layers(maps)


class Residual(Layers):
    """:class:`Layers` with a shortcut around them."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps through all layers, added to the maps."""
        return maps + self.layers(maps)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the map, apart from the stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def _conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> Layers:
    return Layers(_conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.PReLU(outputs))


def _depthwise_block(inputs: int, outputs: int, width: int, stride: int, kind: type[Layers] = Layers) -> Layers:
    return kind(
        _conv_block(inputs, width, 1),
        _conv_block(width, width, 3, stride, groups=width),
        Layers(_conv(width, outputs, 1), nn.BatchNorm2d(outputs)),
    )


def _initialize_by_fan_out(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
