"""ONNX recognition files in half precision or with 8-bit weights, checked by verification.

Inputs and outputs stay float32, so that every host uses the smaller file like the large one.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx

from ..data.synthetic import verification_pairs
from ..data.verification_pairs import FIRST_UNSEEN_IDENTITY, VerificationPairs
from ..evaluation.metrics import kfold_accuracy, tpr_at_fpr, unit_rows
from ..files import atomic_path
from ..inference.embedding import embed_images
from ..inference.models import OnnxEmbedder
from ..packs.metadata import load_onnx, save_onnx

logger = logging.getLogger(__name__)

PackPrecision = Literal["fp32", "fp16", "int8"]
MINIMAL_COSINE = {"fp16": 0.999, "int8": 0.98}  # of every face, to its float32 embedding
MAXIMAL_DROP = 0.01  # of verification accuracy
_CHANCE = 3  # pairs whose change on a small set is not significant
FPRS = (1e-3, 1e-4, 1e-5)
_COORDINATES = 10
_DRAWN_PEOPLE, _DRAWN_PAIRS = 20, 40


def check_precision(precision: str) -> None:
    """Refuse an unknown precision before anything takes time."""
    if precision != "fp32" and precision not in MINIMAL_COSINE:
        raise ValueError(f"precision must be fp32, fp16 or int8, got {precision!r}")


class NotFiniteError(ValueError):
    """A recognition file's embeddings hold NaN or infinity."""


class PrecisionError(ValueError):
    """A file of lower precision is too far from the float32 one; nothing was written."""


class Measurement(NamedTuple):
    """A file's results on pairs of faces, embedded without flip, as FaceAnalysis does."""

    embeddings: np.ndarray  # (2P, D)
    accuracy: float  # in [0, 1], mean of ten folds
    thresholds: dict[
        float, float
    ]  # FPR -> cosine at or above which two faces are the same person; only FPRs that P pairs can resolve


class PrecisionChange(NamedTuple):
    """Differences made by a lower precision."""

    minimal_cosine: float  # to the float32 embedding, of the worst face
    mean_cosine: float
    accuracy_fp32: float  # in [0, 1]
    accuracy: float  # in [0, 1]
    pairs: str  # on which it was measured

    def in_percent(self) -> dict[str, Any]:
        """The same as stored in files, accuracies in percent."""
        return self._asdict() | {key: 100 * getattr(self, key) for key in ("accuracy_fp32", "accuracy")}


def measure(path: str | Path, pairs: VerificationPairs) -> Measurement:
    """Embed pairs with a recognition file and verify them.

    Args:
        path: ONNX file, of one or two inputs.
        pairs: what to verify.

    Raises:
        ValueError: an embedding is not finite.
    """
    embeddings = embed_images(OnnxEmbedder(path), pairs.images, pairs.keypoints, flip=False, label=pairs.name)
    bad = int((~np.isfinite(embeddings).all(1)).sum())
    if bad:
        raise NotFiniteError(f"{bad} of {len(embeddings)} embeddings of {pairs.name} are not finite")
    first, second = embeddings[0::2], embeddings[1::2]
    scores = (unit_rows(first) * unit_rows(second)).sum(1)
    negatives = int((~pairs.is_same).sum())
    fprs = [fpr for fpr in FPRS if fpr * negatives >= 1]
    points = tpr_at_fpr(scores, pairs.is_same, fprs) if fprs else []
    thresholds = {point.target: float(point.threshold) for point in points}
    return Measurement(embeddings, kfold_accuracy(first, second, pairs.is_same).accuracy, thresholds)


def drawn_pairs() -> VerificationPairs:
    """A few pairs of drawn faces, for use without a verification set."""
    drawn = verification_pairs(_DRAWN_PEOPLE, _DRAWN_PAIRS, first_identity=FIRST_UNSEEN_IDENTITY)
    images, is_same, keypoints = drawn
    return VerificationPairs(f"{_DRAWN_PAIRS} drawn pairs", images, keypoints, is_same, "as drawn")


