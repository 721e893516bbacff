import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from distributed import run_on_ranks
from torch.nn.parallel import DistributedDataParallel

from insightface_kprpe.backbones import VisionTransformer
from insightface_kprpe.losses import ArcFace
from insightface_kprpe.partial_fc import PartialFC, shard_range
from insightface_kprpe.training import loop, trainer
from insightface_kprpe.training.callbacks import StopSignal
from insightface_kprpe.training.checkpoint import list_checkpoints
from insightface_kprpe.training.config import load_config

ROOT = Path(__file__).resolve().parents[1]
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28, "drop_path_rate": 0.2, "mask_ratio": 0.2}
TINY_RUN = [
    "num_classes=8",
    "num_image=64",
    "batch_size=8",
    "num_epoch=2",
    "warmup_epoch=0.5",
    "embedding_size=16",
    "num_workers=0",
    "sample_rate=0.75",
    "val_targets=()",
    "frequent=1",
    f"network_kwargs={TINY}",
]


def tiny_config(output, *overrides):
    return load_config("quickstart", [*TINY_RUN, f"output={output}", *overrides])


def losses(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(output):
    return torch.load(Path(output) / "model.pt", weights_only=True)


def stop_after(monkeypatch, steps):
    """As if SIGTERM came during optimizer step number ``steps``."""
    calls = iter(range(1, 1000))
    monkeypatch.setattr(StopSignal, "agreed", lambda self: next(calls) == steps)


@pytest.mark.parametrize("overrides", [[], ["precision=fp16"], ["gradient_acc=2", "optimizer=sgd", "precision=bf16"]])
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, overrides):
    trainer.train(tiny_config(tmp_path / "whole", *overrides))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # in the middle of the first epoch
        with pytest.raises(SystemExit) as stop:
            trainer.train(tiny_config(tmp_path / "parts", *overrides))
        assert stop.value.code == 143
    assert list_checkpoints(tmp_path / "parts")[-1].name == "step_00000003"
    torch.rand(7)  # whatever happens in between
    trainer.train(tiny_config(tmp_path / "parts", "resume=True", *overrides))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    for key, value in weights(tmp_path / "parts").items():
        assert torch.equal(value, expected[key]), key


def test_output_folder(tmp_path):
    accuracies = trainer.train(tiny_config(tmp_path, "val_targets=synthetic", "num_epoch=1"))
    assert 0 <= accuracies["synthetic"] <= 100
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "metrics.jsonl", "model.pt", "training.log",
    }  # fmt: skip
    log = (tmp_path / "training.log").read_text()
    assert "loss" in log and "left" in log and "accuracy" in log
    state = weights(tmp_path)
    assert "keypoint_linear.weight" in state and not any(key.startswith("module.") for key in state)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer.train(tiny_config(tmp_path, "num_epoch=4"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000024", "step_00000032"]


def test_a_diverging_loss_stops_with_what_one_needs_to_know(tmp_path):
    with pytest.raises(loop.TrainingError, match=r"loss is nan at step \d+ \(epoch 0, lr .*loss scale 1\)"):
        trainer.train(tiny_config(tmp_path, "lr=1e30", "warmup_epoch=0"))
    assert not list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rec=/no/such/folder"], "does not exist"),
        (["batch_size=1000"], "batch_size must let 64 images"),
        (["gradient_acc=100"], "gradient_acc must fit"),
        (["val_targets=('lfw',)"], "val_targets must name"),
        (["network=r50"], "network must be a registered backbone"),
    ],
)
def test_mistakes_stop_before_the_first_step(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_config(tmp_path, *overrides))
    assert not (tmp_path / "model.pt").exists()


def test_labels_are_checked_against_num_classes(tmp_path):
    config = tiny_config(tmp_path)
    dataset = trainer.open_faces("synthetic", 8, 64, 0)
    dataset.labels = dataset.labels + 1
    with pytest.raises(
        ValueError, match="num_classes must be above every label, got 8 for labels 1 to 8.*set num_classes=9"
    ):
        trainer.check_labels(dataset, config)


def test_the_command_line_says_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(["quickstart", "learning_rate=3"])
    assert "unknown config key 'learning_rate'" in str(stop.value)


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[tensorboard\]"):
        trainer.train(tiny_config(tmp_path, "tensorboard=True"))


