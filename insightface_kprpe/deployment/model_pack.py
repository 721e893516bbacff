"""Builds model packs: folders of ONNX files that the stock ``insightface`` loads by name; see :mod:`..packs.layout`.

Files of this package describe themselves in their metadata, of which ``pack.json`` is a human-readable copy.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..backbones import Backbone
from ..data.verification_pairs import VerificationPairs, check_pairs, open_verification
from ..packs.layout import ALIGNER, DETECTION, KEYPOINT_RECOGNITION, RECOGNITION, PackError
from ..packs.metadata import add_metadata, read_metadata
from .detector_export import export_detector
from .image_only import write_image_only
from .onnx_export import check_exportable, export_onnx
from .pack_files import check_detector, check_folder, check_recognition, copy_whole, install
from .pack_sources import FoundFile, LoadedNetwork, find_detector, find_extras, open_aligner, open_recognition
from .precision import Measurement, PackPrecision, check_precision, lower_precision, measure

logger = logging.getLogger(__name__)

DFA_AS_DETECTOR = "dfa"


def build(
    *,
    recognition: Backbone | str | Path,
    detector: str | Path,
    aligner: str | Path | None = None,
    name: str = "kprpe",
    root: str | Path = "~/.insightface",
    precision: PackPrecision = "fp32",
    evaluate: str | Path | None = None,
    extra_tasks: Collection[str] = (),
    extra_pack: str | Path | None = None,
    licence: str | None = None,
    detector_licence: str | None = None,
    network: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
) -> Path:
    """Build a pack for ``FaceAnalysis(name=NAME, root=ROOT)``, and check it as a user would load it.

    Everything that can fail early does so before the slow exports. Steps and their times are logged.

    Args:
        recognition: a network; what :func:`~insightface_kprpe.weights.sources.load_published` loads; or an ONNX file:
            of this package, with or without keypoints, or any other ArcFace model.
        detector: an ONNX file in SCRFD's layout with landmarks; a folder with one; the name of an InsightFace pack,
            which InsightFace's own downloader fetches if it is not installed; or "dfa": the aligner, for images
            of one face.
        aligner: a DFA, by an exported ONNX file or by what ``load_published`` loads; it refines the landmarks for users
            of ``register()``. None: the network's built-in one, if any.
        name: of the pack.
        root: InsightFace's root folder; the pack goes to ``root/models/name``, replacing one of that name.
        precision: of the recognition files, see :func:`~insightface_kprpe.deployment.precision.lower_precision`.
        evaluate: verification set (.bin) to measure them on, without flip; None: no thresholds.
        extra_tasks: models to include from ``extra_pack``, see :func:`~.pack_sources.find_extras`.
        extra_pack: name of an InsightFace pack, or a folder.
        licence: of the recognition weights; None: what their source says.
        detector_licence: None: what its source says.
        network: name of the backbone, if the weights do not determine it.
        cache: where downloads from the Hub are kept.
        offline: download nothing.

    Returns:
        The pack's folder.

    Raises:
        PackError: a part does not fit, or InsightFace would load it as something else; nothing was published.
        PrecisionError: a lower precision changes too much.
        FileNotFoundError, ImportError, RuntimeError, ValueError: see ``load_published``, ``export_onnx``.
    """
    check_precision(precision)
    folder = check_folder(name, root)
    if bool(extra_tasks) != (extra_pack is not None):
        raise PackError(
            "extra_tasks (--with) and extra_pack (--from) go together: which models to include, and from which pack"
        )
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        with _step("checking the detector, the verification set and other inputs"):
            pairs = None if evaluate is None else _open_pairs(evaluate)
            extras = find_extras(extra_tasks, extra_pack, root, offline) if extra_pack is not None else {}
            found = None if detector == DFA_AS_DETECTOR else find_detector(detector, root, offline, detector_licence)
            if found is not None:
                check_detector(found.path)
        with _step(f"loading {recognition if isinstance(recognition, str | Path) else type(recognition).__name__}"):
            source = open_recognition(recognition, network, cache, offline, licence)
            with_keypoints = _check_recognition(source, precision)
            finder = _aligner_of(source, aligner, detector, with_keypoints, cache, offline)
        files = _recognition_files(source, with_keypoints, scratch, precision, pairs)
        if isinstance(finder, LoadedNetwork):
            with _step("exporting the aligner and comparing it with torch"):
                finder = _export_aligner(finder, scratch / "dfa.onnx")
        if detector == DFA_AS_DETECTOR:
            files[DETECTION] = FoundFile(finder.path, "the aligner", detector_licence or finder.licence)
        else:
            files[DETECTION] = found
            files |= {} if finder is None else {ALIGNER: finder}
        with _step(f"testing every file as InsightFace loads it, and installing them as {folder}"):
            return install(name, folder, files | extras)


@contextmanager
def _step(title: str) -> Iterator[None]:
    """Log what is being done, and how long it took."""
    logger.info(title)
    started = time.perf_counter()
    yield
    logger.info("  %.0f s", time.perf_counter() - started)


def _open_pairs(evaluate: str | Path) -> VerificationPairs:
    """A verification set, after reading every image of it."""
    if Path(evaluate).suffix != ".bin" or not Path(evaluate).is_file():
        raise PackError(f"evaluate must be an existing verification set (a .bin file), got {evaluate}")
    pairs = open_verification(str(evaluate))
    try:
        check_pairs(pairs)
    except ValueError as error:
        raise PackError(f"evaluate {evaluate}: {error}; choose another set") from error
    return pairs


def _check_recognition(source: LoadedNetwork | FoundFile, precision: PackPrecision) -> bool:
    """Refuse what cannot be exported or installed; returns whether there will be a version with keypoints."""
    if isinstance(source, FoundFile):
        already = read_metadata(source.path).get("precision", "fp32")
        if precision != "fp32" and already != "fp32":
            raise PackError(f"precision must be fp32 for {source.path}, which is already {already}; give the fp32 file")
        return check_recognition(source.path)
    check_exportable(source.net)
    return source.net.needs_keypoints


def _aligner_of(
    source: LoadedNetwork | FoundFile,
    aligner: str | Path | None,
    detector: str | Path,
    with_keypoints: bool,
    cache: str | Path | None,
    offline: bool,
) -> LoadedNetwork | FoundFile | None:
    """The requested aligner, or the network's built-in one."""
    as_detector = detector == DFA_AS_DETECTOR
    if aligner is not None:
        if not with_keypoints and not as_detector:
            raise PackError("aligner refines keypoints, which this recognition model does not take; leave it out")
        return open_aligner(aligner, cache, offline)
    if isinstance(source, LoadedNetwork) and source.net.finds_keypoints:
        facts = {key: value for key, value in source.facts.items() if key != "architecture"}
        return LoadedNetwork(source.net.dfa, facts, source.licence)
    if as_detector:
        raise PackError("detector dfa needs a DFA: give one with --aligner, or use a network with a built-in DFA")
    return None


