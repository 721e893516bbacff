import contextlib
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from distributed import run_on_ranks
from torch.nn.parallel import DistributedDataParallel

from insightface_kprpe.backbones import VisionTransformer
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.image_codec import encode_jpeg
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.losses import AdaFace
from insightface_kprpe.partial_fc import PartialFC, shard_range
from insightface_kprpe.training import callbacks, loop, trainer
from insightface_kprpe.training.build import check_labels
from insightface_kprpe.training.callbacks import StopSignal
from insightface_kprpe.training.checkpoint import Checkpointer
from insightface_kprpe.training.checkpoint_files import list_checkpoints
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.optimization import NotFinite, distributed, optimize
from insightface_kprpe.training.random_state import seed_everything
from insightface_kprpe.training.run_folder import TrainingError
from insightface_kprpe.training.state import Schedule, build_optimizer, build_state
from insightface_kprpe.training.validation import Validation

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


def accuracies(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["accuracy/pairs"] for line in lines if "accuracy/pairs" in line}


def write_pairs(path, count=20, size=112):
    """A set of noise, whose pairs of one person are a little alike."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (2 * count, size, size, 3), np.uint8)
    images[1:count:2, : size // 3] = images[0:count:2, : size // 3]
    write_verification_bin(path, [encode_jpeg(image) for image in images], [i < count // 2 for i in range(count)])
    return path


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


def test_a_stop_in_a_step_after_which_validation_is_due_changes_nothing(tmp_path, monkeypatch):
    overrides = [f"val_targets={write_pairs(tmp_path / 'pairs.bin')}", "num_image=32", "verbose=2"]
    trainer.train(tiny_config(tmp_path / "whole", *overrides))
    expected, run = weights(tmp_path / "whole"), "checkpoints/step_00000008/run.pt"
    measured = accuracies(tmp_path / "whole")
    assert list(measured) == [2, 4, 6, 8]
    for step in (2, 4, 8):
        output = tmp_path / str(step)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_after(patch, step)
            trainer.train(tiny_config(output, *overrides))
        assert step not in accuracies(output)
        torch.rand(7), np.random.rand(3)  # noqa: NPY002 - whatever happens in between
        trainer.train(tiny_config(output, "resume=True", *overrides))
        assert losses(output) == losses(tmp_path / "whole") and accuracies(output) == measured
        for key, value in weights(output).items():
            assert torch.equal(value, expected[key]), (step, key)
        states = [torch.load(folder / run, weights_only=True) for folder in (output, tmp_path / "whole")]
        assert torch.equal(*[state.pop("random")[0]["torch"] for state in states])
        assert states[0] == states[1]
        for file in ("best_model.pt", "checkpoints/scores.json", "checkpoints/best"):
            assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (step, file)


def test_a_run_is_the_same_with_and_without_validations(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.bin")
    for name, often in (("often", [f"val_targets={pairs}", "verbose=1", "verify_at_start=True"]), ("never", [])):
        trainer.train(tiny_config(tmp_path / name, "num_image=32", "num_epoch=1", *often))
    assert list(accuracies(tmp_path / "often")) == [0, 1, 2, 3, 4]
    expected = weights(tmp_path / "never")
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "often").items())


def test_a_validation_draws_the_same_numbers_whatever_training_drew(tmp_path):
    drawn = []

    def measure(step):
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002

    validation = Validation(measure, 1, None, Schedule(5, 1), Checkpointer(tmp_path))
    for seed in (1, 2):
        seed_everything(seed)
        expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
        seed_everything(seed)
        validation(1)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002
    assert drawn[0] == drawn[1] != expected


def test_a_failing_validation_is_said_and_training_goes_on(tmp_path, monkeypatch, caplog):
    calls = []

    def verify(embed, pairs):
        calls.append(list_checkpoints(tmp_path)[-1].name)  # what would be lost is saved
        raise ValueError("the disk is gone") if len(calls) == 1 else RuntimeError("out of memory")

    monkeypatch.setattr(callbacks, "verify", verify)
    pairs = write_pairs(tmp_path / "pairs.bin")
    overrides = [f"val_targets={pairs}", "num_image=32", "num_epoch=1", "verbose=2"]
    assert trainer.train(tiny_config(tmp_path, *overrides)) == {}
    assert calls == ["step_00000002", "step_00000004"] and (tmp_path / "model.pt").is_file()
    failed = [record for record in caplog.records if "VALIDATION FAILED" in record.message]
    assert [record.levelname for record in failed] == ["ERROR", "ERROR"]
    assert "after step 2, training continues: ValueError: the disk is gone" in failed[0].message
    assert not failed[0].exc_info and failed[1].exc_info
    assert "2 validations failed, after steps 2, 4" in caplog.text

    monkeypatch.undo()  # what failed is made up where the run is resumed
    assert trainer.train(tiny_config(tmp_path, "resume=True", *overrides)).keys() == {"pairs"}
    assert list(accuracies(tmp_path)) == [4] and (tmp_path / "best_model.pt").is_file()


def test_output_folder(tmp_path):
    accuracies = trainer.train(tiny_config(tmp_path, "val_targets=synthetic", "num_epoch=1"))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1] == {"step": 8, "accuracy/synthetic": 100 * accuracies["synthetic"]}
    assert 0.4 <= accuracies["synthetic"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        "best_model.pt", "checkpoints", "config.json", "metrics.jsonl", "model.pt",
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"best", "latest", "scores.json", "step_00000008"}
    state = weights(tmp_path)
    assert "keypoint_linear.weight" in state and not any(key.startswith("module.") for key in state)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer.train(tiny_config(tmp_path, "num_epoch=4"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000024", "step_00000032"]


def test_a_diverging_loss_stops_with_what_one_needs_to_know(tmp_path):
    message = r"loss is nan at step (\d+) \(epoch 0, lr .*loss scale 1; not finite: .*model\..*\); its images are in "
    with pytest.raises(TrainingError, match=message) as stop:
        trainer.train(tiny_config(tmp_path, "lr=1e30", "warmup_epoch=0", "gradient_acc=2"))
    assert not list_checkpoints(tmp_path)
    step = int(re.match(message, str(stop.value))[1])
    report = json.loads((tmp_path / f"bad_batch_step_{step}_rank_0.json").read_text())
    assert report["step"] == step and report["lr"] > 1e29 and report["loss"] == "nan" and report["not_finite"]
    batches = torch.load(tmp_path / f"bad_batch_step_{step}_rank_0.pt", weights_only=True)
    assert len(batches) == 2 and len(report["keys"]) == 16
    dataset = open_faces("synthetic", 8, 64, 2048)
    images = [dataset[key][0] for key in report["keys"]]
    assert torch.equal(torch.stack(images), torch.cat([batch[0] for batch in batches]))


class Spoilt(nn.Module):
    """A loss whose gradient is not finite for the first few calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, embeddings):
        self.calls -= 1
        loss = embeddings.mean()
        if self.calls >= 0:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


