"""How the stock ``insightface.model_zoo`` loads an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from insightface.model_zoo import model_zoo as zoo_module

stock_get_model = zoo_module.get_model


class Route(NamedTuple):
    """How the stock model zoo loads an ONNX file."""

    task: str | None  # "detection", "recognition", ...; None: the file is ignored
    kind: str  # name of insightface's class
    input_mean: float
    input_std: float
    outputs: int


def stock_model(path: str | Path):
    """How the stock ``insightface.model_zoo`` loads an ONNX file, on the CPU; None if it ignores it.

    Raises:
        ValueError: onnxruntime does not load it.
    """
    try:
        return stock_get_model(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's, protobuf's and insightface's own types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} could not be loaded by onnxruntime ({reason}); copy or export it again") from error


def stock_route(path: str | Path) -> Route:
    """Load a file through the stock ``insightface.model_zoo`` and return what it was loaded as."""
    model = stock_model(path)
    if model is None:
        return Route(None, "nothing", 0.0, 0.0, 0)
    return Route(
        model.taskname, type(model).__name__, model.input_mean, model.input_std, len(model.session.get_outputs())
    )
