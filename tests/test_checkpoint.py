import errno
import json
import logging
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from distributed import exit_code_of, run_on_ranks
from test_trainer import TINY, accuracies, losses, tiny_config, weights, write_pairs

from insightface_kprpe import files
from insightface_kprpe.losses import AdaFace
from insightface_kprpe.partial_fc import PartialFC, shard_range
from insightface_kprpe.training import build, checkpoint, trainer
from insightface_kprpe.training.callbacks import StopSignal
from insightface_kprpe.training.checkpoint import Checkpointer
from insightface_kprpe.training.checkpoint_files import latest_checkpoint, list_checkpoints, put_aside
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.run_folder import TrainingError, open_run
from insightface_kprpe.training.state import Schedule, build_state

CLASSES, SIZE, BATCH = 7, 4, 12
SCHEDULE = Schedule(5, 2)


def make_state(optimizer="adamw", size=SIZE, classes=CLASSES, schedule=SCHEDULE):
    torch.manual_seed(0)
    config = load_config("quickstart", [f"optimizer={optimizer}", "lr=0.01", "weight_decay=0.1", "warmup_epoch=1"])
    net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(5, size)).to(memory_format=torch.channels_last)
    partial_fc = PartialFC(AdaFace(), size, classes)
    first, count = shard_range(classes, partial_fc.rank, partial_fc.world_size)
    centers = torch.randn(classes, size, generator=torch.Generator().manual_seed(1))
    partial_fc.class_centers.data.copy_(centers[first : first + count])
    return build_state(config, net, partial_fc, schedule, torch.device("cpu"))


def take_steps(state, count, first=0):
    """Losses of some steps on batches that depend on the step alone."""
    values = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 2, 2, generator=generator)
        loss = state.loss(state.model(images), torch.randint(CLASSES, (BATCH,), generator=generator))
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.scheduler.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_is_what_was_saved_whatever_happens_next(tmp_path, optimizer, asynchronous):
    state = make_state(optimizer)
    checkpoints = Checkpointer(tmp_path, asynchronous=asynchronous)
    take_steps(state, 3)
    checkpoints.save(3, state, SCHEDULE)
    expected = take_steps(state, 3, 3), torch.rand(2)
    checkpoints.wait()
    state = make_state(optimizer)
    assert Checkpointer(tmp_path).resume(state, SCHEDULE) == 3
    assert state.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert take_steps(state, 3, 3) == expected[0] and torch.equal(torch.rand(2), expected[1])


def test_saving_in_the_background_does_not_keep_training_waiting(tmp_path, monkeypatch):
    written, go_on = [], threading.Event()
    write = checkpoint.write_tensors

    def slow(folder, *args):
        go_on.wait(60)
        written.append(folder.name)
        write(folder, *args)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    state, checkpoints = make_state(), Checkpointer(tmp_path, asynchronous=True)
    checkpoints.save(1, state, SCHEDULE)
    assert not written and latest_checkpoint(tmp_path) is None
    go_on.set()
    checkpoints.save(2, state, SCHEDULE)  # waits for the first
    assert latest_checkpoint(tmp_path).name == "step_00000001"
    checkpoints.wait()
    assert written == ["pending_00000001", "pending_00000002"]
    assert latest_checkpoint(tmp_path).name == "step_00000002"