def spoilt_state(calls, precision):
    torch.manual_seed(0)
    config = load_config("quickstart", [f"precision={precision}"])
    return build_state(config, nn.Linear(2, 2), Spoilt(calls), Schedule(1, 1), torch.device("cpu"))


def test_a_broken_gradient_does_not_reach_the_weights():
    state = spoilt_state(1, "fp32")
    before = state.model.weight.clone()
    for _ in range(2):
        with pytest.raises(NotFinite) if state.loss.calls else contextlib.nullcontext() as error:
            optimize(lambda batch: state.loss(state.model(batch)), [torch.ones(3, 2)], state.model, state, 5.0)
        if error:
            assert error.value.names == ["gradient of model.weight", "gradient of model.bias"]
            assert math.isfinite(error.value.loss) and torch.equal(state.model.weight, before)
            state.optimizer.zero_grad()
    assert not torch.equal(state.model.weight, before)


def test_fp16_leaves_out_steps_that_overflow_until_the_scale_is_1():
    state = spoilt_state(1000, "fp16")
    before, scales = state.model.weight.clone(), []
    with pytest.raises(NotFinite):
        for _ in range(1000):
            scales.append(state.scaler.get_scale())
            optimize(lambda batch: state.loss(state.model(batch)), [torch.ones(3, 2)], state.model, state, 5.0)
    assert scales == [2.0**power for power in range(16, -1, -1)]
    assert torch.equal(state.model.weight, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rec=/no/such/folder"], "does not exist"),
        (["batch_size=1000"], "images per rank: 64 images"),
        (["gradient_acc=100"], "gradient_acc must be at most"),
        (["val_targets=('lfw',)"], "val_targets must name"),
        (["network=r51"], "network must be a registered backbone"),
    ],
)
def test_mistakes_stop_before_the_first_step(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_config(tmp_path, *overrides))
    assert not (tmp_path / "model.pt").exists()


