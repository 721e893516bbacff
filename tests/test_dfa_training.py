import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.data.landmark_augmentation import LandmarkAugmentation
from insightface_kprpe.data.landmark_dataset import UNKNOWN, FaceSample, LandmarkDataset
from insightface_kprpe.data.synthetic import draw_scene
from insightface_kprpe.dfa import DFALoss, RetinaFaceNet
from insightface_kprpe.dfa.weights import load_dfa, start_from
from insightface_kprpe.evaluation.landmarks import evaluate_landmarks
from insightface_kprpe.training.callbacks import StopSignal
from insightface_kprpe.training.checkpoint_files import list_checkpoints
from insightface_kprpe.training.config import ConfigError, configs_folder, load_config
from insightface_kprpe.training.landmark_trainer import main, train_dfa, train_landmarks
from insightface_kprpe.training.loop import EXIT_INTERRUPTED, EXIT_STOPPED
from insightface_kprpe.training.run_folder import TrainingError

SIZE = 32  # pixels; 42 anchors
TINY_RUN = [
    f"image_size={SIZE}",
    "batch_size=8",
    "num_epoch=2",
    "num_workers=0",
    "frequent=1",
    "warmup_epoch=0.5",
]


def write_faces(folder, count, start=0):
    """Images of one drawn person each, labeled in RetinaFace's format; the last face has no landmarks."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        scene = draw_scene([start + i], (96, 96), face_size=(48, 64), instance=i)
        cv2.imwrite(str(folder / "images" / f"{i}.png"), scene.image[..., ::-1])
        x1, y1, x2, y2 = scene.boxes[0]
        points = scene.landmarks_px[0] if i < count - 1 else np.full((5, 2), UNKNOWN)
        numbers = [x1, y1, x2 - x1, y2 - y1, *(value for point in points for value in (*point, 0.0)), 0.9]
        lines += [f"# {i}.png", " ".join(f"{value:.3f}" for value in numbers)]
    (folder / "label.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder / "val", 6, start=100)
    return write_faces(folder, 35)


def tiny_config(faces, output, *overrides):
    return load_config("dfa_small", [*TINY_RUN, f"data={faces}", f"output={output}", *overrides], base="dfa_base")


def losses(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(output):
    return torch.load(Path(output) / "model.pt", weights_only=True)


@pytest.mark.parametrize("overrides", [[], ["precision=bf16", "aggregator=False", "optimizer=sgd"]])
def test_an_interrupted_run_equals_an_uninterrupted_one(faces, tmp_path, monkeypatch, overrides):
    overrides = [*overrides, f"val={faces / 'val'}", "verbose=3"]
    train_dfa(tiny_config(faces, tmp_path / "whole", *overrides))
    with monkeypatch.context() as patch:
        calls = iter(range(1, 100))
        patch.setattr(StopSignal, "agreed", lambda self: next(calls) == 2)  # in the middle of the first epoch
        with pytest.raises(SystemExit) as stop:
            train_dfa(tiny_config(faces, tmp_path / "parts", *overrides))
        assert stop.value.code == EXIT_STOPPED
    assert list_checkpoints(tmp_path / "parts")[-1].name == "step_00000002"
    torch.rand(7)  # whatever happens in between
    train_dfa(tiny_config(faces, tmp_path / "parts", "resume=True", *overrides))
    assert list(losses(tmp_path / "parts")) == list(range(1, 9))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    for key, value in weights(tmp_path / "parts").items():
        assert torch.equal(value, expected[key]), key


def test_what_a_run_leaves(faces, tmp_path, caplog):
    with caplog.at_level("INFO", "insightface_kprpe"):
        results = train_dfa(tiny_config(faces, tmp_path, f"val={faces / 'val'}", "num_epoch=1"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model.pt", "checkpoints", "config.json", "metrics.jsonl", "model.pt",
    }  # fmt: skip
    log = caplog.text
    assert "with aggregator" in log and "35 faces" in log and "left" in log and "5 faces: NME" in log
    assert "aggregator.3.weight" in weights(tmp_path)  # the published names
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 4, **results, "failure_rate": 100 * results["failure_rate"]} and results["nme"] > 0

    dfa = load_dfa(tmp_path)
    assert dfa.aggregator is not None and dfa.image_size == SIZE and not dfa.training
    dataset = LandmarkDataset(faces / "val", SIZE, labeled_only=True)
    measured = evaluate_landmarks(lambda images: dfa(images)[:2], dataset)
    assert measured.nme == pytest.approx(results["nme"], rel=1e-3)


def test_a_diverging_loss_stops_with_what_one_needs_to_know(faces, tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan at step \d+ \(epoch 0, lr .*lower lr"):
        train_dfa(tiny_config(faces, tmp_path, "lr=1e30", "warmup_epoch=0", "clip_grad=1e30"))
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=no/such/folder"], "label file not found"),
        (["val=no/such/folder"], "label file not found"),
        (["batch_size=1000"], "images per rank: 35 images"),
        (["body=vgg"], "body must be"),
        (["init_from=no/such.pth"], "weights file not found"),
        (["loss_kwargs={'weight': 1}"], "loss_kwargs: .*'weight'"),
        (["augmentation_kwargs={'blurr': 1}"], "augmentation_kwargs: .*'blurr'"),
    ],
)
def test_mistakes_stop_before_the_first_step(faces, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_dfa(tiny_config(faces, tmp_path, *overrides))
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize("path", sorted(configs_folder().glob("dfa_*.py")), ids=lambda path: path.stem)
def test_every_shipped_config_is_over_the_dfa_base(path):
    config = load_config(path, base="dfa_base")
    with torch.device("meta"):
        RetinaFaceNet(config.body, config.aggregator, config.image_size)
    DFALoss(**config.loss_kwargs), LandmarkAugmentation(**config.augmentation_kwargs)
    header = path.read_text().split('"""')[1]
    assert path.stem == "dfa_base" or ("Command:" in header and "Result:" in header)


