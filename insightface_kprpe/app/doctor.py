"""Checks of the installation. Each problem comes with the command that fixes it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from .doctor_packs import examine_packs
from .findings import BROKEN, OK, WARNING, Finding

_PACKAGE = "insightface-kprpe"
# Distributions that install into the same folder: of two, the one installed last wins, file by file.
_ONNXRUNTIMES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm",
)  # fmt: skip
_OPENCVS = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless",
)  # fmt: skip
_GPU_ONNXRUNTIME = (
    # Without --no-deps, pip would reinstall the plain one, which insightface requires.
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps onnxruntime-gpu"
)


def examine(root: str | Path = "~/.insightface") -> list[Finding]:
    """Everything: packages, devices, and the packs under ``root/models``."""
    python = sys.version.split()[0]
    findings = [Finding("python", OK, f"{python} at {sys.executable}")]
    findings += check_requirements()
    findings += [check_torch(), check_numpy(), check_torchvision()]
    findings += [check_onnxruntime(), check_opencv(), check_insightface()]
    if findings[-1].status == BROKEN:
        return [*findings, Finding("packs", WARNING, "not checked: insightface does not load")]
    return findings + examine_packs(Path(root).expanduser())


def format_findings(findings: Sequence[Finding]) -> str:
    """Findings as text."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.name:<16} {finding.found}")
        if finding.fix:
            lines.append(f"{'':<25} fix: {finding.fix}")
    counts = {status: sum(finding.status == status for finding in findings) for status in (BROKEN, WARNING)}
    lines.append(f"{counts[BROKEN]} broken, {counts[WARNING]} warnings")
    return "\n".join(lines)


def installed(names: Sequence[str]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_requirements() -> Iterator[Finding]:
    """Requirements of this package that are missing or too old."""
    try:
        wanted = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(_PACKAGE, WARNING, "is used without being installed", "pip install -e .")
        return
    requirements = [Requirement(line) for line in wanted]
    asked = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong = 0
    for item in asked:
        stand_ins = {"onnxruntime": _ONNXRUNTIMES, "opencv-python": _OPENCVS}.get(item.name, (item.name,))
        versions = installed(stand_ins)
        if not any(item.specifier.contains(version, prereleases=True) for version in versions.values()):
            wrong += 1
            have = ", ".join(f"{name} {version}" for name, version in versions.items()) or "not installed"
            yield Finding(item.name, BROKEN, f"{have}, needed {item.specifier}", f'pip install "{item}"')
    if not wrong:
        version = importlib.metadata.version(_PACKAGE)
        yield Finding(_PACKAGE, OK, f"{version}, all required packages are new enough")


def check_torch() -> Finding:
    """The torch version, and whether it sees the machine's GPU."""
    import torch

    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda}: {devices}")
    if not _has_nvidia():
        return Finding("torch", OK, f"{torch.__version__}, on the CPU: the machine has no NVIDIA driver")
    if torch.version.cuda is None:
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
        return Finding("torch", WARNING, f"{torch.__version__} is built without CUDA, but there is an NVIDIA GPU", fix)
    found = (
        f"{torch.__version__} for CUDA {torch.version.cuda} cannot use the NVIDIA GPU: driver too old, or GPU hidden"
    )
    return Finding("torch", WARNING, found, "nvidia-smi && echo CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")


def check_numpy() -> Finding:
    """Whether torch was built for this NumPy."""
    import numpy as np
    import torch

    try:
        torch.from_numpy(np.zeros(1)).numpy()
    except Exception as error:  # RuntimeError or TypeError, by version
        return Finding(
            "numpy", BROKEN, f"{np.__version__} is not compatible with torch ({error})", 'pip install "numpy<2"'
        )
    return Finding("numpy", OK, np.__version__)


def check_torchvision() -> Finding:
    """Whether torchvision, which timm imports, is built for the same device and version as torch."""
    import torch

    versions = installed(["torchvision"])
    if not versions:
        return Finding("torchvision", OK, "not installed")
    version = versions["torchvision"]
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return Finding("torchvision", OK, version)
    reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
    build = torch.__version__.partition("+")[2]
    index = f" --index-url https://download.pytorch.org/whl/{build}" if re.fullmatch(r"cpu|cu\d+|rocm.+", build) else ""
    found = f"{version} does not load with torch {torch.__version__} ({reason}); worked around in this package"
    return Finding("torchvision", WARNING, found, f"pip install --force-reinstall --no-deps torchvision{index}")


def check_onnxruntime() -> Finding:
    """Clashing distributions, and whether sessions run on the GPU that torch has."""
    import torch

    found = installed(_ONNXRUNTIMES)
    names = " and ".join(f"{name} {version}" for name, version in found.items())
    gpu = torch.cuda.is_available() or _has_nvidia()
    plain = "pip uninstall -y " + " ".join(found or ["onnxruntime"]) + " && pip install onnxruntime"
    if len(found) > 1:
        return Finding("onnxruntime", BROKEN, f"{names} overwrite each other", _GPU_ONNXRUNTIME if gpu else plain)
    try:
        ort = importlib.import_module("onnxruntime")
        providers = ort.get_available_providers()
    except Exception as error:  # ImportError of a library, or an empty folder left by two clashing packages
        fix = _GPU_ONNXRUNTIME if gpu else plain
        return Finding("onnxruntime", BROKEN, f"{names or 'none'} does not load ({error})", fix)
    shown = f"{names}, {', '.join(providers)}"
    if gpu and "CUDAExecutionProvider" not in providers:
        return Finding("onnxruntime", WARNING, f"{shown}: no CUDA, but there is an NVIDIA GPU", _GPU_ONNXRUNTIME)
    if "CUDAExecutionProvider" in providers and not _starts("CUDAExecutionProvider"):
        fix = "pip install nvidia-cudnn-cu12 nvidia-cublas-cu12 nvidia-cufft-cu12 nvidia-curand-cu12"
        if not gpu:
            return Finding("onnxruntime", OK, f"{shown}; on the CPU: the machine has no NVIDIA driver")
        return Finding("onnxruntime", WARNING, f"{shown}, but CUDA does not start: libraries are missing", fix)
    return Finding("onnxruntime", OK, shown)


def check_opencv() -> Finding:
    """Clashing distributions, and one that does not load."""
    found = installed(_OPENCVS)
    names = " and ".join(f"{name} {version}" for name, version in found.items()) or "none"
    try:
        loaded = importlib.import_module("cv2").__version__
    except Exception as error:  # most often libGL, which headless machines lack
        fix = f"pip uninstall -y {' '.join(found) or 'opencv-python'} && pip install opencv-python-headless"
        return Finding("opencv", BROKEN, f"{names} does not load ({error})", fix)
    if len(found) > 1:
        fix = f"pip uninstall -y {' '.join(found)} && pip install opencv-python"
        return Finding("opencv", WARNING, f"{names} overwrite each other, {loaded} is loaded", fix)
    return Finding("opencv", OK, names)


def check_insightface() -> Finding:
    """Whether the host loads and accepts our classes."""
    version = installed(["insightface"]).get("insightface", "not installed")
    try:
        importlib.import_module("insightface.app")
        importlib.import_module("insightface_kprpe.app.recognizer")
    except Exception as error:
        return Finding("insightface", BROKEN, f"{version} does not load ({error})", "pip install -U insightface")
    return Finding("insightface", OK, f"{version}, compatible with register()")


def _has_nvidia() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def _starts(provider: str) -> bool:
    """Whether a session really runs on a provider."""
    import onnxruntime
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    return provider in session.get_providers()