def test_labels_are_checked_against_num_classes(tmp_path):
    config = tiny_config(tmp_path)
    dataset = open_faces("synthetic", 8, 64, 0)
    dataset.labels = dataset.labels + 1
    with pytest.raises(
        ValueError, match="num_classes must be above every label, got 8 for labels 1 to 8.*set num_classes=9"
    ):
        check_labels(dataset, config)


def test_the_command_line_logs_and_the_library_leaves_logging_alone(tmp_path, caplog):
    mine = logging.NullHandler()
    log = logging.getLogger("insightface_kprpe")
    log.addHandler(mine)
    before = log.handlers[:], log.level, log.propagate, logging.getLogger().handlers[:]
    config = tiny_config(tmp_path / "library", "num_epoch=1")
    with caplog.at_level(logging.INFO, "insightface_kprpe"):
        trainer.train(config)
    assert "step 8/8" in caplog.text and not (tmp_path / "library" / "training.log").exists()
    assert (log.handlers, log.level, log.propagate, logging.getLogger().handlers) == before
    trainer.main(["quickstart", *TINY_RUN, "num_epoch=1", f"output={tmp_path / 'verb'}"])
    text = (tmp_path / "verb" / "training.log").read_text()
    assert "step 8/8" in text and "left" in text and "done: " in text


def test_the_command_line_says_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(["quickstart", "learning_rate=3"])
    assert "unknown config key 'learning_rate'" in str(stop.value)


def test_tensorboard_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[tensorboard\]"):
        trainer.train(tiny_config(tmp_path, "tensorboard=True"))


