"""The registered networks side by side: family, size, cost, speed on this machine, and which weights each loads."""

from __future__ import annotations

import fnmatch
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..backbones import Backbone, VisionTransformer, get_model, list_models
from ..backbones.attention_terms import eval_mode
from ..backbones.iresnet import IResNet, IRNet
from ..backbones.relative_position import template_keypoints
from ..backbones.vit_with_dfa import weights_follow
from ..training.memory import forward_flops

_POSITIONS = {None: "ViT", "irpe": "ViT, iRPE", "kprpe": "ViT, KPRPE"}
# Who publishes weights of a network, by its name's pattern; the first that fits. LVFace's networks are arcface_torch's.
_PUBLISHERS = (
    ("vit_t_dp005_mask0", "arcface_torch; LVFace-T"),
    ("vit_s_dp005_mask_0", "arcface_torch; LVFace-S"),
    ("vit_b_dp005_mask_005", "arcface_torch; LVFace-B"),
    ("vit_l_dp005_mask_005", "arcface_torch; LVFace-L"),
    ("vit_[tsblh]", "arcface_torch"),
    ("cvlface_*_dfa", "CVLface; its DFA as dfa_weights"),
    ("cvlface_*", "CVLface"),
    ("ir_*", "AdaFace (for BGR)"),
    ("r18", "arcface_torch; CVLface (iresnet_insightface)"),
    ("r50", "arcface_torch; CVLface (iresnet_insightface)"),
    ("r100", "arcface_torch; CVLface (iresnet_insightface)"),
    ("r34", "arcface_torch"),
    ("r200", "arcface_torch"),
    ("mbf", "arcface_torch"),
)
_RUNS = 5  # timed batches, after a warm-up


@dataclass(frozen=True)
class NetworkFacts:
    """One row of the table.

    Attributes:
        name: for ``get_model``.
        family: what kind of network it is.
        parameters: how many, the aligner's included.
        flops: of one image, the aligner's included; a multiply-add counts as two.
        weights: who publishes some; "" for nobody.
    """

    name: str
    family: str
    parameters: int
    flops: int
    weights: str


def choose_networks(patterns: Sequence[str]) -> list[str]:
    """Registered names that fit one of the patterns ("r*"), or all where there is no pattern.

    Raises:
        ValueError: a pattern fits no name.
    """
    names = list_models()
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            get_model(pattern)  # its error names the closest names
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def describe_network(name: str) -> NetworkFacts:
    """Family, size and cost of a registered network; no memory is allocated for its weights."""

    def build() -> Backbone:
        with weights_follow():
            return get_model(name)

    with torch.device("meta"):
        net = build()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    weights = next((who for pattern, who in _PUBLISHERS if fnmatch.fnmatchcase(name, pattern)), "")
    return NetworkFacts(name, _family(net), parameters, forward_flops(build), weights)


def _family(net: Backbone) -> str:
    if isinstance(net, VisionTransformer):
        return _POSITIONS[net.position] + (", DFA" if net.finds_keypoints else "")
    if isinstance(net, IResNet | IRNet):
        return "IResNet, BGR" if net.bgr else "IResNet"
    return type(net).__name__


def images_per_second(name: str, batch_size: int = 8, clock: Callable[[], float] = time.perf_counter) -> float:
    """How many crops a network with random weights embeds on this machine (on the GPU where there is one), in float32.

    Args:
        name: of the network.
        batch_size: crops per forward pass.
        clock: seconds; for tests.

    Returns:
        From the median of five batches, after a warm-up.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with weights_follow():
        net = get_model(name).to(device)
    images = torch.rand(batch_size, 3, net.img_size, net.img_size, device=device) * 2 - 1
    keypoints = None if net.finds_keypoints else template_keypoints(batch_size).to(device)
    seconds = []
    with torch.inference_mode(), eval_mode(net):
        for _ in range(1 + _RUNS):
            start = clock()
            net(images, keypoints)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    return batch_size / statistics.median(seconds[1:])


def table_rows(names: Sequence[str], speed: bool = False) -> Iterator[str]:
    """The table as lines of text, yielded as they are computed.

    Args:
        names: registered ones.
        speed: with a column of images per second.
    """
    width = max((len(name) for name in names), default=0)
    column = f"{'images/s':>10}" if speed else ""
    yield f"{'network':<{width}}  {'family':<16}{'parameters':>13}{'GFLOPs':>9}{column}  published weights"
    for name in names:
        facts = describe_network(name)
        column = f"{images_per_second(name):>10.1f}" if speed else ""
        yield (
            f"{name:<{width}}  {facts.family:<16}{facts.parameters:>13,}{facts.flops / 1e9:>9.2f}{column}  "
            f"{facts.weights or '-'}"
        )