def test_what_goes_wrong_in_the_background_is_said(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    checkpoints = Checkpointer(tmp_path, asynchronous=True)
    message = "the checkpoint of step 1 could not be written to .*: No space left"
    checkpoints.save(1, make_state(), SCHEDULE)
    with pytest.raises(TrainingError, match=message):
        checkpoints.wait()
    checkpoints.check()  # it is said once
    checkpoints.save(1, make_state(), SCHEDULE)
    with pytest.raises(TrainingError, match=message):
        for _ in range(600):  # training goes on meanwhile, and need not come to the next checkpoint to learn of it
            checkpoints.check()
            time.sleep(0.1)


def test_the_newest_and_the_best_are_kept(tmp_path):
    state, checkpoints = make_state(), Checkpointer(tmp_path, keep=2)
    for step, score in enumerate([70.0, 90.0, 80.0, None, 85.0], 1):
        with torch.no_grad():
            state.model[0].weight.fill_(step)
        checkpoints.save(step, state, SCHEDULE)
        checkpoints.add_score(step, state, SCHEDULE, score)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_0000000{step}" for step in (2, 4, 5)]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_00000002\n"
    assert latest_checkpoint(tmp_path).name == "step_00000005"
    assert torch.load(tmp_path / "best_model.pt", weights_only=True)["0.weight"].unique() == 2
    again = Checkpointer(tmp_path)
    again.resume(state, SCHEDULE)
    assert again.scores == checkpoints.scores == {1: 70.0, 2: 90.0, 3: 80.0, 4: None, 5: 85.0}
    again.save(6, state, SCHEDULE)
    again.add_score(6, state, SCHEDULE, float("nan"))
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_00000002\n" and again.scores[6] is None
    again.add_score(6, state, SCHEDULE, 91.0)
    assert (tmp_path / "checkpoints" / "best").read_text() == "step_00000006\n"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000005", "step_00000006"]
    assert [step for step in range(1, 10) if Checkpointer(tmp_path, every=2).due(step, SCHEDULE)] == [2, 4, 5, 6, 8]


def test_a_score_belongs_to_a_checkpoint(tmp_path):
    state, checkpoints = make_state(), Checkpointer(tmp_path)
    checkpoints.add_score(0, state, SCHEDULE, 50.0)  # before the first step
    checkpoints.save(2, state, SCHEDULE)
    checkpoints.add_score(3, state, SCHEDULE, 60.0)
    assert checkpoints.scores == {} and not (tmp_path / "best_model.pt").exists()
    checkpoints.add_score(2, state, SCHEDULE, 60.0)
    longer = Schedule(10, 2)  # as a run with half as many images per step counts
    again = Checkpointer(tmp_path)
    again.resume(make_state(schedule=longer), longer)
    assert again.scores == {4: 60.0}
    scores = tmp_path / "checkpoints" / "scores.json"
    for damaged in ("[]", "{", '{"steps_per_epoch": 0, "scores": {"a": 1}}', '{"steps_per_epoch": 5, "scores": 3}'):
        scores.write_text(damaged)
        assert again.resume(make_state(), SCHEDULE) == 2 and again.scores == {}


def test_a_new_run_in_the_same_folder_puts_the_old_one_aside(tmp_path, caplog):
    state = make_state()
    first = Checkpointer(tmp_path)
    for step in (1, 2):
        first.save(step, state, SCHEDULE)
    assert Checkpointer(tmp_path).start(state, SCHEDULE, resume=True) == 2
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    put_aside(tmp_path)
    assert Checkpointer(tmp_path).start(state, SCHEDULE, resume=False) == 0
    assert not list_checkpoints(tmp_path) and latest_checkpoint(tmp_path) is None
    assert (tmp_path / "checkpoints.old" / "latest").read_text() == "step_00000002\n"
    assert (tmp_path / "checkpoints.old" / "metrics.jsonl").read_text() == "{}\n"
    put_aside(tmp_path)  # nothing to do
    Checkpointer(tmp_path).save(3, state, SCHEDULE)
    put_aside(tmp_path)
    assert (tmp_path / "checkpoints.old.1" / "latest").read_text() == "step_00000003\n"
    with caplog.at_level(logging.INFO, "insightface_kprpe"):
        assert Checkpointer(tmp_path).start(state, SCHEDULE, resume=True) == 0
    assert "earlier runs are in its checkpoints.old, checkpoints.old.1" in caplog.text


def test_a_second_attempt_resumes_unless_the_first_failed_before_it_put_an_older_run_aside(tmp_path, monkeypatch):
    def resumes(resume):
        with open_run(tmp_path, resume) as decided:
            return decided

    def second_attempt():
        with monkeypatch.context() as context:
            context.setenv("TORCHELASTIC_RESTART_COUNT", "1")
            return resumes(False)

    assert not resumes(False)
    assert not second_attempt() and not second_attempt()
    put_aside(tmp_path)
    assert second_attempt()
    assert not resumes(False)
    assert resumes(True) and second_attempt()


def test_a_start_that_fails_leaves_an_older_run_as_it_is(tmp_path):
    trainer.train(tiny_config(tmp_path, "num_epoch=1"))
    assert all(value.is_contiguous() for value in weights(tmp_path).values())  # safetensors takes no others
    before = (tmp_path / "metrics.jsonl").read_bytes(), latest_checkpoint(tmp_path)
    for mistake in ("val_targets=lfw", "init_from=nowhere"):
        with pytest.raises((ValueError, FileNotFoundError)):
            trainer.train(tiny_config(tmp_path, mistake))
        assert before == ((tmp_path / "metrics.jsonl").read_bytes(), latest_checkpoint(tmp_path))


def test_learning_rate_and_weight_decay_are_the_configs(tmp_path):
    Checkpointer(tmp_path).save(3, make_state(), SCHEDULE)
    state = make_state()
    for group in state.optimizer.param_groups:
        group["weight_decay"] = 0.7
    state.scheduler.base_lrs = [0.5] * len(state.scheduler.base_lrs)
    Checkpointer(tmp_path).resume(state, SCHEDULE)
    expected = 0.5 * state.scheduler.lr_lambdas[0](3)
    assert all(group["lr"] == expected and group["weight_decay"] == 0.7 for group in state.optimizer.param_groups)


def test_steps_done_again_replace_what_an_earlier_attempt_left(tmp_path):
    state = make_state()
    first = Checkpointer(tmp_path, keep=3)
    for step in (1, 2, 3):
        first.save(step, state, SCHEDULE)
    Checkpointer(tmp_path).save(2, state, SCHEDULE)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002.1"]
    assert latest_checkpoint(tmp_path).name == "step_00000002.1"


def test_a_pointer_to_nothing_falls_back_to_the_newest(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    assert latest_checkpoint(tmp_path) is None and checkpoints.resume(make_state(), SCHEDULE) == 0
    checkpoints.save(1, make_state(), SCHEDULE)
    (tmp_path / "checkpoints" / "latest").write_text("../../etc")
    assert latest_checkpoint(tmp_path).name == "step_00000001"


def test_other_epochs_continue_where_as_much_was_seen(tmp_path):
    Checkpointer(tmp_path).save(7, make_state(), SCHEDULE)  # 1.4 epochs
    schedule = Schedule(10, 2)
    state = make_state(schedule=schedule)
    assert Checkpointer(tmp_path).resume(state, schedule) == 14
    expected = make_state(schedule=schedule)
    for _ in range(14):
        expected.optimizer.step()
        expected.scheduler.step()
    assert state.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"size": 6},
            r"belongs to another network or loss: .*\(5, 5\)|another network or loss: model.2.weight is \(4, 5\)",
        ),
        ({"classes": 9}, r"loss.class_centers is \(7, 4\), this run has \(9, 4\).* with init_from set"),
        ({"optimizer": "sgd"}, "was written with optimizer AdamW, this run has SGD"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    Checkpointer(tmp_path).save(1, make_state(), SCHEDULE)
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path).resume(make_state(**change), SCHEDULE)


