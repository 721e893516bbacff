"""IResNets and MobileFaceNet in eval mode, layer by layer in NumPy, from the names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BATCH_NORM_EPS = 1e-5
State = Mapping[str, np.ndarray]


def convolve(maps: np.ndarray, weight: np.ndarray, stride: int = 1, padding: int | None = None) -> np.ndarray:
    """(B, C, H, W) with (O, C / groups, k, k) -> (B, O, H', W'); padding: as much as keeps the size."""
    size = weight.shape[-1]
    padding = size // 2 if padding is None else padding
    maps = np.pad(maps, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(maps, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    groups = maps.shape[1] // weight.shape[1]
    parts = zip(np.split(windows, groups, axis=1), np.split(weight, groups), strict=True)
    return np.concatenate([np.einsum("bchwij,ocij->bohw", part, kernel, optimize=True) for part, kernel in parts], 1)


def normalize(values: np.ndarray, state: State, name: str) -> np.ndarray:
    """Batch normalization of (B, C, ...) by the running statistics, with weight and bias where there are some."""
    shape = (1, -1) + (1,) * (values.ndim - 2)
    mean, variance = (state[f"{name}.running_{key}"].reshape(shape) for key in ("mean", "var"))
    values = (values - mean) / np.sqrt(variance + BATCH_NORM_EPS)
    if f"{name}.weight" not in state:
        return values
    return values * state[f"{name}.weight"].reshape(shape) + state[f"{name}.bias"].reshape(shape)


def prelu(maps: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    return np.where(maps > 0, maps, maps * slopes.reshape(1, -1, 1, 1))


def iresnet(state: State, images: np.ndarray, layers: tuple[int, ...]) -> np.ndarray:
    """arcface_torch's: ``layers`` blocks a stage."""
    maps = prelu(normalize(convolve(images, state["conv1.weight"]), state, "bn1"), state["prelu.weight"])
    for stage, count in enumerate(layers, 1):
        for index in range(count):
            name, stride = f"layer{stage}.{index}", 2 if index == 0 else 1
            shortcut = maps
            if index == 0:
                shortcut = convolve(maps, state[f"{name}.downsample.0.weight"], 2)
                shortcut = normalize(shortcut, state, f"{name}.downsample.1")
            inner = convolve(normalize(maps, state, f"{name}.bn1"), state[f"{name}.conv1.weight"])
            inner = prelu(normalize(inner, state, f"{name}.bn2"), state[f"{name}.prelu.weight"])
            inner = convolve(inner, state[f"{name}.conv2.weight"], stride)
            maps = normalize(inner, state, f"{name}.bn3") + shortcut
    flat = normalize(maps, state, "bn2").reshape(len(maps), -1)
    return normalize(flat @ state["fc.weight"].T + state["fc.bias"], state, "features")


def irnet(state: State, images: np.ndarray, layers: tuple[int, ...]) -> np.ndarray:
    """AdaFace's and CVLface's, on images in the order of colors that its weights are for."""
    maps = convolve(images, state["input_layer.0.weight"])
    maps = prelu(normalize(maps, state, "input_layer.1"), state["input_layer.2.weight"])
    for index in range(sum(layers)):
        name, stride = f"body.{index}", 2 if index in np.cumsum((0, *layers)) else 1
        shortcut = maps[:, :, ::stride, ::stride]
        if f"{name}.shortcut_layer.0.weight" in state:
            shortcut = convolve(maps, state[f"{name}.shortcut_layer.0.weight"], stride)
            shortcut = normalize(shortcut, state, f"{name}.shortcut_layer.1")
        inner = convolve(normalize(maps, state, f"{name}.res_layer.0"), state[f"{name}.res_layer.1.weight"])
        inner = prelu(normalize(inner, state, f"{name}.res_layer.2"), state[f"{name}.res_layer.3.weight"])
        inner = convolve(inner, state[f"{name}.res_layer.4.weight"], stride)
        maps = normalize(inner, state, f"{name}.res_layer.5") + shortcut
    flat = normalize(maps, state, "output_layer.0").reshape(len(maps), -1)
    return normalize(flat @ state["output_layer.3.weight"].T + state["output_layer.3.bias"], state, "output_layer.4")


def mobile_face_net(state: State, images: np.ndarray) -> np.ndarray:
    """arcface_torch's mbf: a group of layers ends in a normalization, and in a PReLU too where it has slopes."""

    def group(maps: np.ndarray, name: str, stride: int = 1, padding: int | None = None) -> np.ndarray:
        maps = convolve(maps, state[f"{name}.layers.0.weight"], stride, padding)
        maps = normalize(maps, state, f"{name}.layers.1")
        slopes = state.get(f"{name}.layers.2.weight")
        return maps if slopes is None else prelu(maps, slopes)

    def depthwise(maps: np.ndarray, name: str, stride: int) -> np.ndarray:
        maps = group(group(maps, f"{name}.layers.0"), f"{name}.layers.1", stride)
        return group(maps, f"{name}.layers.2")

    maps = group(group(images, "layers.0", 2), "layers.1")
    for halving in (2, 4, 6):
        maps = depthwise(maps, f"layers.{halving}", 2)
        residual, index = f"layers.{halving + 1}.layers", 0
        while f"{residual}.{index}.layers.0.layers.0.weight" in state:
            maps = maps + depthwise(maps, f"{residual}.{index}", 1)
            index += 1
    maps = group(group(maps, "conv_sep"), "features.layers.0", padding=0)
    return normalize(maps.reshape(len(maps), -1) @ state["features.layers.2.weight"].T, state, "features.layers.3")