def test_configs_of_the_two_trainings_do_not_mix():
    with pytest.raises(ConfigError, match=r"unknown config key 'data'.*recognition_configs/base\.py"):
        load_config("dfa_small")
    with pytest.raises(SystemExit, match="unknown config key 'agregator'; did you mean aggregator"):
        main(["dfa_small", "agregator=False"])


def test_paper_recipe():
    config = load_config("dfa_mobilenet_wider", base="dfa_base")
    assert (config.batch_size, config.num_epoch, config.image_size, config.padding) == (320, 750, 160, 0.1)


class DrawnCrops(Dataset):
    """Crops of eight drawn people, and two of nobody."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        scene = draw_scene([index] if index < 8 else [], (SIZE, SIZE), face_size=(20, 28), instance=index)
        keypoints, box = np.full((5, 2), UNKNOWN, np.float32), np.full(4, UNKNOWN, np.float32)
        if len(scene.boxes):
            keypoints, box = scene.landmarks_px[0] / SIZE, scene.boxes[0] / SIZE
        image = np.ascontiguousarray(scene.image.transpose(2, 0, 1))
        return FaceSample(torch.from_numpy(image), torch.from_numpy(keypoints), torch.from_numpy(box))


def test_faces_are_learned_in_one_call_without_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = DrawnCrops()
    batch = torch.utils.data.default_collate([dataset[i] for i in range(8)])
    images = batch.image.float().flip(1) / 127.5 - 1

    def error():
        with torch.no_grad():
            return (net(images).keypoints - batch.keypoints).norm(dim=-1).mean()

    torch.manual_seed(0)
    net = RetinaFaceNet(image_size=SIZE)
    before = error()
    train_landmarks(net, dataset, epochs=30, batch_size=10, lr=0.005)
    assert error() < 0.5 * before
    assert not list(tmp_path.iterdir())


def test_the_seed_decides():
    def outcome(seed):
        torch.manual_seed(0)
        net = RetinaFaceNet(image_size=SIZE)
        options = {"augmentation": LandmarkAugmentation(), "epochs": 2, "batch_size": 4, "seed": seed}
        return train_landmarks(net, DrawnCrops(), **options), net.BboxHead[0].conv1x1.weight

    first, again, other = outcome(1), outcome(1), outcome(2)
    assert first[0] == again[0] != other[0] and torch.equal(first[1], again[1])


def test_bad_arguments_of_the_call():
    net = RetinaFaceNet(image_size=SIZE)
    with pytest.raises(ValueError, match="lr must be positive"):
        train_landmarks(net, DrawnCrops(), lr=-1.0)
    with pytest.raises(ValueError, match="images per rank: 10 images"):
        train_landmarks(net, DrawnCrops(), batch_size=11)
    with pytest.raises(TrainingError, match="loss is nan"):
        train_landmarks(net, DrawnCrops(), loss=DFALoss(box_weight=float("nan")), batch_size=5)


def test_start_from_a_dfa_with_or_without_aggregator(tmp_path):
    torch.manual_seed(0)
    with_mixer, without = RetinaFaceNet(image_size=SIZE), RetinaFaceNet(aggregator=False, image_size=SIZE)
    torch.save(with_mixer.state_dict(), tmp_path / "dfa.pt")
    start_from(without, tmp_path / "dfa.pt")
    assert torch.equal(without.ClassHead[0].conv1x1.weight, with_mixer.ClassHead[0].conv1x1.weight)

    run = tmp_path / "run"
    run.mkdir()
    torch.save(without.state_dict(), run / "model.pt")
    config = load_config("dfa_small", ["aggregator=False", f"image_size={SIZE}"], base="dfa_base")
    (run / "config.json").write_text(json.dumps(config))
    other = RetinaFaceNet(image_size=SIZE)
    mixer = other.aggregator[3].weight.clone()
    for source in (run, run / "model.pt"):
        start_from(other, source)
        assert torch.equal(other.body.stage1[0][0].weight, without.body.stage1[0][0].weight)
        assert torch.equal(other.aggregator[3].weight, mixer)
        loaded = load_dfa(source)
        assert loaded.aggregator is None and torch.equal(loaded.anchors, without.anchors)


def test_a_file_without_aggregator_is_retinaface(shared, tmp_path):
    path = shared / "data" / "models" / "retinaface_mobilenet0.25.pth"
    dfa = load_dfa(path)
    assert dfa.aggregator is None and dfa.input_scale == 127.5
    net = RetinaFaceNet()
    start_from(net, path)
    published = dfa.body.stage1[0][0].weight
    torch.testing.assert_close(net.body.stage1[0][0].weight, published * 127.5)  # it sees [-1, 1], not pixels


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(ValueError, match="is not a run of train-dfa: a run has"):
        load_dfa(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(load_config("quickstart")))
    with pytest.raises(ValueError, match="has no aggregator"):
        load_dfa(tmp_path)


def test_commands_train_and_evaluate(faces, tmp_path):
    def call(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False).output

    for name in ("a", "b"):
        call("train-dfa", "dfa_small", *TINY_RUN, f"data={faces}", f"output={tmp_path / name}", "num_epoch=1")
    models = [f"first={tmp_path / 'a'}", f"second={tmp_path / 'b' / 'model.pt'}"]
    output = call("evaluate", "landmarks", faces / "val", *models, "--out", tmp_path / "report", "--robustness")
    lines = output.splitlines()
    assert lines[0].split()[:2] == ["model", "NME"] and lines[1].startswith("first") and lines[2].startswith("second")
    assert lines[4].split() == ["NME", "first", "second"] and len(lines) == 5 + 16
    assert lines[5].split() == ["clean", lines[1].split()[1], lines[2].split()[1]]
    report = json.loads((tmp_path / "report" / "landmarks.json").read_text())
    assert report["models"]["first"]["images"] == 5 and len(report["robustness"]["second"]) == 16
    assert (tmp_path / "report" / "landmarks.png").is_file()
    with pytest.raises(ValueError, match="models must be NAME=PATH"):
        call("evaluate", "landmarks", faces / "val", tmp_path / "a")


def launch(faces, output, *arguments, processes=0):
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [
        "-m",
        "insightface_kprpe.training.landmark_trainer",
        "dfa_small",
        *TINY_RUN,
        f"data={faces}",
        f"output={output}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(ik.__file__).parents[1])}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_under_torchrun(faces, tmp_path):
    run = launch(faces, tmp_path, "batch_size=4", f"val={faces / 'val'}", processes=2)
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 0, output
    assert "2 x cpu" in output and "NME" in output  # the log is there under -m too
    assert (list_checkpoints(tmp_path)[-1] / "run.pt").is_file()
    assert not any(key.startswith("module.") for key in weights(tmp_path))
    assert list(losses(tmp_path)) == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, EXIT_STOPPED), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_a_signal_to_all_processes_saves_and_exits(faces, tmp_path, number, status):
    run = launch(faces, tmp_path, "num_epoch=10000", "num_workers=2")
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(run.pid, number)  # as a job scheduler or a terminal does: the readers too
    output = run.communicate(timeout=60)[0]
    assert run.returncode == status, output
    assert "stopped by a signal" in output and list_checkpoints(tmp_path)