@pytest.mark.parametrize("file", ["run.pt", ".metadata", "__0_0.distcp"])
def test_damage_is_said(tmp_path, file):
    state = make_state()
    take_steps(state, 1)
    Checkpointer(tmp_path).save(1, state, SCHEDULE)
    path = latest_checkpoint(tmp_path) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged"):
        Checkpointer(tmp_path).resume(make_state(), SCHEDULE)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("step", "three"), ("steps_per_epoch", 0), ("random", [{"python": 1}]), ("optimizer", None), ("scaler", [])],
)
def test_a_run_pt_of_something_else_is_said(tmp_path, entry, value):
    Checkpointer(tmp_path).save(1, make_state(), SCHEDULE)
    path = latest_checkpoint(tmp_path) / "run.pt"
    torch.save(torch.load(path) | {entry: value}, path)
    with pytest.raises(ValueError, match="step_00000001.* is damaged"):
        Checkpointer(tmp_path).resume(make_state(), SCHEDULE)


def test_the_index_cannot_run_code(tmp_path):
    Checkpointer(tmp_path).save(1, make_state(), SCHEDULE)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (latest_checkpoint(tmp_path) / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="damaged"):
        Checkpointer(tmp_path).resume(make_state(), SCHEDULE)
    assert not (tmp_path / "evil").exists()


# --- any number of ranks ---------------------------------------------------------------------------------------------


def steps_on_rank(rank, world_size, output, first, last):
    """Train on some steps of a global batch of 12 and save, as one of the ranks."""
    import torch.distributed as dist

    state = make_state()
    torch.manual_seed(1 + rank)
    checkpoints = Checkpointer(output, keep=9, asynchronous=True)
    assert checkpoints.resume(state, SCHEDULE) == first
    values = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 2, 2, generator=generator).chunk(world_size)[rank]
        labels = torch.randint(CLASSES, (BATCH,), generator=generator).chunk(world_size)[rank]
        loss = state.loss(state.model(images), labels)
        loss.backward()
        for parameter in state.model.parameters():
            if world_size > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.scheduler.step()
        values.append(loss.item())
    checkpoints.save(last, state, SCHEDULE)
    checkpoints.wait()
    return torch.tensor(values)


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path):
    """7 class centers on 4, then 3, 1, 2 and 6 ranks."""
    expected = torch.tensor(take_steps(make_state(), 10))
    found = []
    for first, last, world_size in ((0, 2, 4), (2, 4, 3), (4, 6, 1), (6, 8, 2), (8, 10, 6)):
        results = run_on_ranks(steps_on_rank, world_size, world_size, str(tmp_path), first, last)
        found.append(results[0])
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)


