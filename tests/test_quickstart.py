import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import insightface_kprpe as ik
from insightface_kprpe.data.landmark_dataset import UNKNOWN
from insightface_kprpe.dfa import DFA, load_dfa
from insightface_kprpe.quickstart.landmarks import DrawnScenes, landmark_error, train_both
from insightface_kprpe.quickstart.run import last_accuracies, with_aligner
from insightface_kprpe.training.config import dump_config, load_config


def test_drawn_scenes_are_labeled_and_drawn_once():
    scenes = DrawnScenes(8, 96, face_size=(40, 60), faceless=4)
    assert len(scenes) == 8
    face, nobody = scenes[0], scenes[3]
    assert face.image.shape == (3, 96, 96) and face.image.dtype == torch.uint8
    left, top, right, bottom = (face.bbox * 96).tolist()
    assert 40 <= bottom - top <= 60
    inside = (face.keypoints > face.bbox[:2]) & (face.keypoints < face.bbox[2:])
    assert inside.all()
    assert (nobody.keypoints == UNKNOWN).all() and (nobody.bbox == UNKNOWN).all()
    assert scenes[0] is face


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells processes of their parent's death")
def test_trainings_end_when_the_quickstart_is_killed():
    command = """
import subprocess, time
from insightface_kprpe.quickstart.run import _stop_with_parent
print(subprocess.Popen(["sleep", "600"], preexec_fn=_stop_with_parent).pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(300):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child is left")


def test_landmark_error_of_an_aligner_that_knows_nothing():
    torch.manual_seed(0)
    error, template = landmark_error(DFA().eval(), first_identity=5, people=4)
    assert 0.08 < template < 0.25  # loose crops: the face is anywhere
    assert error > 0.08


def test_last_accuracies_are_fractions(tmp_path):
    rows = ['{"step": 1, "accuracy/a": 50.0}', '{"step": 2, "loss": 3.5}', '{"step": 2, "accuracy/a": 83.8}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert last_accuracies(tmp_path) == {"a": pytest.approx(0.838)}


@pytest.mark.slow
def test_both_networks_are_written_and_fit_each_other(tmp_path):
    threads = torch.get_num_threads()
    losses = train_both(tmp_path / "detector.onnx", tmp_path / "dfa.pt", "MIT", scenes=64, crops=32)
    assert np.isfinite(losses).all() and torch.get_num_threads() == threads
    assert len(onnx.load(str(tmp_path / "detector.onnx")).graph.output) == 9
    dfa = load_dfa(tmp_path / "dfa.pt")

    config = load_config("quickstart", ["embedding_size=16"])
    run = tmp_path / "run"
    dump_config(config, run / "config.json")
    net = ik.get_model(config.network, num_features=16, **config.network_kwargs)
    torch.save(net.state_dict(), run / "model.pt")
    net = with_aligner(run, tmp_path / "dfa.pt")
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(net.dfa.locate(images)[0], dfa.locate(images)[0])
        assert net(images).shape == (2, 16)