def lower_precision(
    source: str | Path, target: str | Path, precision: PackPrecision, pairs: VerificationPairs | None = None
) -> tuple[PrecisionChange, Measurement]:
    """Write a recognition file in a lower precision, if it still tells people apart as well as the float32 file.

    Args:
        source: float32 ONNX file with one or two inputs.
        target: file to write; may be ``source``.
        precision: "fp16": weights and arithmetic in half precision; "int8": 8-bit weights of all matrix products,
            whose activations are quantized dynamically. The map from keypoints to attention stays float32.
        pairs: to compare the two on; None: drawn ones.

    Returns:
        What changed, and the new file's measurement.

    Raises:
        ValueError: another precision.
        PrecisionError: a face's cosine to its float32 embedding, or the accuracy, falls too far.
    """
    if precision not in MINIMAL_COSINE:
        raise ValueError(f"precision must be fp16 or int8 to lower it, got {precision!r}")
    pairs = pairs or drawn_pairs()
    before = measure(source, pairs)
    with atomic_path(target) as temporary:
        _write(precision, Path(source), temporary)
        try:
            after = measure(temporary, pairs)
        except NotFiniteError as error:
            other = "int8, whose arithmetic keeps float32's range, or fp32" if precision == "fp16" else "fp16 or fp32"
            raise PrecisionError(
                f"{Path(source).name} in {precision}: {error}; its values overflow in this precision; use {other}"
            ) from error
        change = _compare(before, after, pairs)
        _check(change, precision, len(pairs.is_same), Path(source).name)
    logger.info("%s: %s", precision, format_change(change.in_percent()))
    return change, after


def format_change(change: dict[str, Any]) -> str:
    """:meth:`PrecisionChange.in_percent` as one line of text."""
    return (
        f"cosine to fp32 at least {change['minimal_cosine']:.5f}, mean {change['mean_cosine']:.5f}; accuracy "
        f"{change['accuracy_fp32']:.2f} % -> {change['accuracy']:.2f} % on {change['pairs']}"
    )


def _compare(before: Measurement, after: Measurement, pairs: VerificationPairs) -> PrecisionChange:
    cosines = (unit_rows(before.embeddings) * unit_rows(after.embeddings)).sum(1)
    return PrecisionChange(float(cosines.min()), float(cosines.mean()), before.accuracy, after.accuracy, pairs.name)


def _check(change: PrecisionChange, precision: str, count: int, name: str) -> None:
    allowed = max(MAXIMAL_DROP, _CHANCE / count)
    if change.minimal_cosine >= MINIMAL_COSINE[precision] and change.accuracy >= change.accuracy_fp32 - allowed:
        return
    raise PrecisionError(
        f"{name} in {precision}: {format_change(change.in_percent())}; at least cosine {MINIMAL_COSINE[precision]} and "
        f"no more than {100 * allowed:.1f} points less accuracy are required; use a higher precision"
    )


def _write(precision: str, source: Path, target: Path) -> None:
    """Write the file, if the installed converters can: those of its time cannot read what an old exporter writes."""
    import onnxruntime

    try:
        WRITERS[precision](source, target)
        onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own
        reason = str(error).splitlines()[0]
        raise PrecisionError(
            f"{source.name} in {precision}: the installed torch and onnxruntime do not produce a valid file "
            f"({reason}); update "
            "them and export again, or use fp32"
        ) from error


def _write_half(source: Path, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = load_onnx(source, weights=True)
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=_keypoint_nodes(model))
    save_onnx(half, target)


def _write_int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        shaped = Path(folder) / "shaped.onnx"
        quant_pre_process(str(source), str(shaped), skip_optimization=True, skip_symbolic_shape=True)
        quantize_dynamic(
            str(shaped),
            str(target),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_keypoint_nodes(load_onnx(shaped, weights=True)),
        )
    save_onnx(load_onnx(target, weights=True), target)


def _keypoint_nodes(model: onnx.ModelProto) -> list[str]:
    """The few nodes from keypoints to attention biases: small, and precise to a fraction of a pixel only in float32.

    They are identified by their weights, one dimension of which is the coordinates of up to five keypoints.
    """
    small = {w.name for w in model.graph.initializer if len(w.dims) == 2 and min(w.dims) <= _COORDINATES}
    return [node.name for node in model.graph.node if any(name in small for name in node.input)]


WRITERS = {"fp16": _write_half, "int8": _write_int8}
