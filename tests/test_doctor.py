import json
import sys
from types import SimpleNamespace

import onnx
import pytest
import tiny_packs as tiny
import torch
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app import doctor, doctor_packs
from insightface_kprpe.app.findings import BROKEN, OK, WARNING, Finding
from insightface_kprpe.deployment import installed_packs, model_pack


@pytest.fixture
def versions(monkeypatch):
    """Which distributions are installed, as the test says."""
    fake = {}

    def version(name):
        if name not in fake:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return fake[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    return fake


def on_a_gpu(monkeypatch, torch_too=False):
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_too)


def test_requirements_that_are_missing_or_old(versions, monkeypatch):
    wanted = ["torch>=2.6", "onnxruntime>=1.20", "opencv-python>=4.9", "typer>=0.12", 'pytest>=8; extra == "test"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    versions |= {"torch": "2.5.1", "onnxruntime-gpu": "1.22", "opencv-python-headless": "4.10.0"}
    assert list(doctor.check_requirements()) == [
        Finding("torch", BROKEN, "torch 2.5.1, needed >=2.6", 'pip install "torch>=2.6"'),
        Finding("typer", BROKEN, "not installed, needed >=0.12", 'pip install "typer>=0.12"'),
    ]
    versions |= {"torch": "2.7.0+cu126", "typer": "0.15", "insightface-kprpe": "9"}
    assert list(doctor.check_requirements()) == [
        Finding("insightface-kprpe", OK, "9, all required packages are new enough")
    ]


def test_two_onnxruntimes_clash(versions, monkeypatch):
    versions |= {"onnxruntime": "1.22", "onnxruntime-gpu": "1.21"}
    finding = doctor.check_onnxruntime()
    assert finding.status == BROKEN and "onnxruntime 1.22 and onnxruntime-gpu 1.21 overwrite" in finding.found
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime"
    on_a_gpu(monkeypatch)
    assert doctor.check_onnxruntime().fix.endswith("pip install --no-deps onnxruntime-gpu")


@pytest.mark.parametrize(
    ("providers", "starts", "gpu", "status", "found"),
    [
        (["CPUExecutionProvider"], False, False, OK, "onnxruntime 1.22, CPUExecutionProvider"),
        (["CPUExecutionProvider"], False, True, WARNING, "no CUDA, but there is an NVIDIA GPU"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, True, WARNING, "CUDA does not start"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, False, OK, "the machine has no NVIDIA driver"),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], True, True, OK, "CUDAExecutionProvider"),
    ],
)
def test_where_onnxruntime_runs(versions, monkeypatch, providers, starts, gpu, status, found):
    versions["onnxruntime"] = "1.22"
    fake = SimpleNamespace(get_available_providers=lambda: providers)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(doctor, "_starts", lambda provider: starts)
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: gpu)
    finding = doctor.check_onnxruntime()
    assert finding.status == status and found in finding.found and bool(finding.fix) == (status != OK)


def test_an_onnxruntime_that_does_not_load(versions, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())  # what two uninstalled ones leave
    finding = doctor.check_onnxruntime()
    assert finding.status == BROKEN and finding.found.startswith("none does not load")
    assert finding.fix.endswith("pip install onnxruntime")


def test_sessions_start_where_they_can():
    assert doctor._starts("CPUExecutionProvider")