def train_on_rank(rank, output, batch_size, epochs, resume):
    """The real trainer for some epochs, without what depends on the number of ranks: chance and batch norms."""

    def steady(*args, **kwargs):
        net = get_model(*args, **kwargs)
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.train = lambda mode=True, layer=layer: layer
                layer.training = False
        return net

    def plain(batch, device, seed, augment):
        images, labels, keypoints = batch[:3]
        return images.float().div(127.5).sub(1), labels, keypoints

    get_model = build.get_model
    build.get_model, trainer.prepare = steady, plain
    overrides = [f"batch_size={batch_size}", "num_epoch=3", "num_image=77", "num_classes=7", f"resume={resume}"]
    overrides += [f"network_kwargs={ {**TINY, 'drop_path_rate': 0.0, 'mask_ratio': 0.0} }", "sample_rate=1.0"]
    overrides += ["loss=adaface", "async_save=True", "save_every=2"]
    config = tiny_config(output, *overrides)
    stop = epochs * (77 // 12)
    calls = iter(range(1 + int(latest_checkpoint(output).name[5:]) if resume else 1, 1000))
    StopSignal.agreed = lambda self: next(calls) == stop and stop < 18
    try:
        trainer.train(config)
    except SystemExit as error:
        assert error.code == 143
    return 0


@pytest.mark.slow
def test_a_run_goes_from_two_ranks_to_three_to_one(tmp_path):
    run_on_ranks(train_on_rank, 2, str(tmp_path / "whole"), 6, 3, False)
    for world_size, batch_size, epochs in ((2, 6, 1), (3, 4, 2), (1, 12, 3)):
        run_on_ranks(train_on_rank, world_size, str(tmp_path / "parts"), batch_size, epochs, world_size != 2)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert list(found) == list(expected) == list(range(1, 19))
    torch.testing.assert_close(list(found.values()), list(expected.values()), atol=2e-3, rtol=1e-4)
    assert found[18] < found[1]
    for key, value in weights(tmp_path / "parts").items():
        torch.testing.assert_close(value, weights(tmp_path / "whole")[key], atol=1e-3, rtol=1e-3)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def train_until_killed(output, kind, moment):
    """Train, and end this process by SIGKILL at the ``moment``-th "step" or "file" operation; 0: never."""
    calls = {"step": 0, "file": 0}

    def counted(function, counts):
        def call(*args, **kwargs):
            calls[counts] += 1
            if counts == kind and calls[counts] == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    torch.set_num_threads(1)
    trainer.train_step = counted(trainer.train_step, "step")
    for module, name in (
        (os, "replace"), (os, "fsync"), (torch, "save"), (checkpoint.shutil, "rmtree"), (checkpoint, "write_tensors"),
        (checkpoint.Checkpointer, "_write"), (files, "sync_folder"), (checkpoint, "sync_folder"),
    ):  # fmt: skip
        setattr(module, name, counted(getattr(module, name), "file"))
    overrides = ["resume=True", "num_epoch=2", "save_every=3", "async_save=True", "num_image=40"]
    overrides += [f"val_targets={Path(output).parent / 'pairs.bin'}", "verbose=4"]
    trainer.train(tiny_config(output, *overrides))
    (Path(output) / "calls.json").write_text(json.dumps(calls))


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_work_since_the_last_save(tmp_path):
    """20 kills, spread over as many runs as it takes, each of which ends as one that was left alone."""
    write_pairs(tmp_path / "pairs.bin")
    assert exit_code_of(train_until_killed, str(tmp_path / "whole"), "step", 0) == 0
    calls = json.loads((tmp_path / "whole" / "calls.json").read_text())
    expected, numbers = weights(tmp_path / "whole"), random.Random(0)
    kills = runs = status = 0
    while kills < 20 or status:
        output = tmp_path / f"run_{runs}"
        kind = numbers.choice(["step", "file"])
        moment = numbers.randint(1, calls[kind]) if kills < 20 else 0
        status = exit_code_of(train_until_killed, str(output), kind, moment)
        if status == -signal.SIGKILL:
            kills += 1
            continue
        assert status == 0
        runs += 1
        assert losses(output) == losses(tmp_path / "whole")
        assert accuracies(output) == accuracies(tmp_path / "whole") and list(accuracies(output)) == [4, 8, 10]
        for key, value in weights(output).items():
            assert torch.equal(value, expected[key]), key
        for file in ("best_model.pt", "checkpoints/scores.json"):
            assert (output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
        best = (output / "checkpoints" / "best").read_text().strip()
        assert {path.name for path in list_checkpoints(output)} >= {best, latest_checkpoint(output).name}
        assert {path.name[:13] for path in list_checkpoints(output)} == {best[:13], "step_00000009", "step_00000010"}
        left = {path.name for path in [*output.iterdir(), *(output / "checkpoints").iterdir()]}
        assert not [name for name in left if name.startswith(("pending", "."))]
    assert runs > 1
