"""Host 1: ``register()`` puts this package's classes in place of insightface's; ``unregister()`` undoes it."""

from __future__ import annotations

import copyreg
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import insightface.model_zoo as zoo
from insightface.app import FaceAnalysis
from insightface.app.common import Face
from insightface.model_zoo import model_zoo as zoo_module
from insightface.model_zoo.model_zoo import PickableInferenceSession

from ..packs.layout import ALIGNER_FILE, KEYPOINT_FOLDER, load_note
from ..packs.metadata import DFA_DETECTOR, read_metadata
from ..packs.providers import check_session, settle_providers
from ..packs.routing import stock_get_model
from . import face_analysis
from .aligner import FaceAligner
from .recognizer import KeypointRecognizer

logger = logging.getLogger(__name__)

_SESSION_ARGUMENTS = ("providers", "provider_options", "sess_options")
_stock_get = FaceAnalysis.get


def _get_model(name, **kwargs):
    """The stock ``get_model``, except that our own files get :class:`KeypointRecognizer` and :class:`FaceAligner`.

    It takes two more arguments: ``strict_providers`` (True: a requested but missing execution provider is an error),
    and ``aligned``, of :class:`KeypointRecognizer`.
    """
    aligned, strict = kwargs.pop("aligned", True), kwargs.pop("strict_providers", False)
    kwargs = settle_providers(kwargs, strict)
    path, stock = _file_of(name, kwargs), None
    if path is None:  # a pack's name or folder: let the stock loader find the file
        stock = stock_get_model(name, **kwargs)
        if stock is None:
            return None
        path = Path(stock.model_file)
    ours = _our_model(path, kwargs, aligned)
    model = ours or stock or stock_get_model(name, **kwargs)
    if not aligned and ours is None and getattr(model, "taskname", None) == "recognition":
        raise ValueError(f"aligned=False needs a recognition model with a keypoint input, {name} has none")
    if (session := getattr(model, "session", None)) is not None:
        check_session(session, kwargs.get("providers"), strict)
    return model


def _file_of(name, kwargs: dict[str, Any]) -> Path | None:
    """The ONNX file that ``get_model``'s arguments name directly: by its path, or through a manifest's entry."""
    descriptor = kwargs.get("model_descriptor")
    if descriptor is not None:
        from insightface.model_zoo.package_manifest import verify_model_artifact  # there since insightface 2.0

        return Path(verify_model_artifact(descriptor))
    path = Path(str(name)).expanduser()
    return path if path.suffix == ".onnx" and path.is_file() else None


def _our_model(path: Path, kwargs: dict[str, Any], aligned: bool) -> KeypointRecognizer | FaceAligner | None:
    """A model of this package for a file exported by it; None for others."""
    metadata = read_metadata(path)
    if metadata.get("detector") == DFA_DETECTOR:
        return FaceAligner(str(path), _session(path, kwargs))
    inputs = metadata.get("inputs")
    folder = path.parent / KEYPOINT_FOLDER
    twin = path if inputs == "images+keypoints" else folder / path.name
    if inputs is None or not twin.is_file():
        return None
    aligner = folder / ALIGNER_FILE
    refiner = FaceAligner(str(aligner), _session(aligner, kwargs)) if aligner.is_file() else None
    note = load_note(twin) or f"licence {metadata.get('licence', 'unknown')}"
    logger.info("%s: keypoint-relative recognition from %s (%s)", path.name, twin, note)
    return KeypointRecognizer(str(twin), _session(twin, kwargs), refiner, aligned)


def _session(path: Path, kwargs: dict[str, Any]) -> PickableInferenceSession:
    """An onnxruntime session with those of ``get_model``'s arguments that are meant for it."""
    given = {key: kwargs[key] for key in _SESSION_ARGUMENTS if kwargs.get(key) is not None}
    return PickableInferenceSession(str(path), **given)


def register() -> None:
    """Make ``FaceAnalysis`` and ``insightface.model_zoo`` use the classes of this package for files exported by it.

    A two-input recognition model becomes a :class:`KeypointRecognizer`, a DFA a :class:`FaceAligner`; ``FaceAnalysis``
    takes gray, BGRA and 16-bit images, ``aligned`` and ``strict_providers``, and gets the methods ``get_batch`` and
    ``embed_aligned`` (:mod:`.face_analysis`). ``Face`` can be copied and pickled, and an unpickled ``FaceAnalysis``
    registers itself, so that both can be sent between processes. Other models are loaded as before. Calling it twice is
    harmless; :func:`unregister` undoes it.
    """
    zoo_module.get_model = zoo.get_model = _get_model
    FaceAnalysis.get = functools.wraps(_stock_get)(face_analysis.checked_get(_stock_get))
    FaceAnalysis.get_batch, FaceAnalysis.embed_aligned = face_analysis.get_batch, face_analysis.embed_aligned
    # Face returns None for every attribute that it lacks, including those that copying and pickling look up.
    Face.__reduce_ex__ = _reduce_face
    FaceAnalysis.__reduce_ex__ = _reduce_app
    # Models of a pack with a manifest keep parts of it in read-only dicts, which pickle does not support.
    copyreg.pickle(MappingProxyType, _reduce_read_only_dict)


def unregister() -> None:
    """Restore the stock package; models loaded before keep working."""
    zoo_module.get_model = zoo.get_model = stock_get_model
    FaceAnalysis.get = _stock_get
    copyreg.dispatch_table.pop(MappingProxyType, None)
    added = {FaceAnalysis: ("get_batch", "embed_aligned", "__reduce_ex__"), Face: ("__reduce_ex__",)}
    for owner, names in added.items():
        for name in set(names) & set(vars(owner)):
            delattr(owner, name)


def _reduce_face(face: Face, protocol: int) -> tuple:
    return type(face), (dict(face),)


def _reduce_app(app: FaceAnalysis, protocol: int) -> tuple:
    rebuild, arguments, *rest = object.__reduce_ex__(app, protocol)
    return _rebuild_registered, (rebuild, arguments), *rest


def _rebuild_registered(rebuild: Callable, arguments: tuple) -> FaceAnalysis:
    register()
    return rebuild(*arguments)


def _reduce_read_only_dict(values: MappingProxyType) -> tuple:
    return _read_only_dict, (dict(values),)


def _read_only_dict(values: dict) -> MappingProxyType:
    return MappingProxyType(values)