def test_torch_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_has_nvidia", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.check_torch().status == OK
    on_a_gpu(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "whl/cu126" in doctor.check_torch().fix
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "cannot use the NVIDIA GPU" in doctor.check_torch().found
    on_a_gpu(monkeypatch, torch_too=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA T4")
    assert doctor.check_torch().found.endswith("CUDA 12.6: NVIDIA T4")


@pytest.mark.parametrize(
    ("torch_version", "fix"),
    [
        ("2.7.0+cpu", "torchvision --index-url https://download.pytorch.org/whl/cpu"),
        ("2.7.0+cu128", "torchvision --index-url https://download.pytorch.org/whl/cu128"),
        ("2.7.0", "--no-deps torchvision"),
        ("2.7.0+gitabc", "--no-deps torchvision"),
    ],
)
def test_torchvision_of_another_build(versions, monkeypatch, torch_version, fix):
    assert doctor.check_torchvision().found == "not installed"
    versions["torchvision"] = "0.22.0"
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: operator torchvision::nms does not exist\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(torch, "__version__", torch_version)
    finding = doctor.check_torchvision()
    assert finding.status == WARNING and "operator torchvision::nms does not exist" in finding.found
    assert finding.fix.endswith(fix)


def test_two_opencvs_clash(versions):
    versions |= {"opencv-python": "4.10", "opencv-python-headless": "4.9"}
    finding = doctor.check_opencv()
    assert finding.status == WARNING and "pip uninstall -y opencv-python opencv-python-headless" in finding.fix


def test_an_opencv_that_does_not_load(versions, monkeypatch):
    versions["opencv-python"] = "4.10"
    monkeypatch.setitem(sys.modules, "cv2", None)
    finding = doctor.check_opencv()
    assert finding.status == BROKEN and finding.found.startswith("opencv-python 4.10 does not load")
    assert finding.fix == "pip uninstall -y opencv-python && pip install opencv-python-headless"


def test_packs_wait_for_insightface(monkeypatch, tmp_path):
    for check in ("torch", "numpy", "torchvision", "onnxruntime", "opencv"):
        monkeypatch.setattr(doctor, f"check_{check}", lambda check=check: Finding(check, OK, "1"))
    monkeypatch.setattr(doctor, "check_insightface", lambda: Finding("insightface", BROKEN, "does not load", "pip"))
    assert doctor.examine(tmp_path)[-1].found == "not checked: insightface does not load"


def test_numpy_and_insightface_of_this_machine():
    assert doctor.check_numpy().status == doctor.check_insightface().status == OK


def test_how_files_are_routed(tmp_path):
    folder = tiny.write_pack(tmp_path, aligner=True)
    tiny.write_recognition(folder / "second.onnx", with_keypoints=False)
    shape = {"inputs": {"x": ["batch", 3, 108, 108]}, "outputs": {"y": ["batch", 3, 108, 108]}, "constants": {}}
    tiny.save(folder / "small.onnx", [onnx.helper.make_node("Relu", ["x"], ["y"])], **shape)
    (folder / "torn.onnx").write_bytes((folder / "second.onnx").read_bytes()[:500])
    tiny.write_pack(tmp_path, "plain", twin=False)
    found = {finding.found.split(":")[0].split(" ")[0] + finding.name: finding for finding in run_packs(tmp_path)}
    detection = found["detection.onnxpack tiny"]
    assert detection == Finding("pack tiny", OK, "detection.onnx: detection (SCRFD)")
    assert found["recognition.onnxpack tiny"].found == (
        "recognition.onnx: recognition (ArcFaceONNX); after register() KeypointRecognizer from "
        "keypoints/recognition.onnx, its keypoints refined by dfa.onnx"
    )
    second = found["second.onnxpack tiny"]
    assert second.status == WARNING and "recognition.onnx, which comes first" in second.found
    assert second.fix == f"mv {folder}/second.onnx {folder}/second.onnx.unused"
    small = found["small.onnxpack tiny"]
    assert small.status == WARNING and "it takes batchx3x108x108 and has 1 output;" in small.found
    torn = found["torn.onnxpack tiny"]
    assert torn.status == BROKEN and torn.fix.startswith(f"rm {folder}/torn.onnx")
    assert "no keypoints/recognition.onnx" in found["recognition.onnxpack plain"].found


def run_packs(root):
    return doctor_packs.examine_packs(root)


def test_packs_that_cannot_be_used(tmp_path):
    (nothing,) = run_packs(tmp_path)
    assert nothing.status == WARNING and "insightface-kprpe pack" in nothing.fix
    models = tmp_path / "models"
    tiny.write_recognition(models / "blind" / "recognition.onnx", with_keypoints=False)
    tiny.write_detector(models / "deep" / "deep" / "detection.onnx")
    (models / "empty").mkdir()
    blind, no_detector, deep, empty = run_packs(tmp_path)
    assert blind.status == OK and no_detector.status == deep.status == empty.status == BROKEN
    assert "has no face detector" in no_detector.found
    assert deep.fix == f"mv {models}/deep/deep/*.onnx {models}/deep/"
    assert empty.fix == f"rm -r {models}/empty"


def test_a_pack_of_ours_is_verified(tmp_path):
    source = tiny.write_pack(tmp_path, "source")
    folder = model_pack.build(
        recognition=source / "recognition.onnx", detector=source / "detection.onnx", name="ours", root=tmp_path / "r"
    )
    *_, listed = run_packs(tmp_path / "r")
    assert listed.status == OK and "the files match pack.json" in listed.found
    with open(folder / "recognition.onnx", "ab") as file:
        file.write(b"\0")
    (broken,) = [finding for finding in run_packs(tmp_path / "r") if finding.status == BROKEN]
    assert broken.found == "recognition.onnx has changed since the pack was built; build it again"
    rest = f"--name ours --root {tmp_path / 'r'}"
    assert broken.fix == f"insightface-kprpe pack RUN --detector PATH_TO_DETECTOR.onnx {rest}"


def test_files_that_were_added_are_said_once(tmp_path):
    source = tiny.write_pack(tmp_path, "source")
    folder = model_pack.build(
        recognition=source / "recognition.onnx", detector=source / "detection.onnx", name="ours", root=tmp_path / "r"
    )
    tiny.write_detector(folder / "a.onnx")  # comes first, so InsightFace takes it
    (folder / "extra.onnx").write_bytes((folder / "recognition.onnx").read_bytes())
    tiny.write_aligner(folder / "keypoints" / "dfa.onnx")
    ignored, _, *added = run_packs(tmp_path / "r")
    assert "detection.onnx is ignored: a.onnx, which comes first" in ignored.found
    assert ignored.fix == f"mv {folder}/a.onnx {folder}/a.onnx.unused"
    assert added == [
        Finding(
            "pack ours",
            BROKEN,
            f"{name} was added after the pack was built",
            f"mv {folder}/{name} {folder}/{name}.unused",
        )
        for name in ("a.onnx", "extra.onnx", "keypoints/dfa.onnx")
    ]


def test_how_to_build_a_pack_again(tmp_path):
    folder = tmp_path / "models" / "ours"
    evaluation = {"set": "lfw", "pairs": 6000, "accuracy": 99.0, "thresholds": {}}
    files = {
        "detection.onnx": {"source": "buffalo_l/det_10g.onnx", "architecture": "SCRFD"},
        "recognition.onnx": {"source": "my run", "precision": "int8", "evaluation": evaluation},
        "keypoints/dfa.onnx": {"source": "hf:a/dfa@1", "architecture": "DFA"},
    }

    def command():
        folder.mkdir(parents=True, exist_ok=True)
        record = {name: {"sha256": "", "licence": "", **file} for name, file in files.items()}
        (folder / "pack.json").write_text(json.dumps({"name": "ours", "files": record}))
        return installed_packs.rebuild_command(folder).removeprefix("insightface-kprpe pack ")

    rest = f"--name ours --root {tmp_path}"
    assert command() == (
        f"'my run' --detector buffalo_l --aligner hf:a/dfa@1 --precision int8 --evaluate lfw.bin {rest}"
    )
    files["keypoints/dfa.onnx"]["source"] = "my run"  # a self-aligned network's own
    files["recognition.onnx"] = {"source": "my run"}
    files["detection.onnx"]["source"] = "ours/detection.onnx"  # built from itself
    assert command() == f"'my run' --detector PATH_TO_DETECTOR.onnx {rest}"
    files["detection.onnx"] = {"source": "the aligner", "architecture": "DFA"}
    assert command() == f"'my run' --detector dfa --aligner PATH_TO_DFA {rest}"
    (folder / "pack.json").write_text("{")
    assert installed_packs.rebuild_command(folder).startswith("insightface-kprpe pack RUN --detector PATH_TO")
    (torn,) = doctor_packs._examine_manifest("pack ours", folder)[1]
    assert torn.status == BROKEN and "is damaged" in torn.found and "PATH_TO_DETECTOR" in torn.fix


def test_command_line(tmp_path, monkeypatch):
    findings = [Finding("torch", OK, "2.7"), Finding("onnxruntime", BROKEN, "two of them", "pip uninstall -y one")]
    monkeypatch.setattr(doctor, "examine", lambda root: findings)
    result = CliRunner().invoke(cli.app, ["doctor", "--root", str(tmp_path)])
    assert result.exit_code == 1 and "fix: pip uninstall -y one" in result.output
    assert result.output.splitlines()[-1] == "1 broken, 0 warnings"
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 1 and json.loads(result.output)[1]["fix"] == "pip uninstall -y one"
    findings.pop()
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0


@pytest.mark.slow
def test_everything_of_this_machine(tmp_path):
    tiny.write_pack(tmp_path)
    findings = doctor.examine(tmp_path)
    assert {finding.name for finding in findings} >= {"python", "torch", "numpy", "onnxruntime", "insightface"}
    assert all(finding.fix for finding in findings if finding.status != OK)