def _export_aligner(aligner: LoadedNetwork, path: Path) -> FoundFile:
    export_detector(aligner.net, path, aligner.licence)
    add_metadata(path, aligner.facts)
    return FoundFile(path, "the network", aligner.licence)


def _recognition_files(
    source: LoadedNetwork | FoundFile,
    with_keypoints: bool,
    scratch: Path,
    precision: PackPrecision,
    pairs: VerificationPairs | None,
) -> dict[str, FoundFile]:
    """The versions of the recognition model that a pack holds; the network is exported once."""
    first = scratch / "recognition.onnx"
    if isinstance(source, LoadedNetwork):
        with _step(f"exporting the network{' with its keypoints' * with_keypoints} and comparing it with torch"):
            export_onnx(source.net, first, licence=source.licence, metadata=source.facts)
        origin = "the network"
    else:
        copy_whole(source.path, first)
        origin = source.source
    files = {KEYPOINT_RECOGNITION if with_keypoints else RECOGNITION: FoundFile(first, origin, source.licence)}
    known: dict[Path, Measurement] = {}
    if precision != "fp32":
        measured_on = pairs.name if pairs else "drawn pairs"
        with _step(f"converting it to {precision} and comparing it with fp32 on {measured_on}"):
            change, known[first] = lower_precision(first, first, precision, pairs)
        facts = {"precision": precision, "change": json.dumps(change.in_percent()), "evaluation": None}
        add_metadata(first, facts)
    if with_keypoints:
        second = scratch / "image_only.onnx"
        with _step("deriving the version without keypoints and comparing it with the one with keypoints"):
            net = source.net if isinstance(source, LoadedNetwork) and source.net.finds_keypoints else None
            write_image_only(first, second, net)
        files[RECOGNITION] = FoundFile(second, origin, source.licence)
    if pairs is not None:
        for found in files.values():
            with _step(f"evaluating {found.path.name} on {pairs.name} ({len(pairs.is_same)} pairs)"):
                measured = known.get(found.path) or measure(found.path, pairs)
                add_metadata(found.path, {"evaluation": _evaluation(measured, pairs)})
    return files


def _evaluation(measured: Measurement, pairs: VerificationPairs) -> str:
    """A file's results on a verification set, for JSON."""
    found = {"set": pairs.name, "pairs": len(pairs.is_same), "keypoints": pairs.keypoint_source}
    return json.dumps(found | {"accuracy": 100 * measured.accuracy, "thresholds": measured.thresholds})