def make_step(world_size=1, rank=0, sample_rate=1.0, **settings):
    torch.manual_seed(0)
    backbone = VisionTransformer(**{**TINY, "drop_path_rate": 0, "mask_ratio": 0, **settings}, num_features=16).eval()
    with torch.no_grad():
        centers = torch.randn(8, 16)
    partial_fc = PartialFC(AdaFace(), 16, 8, sample_rate)
    first, count = shard_range(8, rank, world_size)
    partial_fc.class_centers.data.copy_(centers[first : first + count])
    config = load_config("quickstart", ["lr=0.1", "optimizer=sgd"])
    state = build_state(config, backbone, partial_fc, Schedule(1, 1), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    batch = (
        torch.randn(8, 3, 112, 112, generator=generator),
        torch.arange(8) // 2,
        torch.rand(8, 5, 2, generator=generator),
    )
    network = DistributedDataParallel(backbone) if world_size > 1 else backbone
    return network, state, config, batch


def run_step(rank, world_size, parts, sample_rate=1.0):
    network, state, config, batch = make_step(world_size, rank, sample_rate)
    shares = [tuple(t.chunk(world_size * parts)[part * world_size + rank] for t in batch) for part in range(parts)]
    loss = trainer.train_step(network, shares, state, config)
    tensors = {name: value for name, value in state.tensors().items() if not name.startswith("optimizer")}
    if world_size > 1:
        del tensors["loss.class_centers"]
    return {"loss": torch.tensor(loss), **tensors}


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_accumulated_gradients_equal_the_large_batch(sample_rate):
    """With AdaFace's statistics of the whole batch, and the same sampled class centers for all parts."""
    whole, parts = run_step(0, 1, 1, sample_rate), run_step(0, 1, 4, sample_rate)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert whole["loss.margin_loss.batch_mean"] != 20


def test_the_norms_of_a_step_are_those_of_the_training_pass_that_follows():
    torch.manual_seed(0)
    backbone = VisionTransformer(**TINY, num_features=16)
    batches = [(torch.randn(4, 3, 112, 112), torch.zeros(4), torch.rand(4, 5, 2)) for _ in range(2)]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    norms = trainer.norms_of(lambda batch: backbone(batch[0], batch[2]), batches, backbone)
    torch.testing.assert_close(dict(backbone.state_dict()), before)
    after = torch.cat([backbone(images, keypoints) for images, _, keypoints in batches]).norm(dim=1)
    torch.testing.assert_close(norms, after.detach())


def test_the_statistics_of_a_step_are_of_its_own_dropped_paths_and_masked_patches(monkeypatch):
    network, state, config, batch = make_step(sample_rate=0.5, drop_path_rate=0.3, mask_ratio=0.3)
    network.train()
    given, seen = [], []
    monkeypatch.setattr(state.loss.margin_loss, "update_statistics", given.append)
    parts = [tuple(tensor.chunk(4)[part] for tensor in batch) for part in range(4)]
    trainer.train_step(
        network, parts, state, config, lambda images, keypoints, out: seen.append(out.detach().norm(dim=1))
    )
    torch.testing.assert_close(given[0], torch.cat(seen), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_accumulation_and_ranks_together_equal_the_large_batch():
    whole = run_step(0, 1, 1)
    for result in run_on_ranks(run_step, 2, 2, 2):
        torch.testing.assert_close(result, {key: whole[key] for key in result}, atol=1e-5, rtol=1e-5)


def test_fused_adamw_equals_the_plain_one():
    results = []
    for fused in (True, False):
        _, state, config, batch = make_step()
        optimizer = build_optimizer(load_config("quickstart", ["lr=0.1", "optimizer=adamw"]), state.model, state.loss)
        assert optimizer.defaults["fused"]
        for group in optimizer.param_groups:
            group["fused"] = fused
        trainer.train_step(state.model, [batch], state._replace(optimizer=optimizer), config)
        results.append(dict(state.model.state_dict()))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def compressed_step(rank, compression):
    _, state, config, batch = make_step(2, rank)
    network = distributed(state.model, torch.device("cpu"), compression)
    trainer.train_step(network, [tuple(tensor.chunk(2)[rank] for tensor in batch)], state, config)
    return state.model.feature[0].weight.detach()


@pytest.mark.slow
def test_compressed_gradients_are_nearly_the_same():
    (plain, _), (compressed, other) = (run_on_ranks(compressed_step, 2, kind) for kind in (None, "bf16"))
    assert torch.equal(compressed, other) and not torch.equal(compressed, plain)
    torch.testing.assert_close(compressed, plain, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_a_compiled_network_trains_as_the_plain_one(tmp_path, monkeypatch):
    in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net: in_place(net, backend="eager"))  # traced, without C++
    small = ["num_epoch=1", "num_image=24", f"network_kwargs={ {**TINY, 'drop_path_rate': 0.0, 'mask_ratio': 0.0} }"]
    for compiled in (False, True):
        trainer.train(tiny_config(tmp_path / str(compiled), *small, f"compile={compiled}"))
    plain, compiled = losses(tmp_path / "False"), losses(tmp_path / "True")
    torch.testing.assert_close(list(compiled.values()), list(plain.values()), atol=1e-2, rtol=1e-3)
    assert weights(tmp_path / "True").keys() == weights(tmp_path / "False").keys()


def test_weight_decay_spares_biases_norms_and_position_tables():
    _, (backbone, partial_fc, *_), *_ = make_step()
    config = load_config("quickstart", ["optimizer=adamw", "weight_decay=0.1"])
    decayed, spared, centers = build_optimizer(config, backbone, partial_fc).param_groups
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
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "run.pt"]
    assert sorted(path.name for path in list_checkpoints(whole)[-1].iterdir()) == files
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
def test_real_faces_are_learned(shared, tmp_path):
    """A short version of the run in the README: RecordIO, landmarks, and .bin sets of people not trained on."""
    faces = shared / "data" / "faces"
    overrides = [f"rec={faces / 'rec'}", f"val_targets=('{faces / 'ytf_val.bin'}',)", "num_classes=0", "num_image=0"]
    overrides += ["batch_size=64", "num_epoch=3", "sample_rate=1.0", "lr=0.003", "embedding_size=128"]
    overrides += ["network_kwargs={'depth': 2, 'embed_dim': 64}", "num_workers=2"]
    accuracies = trainer.train(tiny_config(tmp_path, *overrides))
    values = losses(tmp_path)
    assert max(values) == 3 * (3820 // 64)
    assert values[max(values)] < 0.75 * values[1]
    assert accuracies["ytf_val"] > 0.55  # chance is 0.5; measured 0.62 to 0.66
