"""onnxruntime's execution providers: those requested, those available, and a message if they differ."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import onnxruntime


def settle_providers(kwargs: Mapping[str, Any], strict: bool = False) -> dict[str, Any]:
    """Keep only providers that this onnxruntime has, and warn once about missing ones.

    Args:
        kwargs: ``providers``, a list of names or (name, options) pairs, and ``provider_options``, as
            ``onnxruntime.InferenceSession`` takes them, and anything else. Without ``providers``, nothing is requested.
        strict: a missing provider is an error instead of a warning.

    Returns:
        The same arguments with the available providers; the CPU if there are none.

    Raises:
        RuntimeError: ``strict``, and a provider is missing.
    """
    asked = kwargs.get("providers")
    if asked is None:
        return dict(kwargs)
    available = onnxruntime.get_available_providers()
    kept = [i for i, provider in enumerate(asked) if _name(provider) in available]
    missing = [_name(provider) for provider in asked if _name(provider) not in available]
    if missing:
        remedy = (
            "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
            if "CUDAExecutionProvider" in missing
            else "see insightface-kprpe doctor"
        )
        _complain(
            f"{', '.join(missing)} requested, but this onnxruntime {onnxruntime.__version__} has only "
            f"{', '.join(available)} ({remedy})",
            strict,
        )
    result = dict(kwargs, providers=[asked[i] for i in kept] or ["CPUExecutionProvider"])
    if (options := kwargs.get("provider_options")) is not None:
        result["provider_options"] = [options[i] for i in kept] or [{}]
    return result


def check_session(session: onnxruntime.InferenceSession, asked: list | None, strict: bool = False) -> None:
    """Warn once if a session runs without a requested provider that onnxruntime claims to have.

    Args:
        session: as created.
        asked: ``providers`` it was created with.
        strict: as in :func:`settle_providers`.

    Raises:
        RuntimeError: ``strict``, and the session lacks a provider.
    """
    missing = [_name(provider) for provider in asked or () if _name(provider) not in session.get_providers()]
    if missing:
        _complain(
            f"{', '.join(missing)} requested, but could not be started; {', '.join(session.get_providers())} "
            "is used instead (libraries or driver missing? see insightface-kprpe doctor)",
            strict,
        )


def _name(provider: str | tuple) -> str:
    return provider if isinstance(provider, str) else str(provider[0])


def _complain(message: str, strict: bool) -> None:
    if strict:
        raise RuntimeError(message)
    _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