def make_step(world_size=1, rank=0):
    torch.manual_seed(0)
    backbone = VisionTransformer(**{**TINY, "drop_path_rate": 0, "mask_ratio": 0}, num_features=16).eval()
    with torch.no_grad():
        centers = torch.randn(8, 16)
    partial_fc = PartialFC(ArcFace(), 16, 8)
    first, count = shard_range(8, rank, world_size)
    partial_fc.class_centers.data.copy_(centers[first : first + count])
    config = load_config("quickstart", ["lr=0.1", "optimizer=sgd"])
    optimizer = loop.build_optimizer(config, backbone, partial_fc)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(8, 3, 112, 112, generator=generator), torch.arange(8), torch.rand(8, 5, 2, generator=generator)
    network = DistributedDataParallel(backbone) if world_size > 1 else backbone
    return network, backbone, partial_fc, optimizer, config, batch


def run_step(rank, world_size, parts):
    network, backbone, partial_fc, optimizer, config, batch = make_step(world_size, rank)
    shares = [tuple(t.chunk(world_size * parts)[part * world_size + rank] for t in batch) for part in range(parts)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = trainer.train_step(network, partial_fc, shares, optimizer, scaler, config)
    return {"loss": torch.tensor(loss), "feature": backbone.feature[0].weight.detach()}


def test_accumulated_gradients_equal_the_large_batch():
    whole, parts = run_step(0, 1, 1), run_step(0, 1, 4)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_accumulation_and_ranks_together_equal_the_large_batch():
    whole = run_step(0, 1, 1)
    for result in run_on_ranks(run_step, 2, 2, 2):
        torch.testing.assert_close(result, whole, atol=1e-5, rtol=1e-5)


def test_weight_decay_spares_biases_norms_and_position_tables():
    _, backbone, partial_fc, *_ = make_step()
    config = load_config("quickstart", ["optimizer=adamw", "weight_decay=0.1"])
    decayed, spared, centers = loop.build_optimizer(config, backbone, partial_fc).param_groups
    assert decayed["weight_decay"] == centers["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    spared = {names[id(parameter)] for parameter in spared["params"]}
    assert {"pos_embed", "blocks.0.norm1.weight", "patch_embed.proj.bias"} <= spared
    assert "blocks.0.attn.qkv.weight" not in spared
    assert isinstance(backbone, nn.Module) and len(spared) + len(decayed["params"]) == len(names)


def launch(arguments, processes=0):
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, str(ROOT / "train_v2.py"), "quickstart", *TINY_RUN, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_under_torchrun_resume_exactly(tmp_path):
    for output, epochs in (("whole", "2"), ("parts", "2")):
        run = launch([f"output={tmp_path / output}", f"num_epoch={epochs}", "batch_size=4"], 2)
        assert run.wait(240) == 0, run.stdout.read()
    whole = tmp_path / "whole"
    assert sorted(path.name for path in list_checkpoints(whole)[-1].iterdir()) == ["rank_0.pt", "rank_1.pt"]
    # Go back to the end of the first epoch and do the second again.
    last = list_checkpoints(tmp_path / "parts")[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    run = launch([f"output={tmp_path / 'parts'}", "batch_size=4", "resume=True"], 2)
    assert run.wait(240) == 0, run.stdout.read()
    expected = weights(whole)
    for key, value in weights(tmp_path / "parts").items():
        assert torch.equal(value, expected[key]), key
    assert losses(tmp_path / "parts") == losses(whole)
    with pytest.raises(ValueError, match="written by 2 ranks, this run has 1"):
        trainer.train(tiny_config(whole, "resume=True"))


@pytest.mark.slow
def test_sigterm_saves_and_exits(tmp_path):
    run = launch([f"output={tmp_path}", "num_epoch=10000"])
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == loop.EXIT_STOPPED, output
    assert "stopped by a signal" in output and "resume=True" in output
    assert list_checkpoints(tmp_path)


@pytest.mark.slow
def test_real_faces_are_learnt(shared, tmp_path):
    """A short version of the run in the README: RecordIO, landmarks, and .bin sets of people not trained on."""
    faces = shared / "data" / "faces"
    overrides = [f"rec={faces / 'rec'}", f"val_targets=('{faces / 'ytf_val.bin'}',)", "num_classes=0", "num_image=0"]
    overrides += ["batch_size=64", "num_epoch=3", "sample_rate=1.0", "lr=0.003", "embedding_size=128"]
    overrides += ["network_kwargs={'depth': 2, 'embed_dim': 64}", "num_workers=2"]
    accuracies = trainer.train(tiny_config(tmp_path, *overrides))
    values = losses(tmp_path)
    assert max(values) == 3 * (3820 // 64)
    assert values[max(values)] < 0.75 * values[1]
    assert accuracies["ytf_val"] > 55  # chance is 50; measured 62 to 66
