"""What training makes of broken inputs, helpers that fail, full disks, signals, and a second run in its folder."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from distributed import exit_code_of
from filelock import FileLock
from test_dfa_training import write_faces
from test_trainer import TINY_RUN, accuracies, tiny_config, weights, write_pairs
from torch.utils.data import Dataset

from insightface_kprpe.data.sampler import EpochSampler
from insightface_kprpe.data.verification_bin import read_verification_bin, write_verification_bin
from insightface_kprpe.training import checkpoint, landmark_trainer, loop, metrics, trainer
from insightface_kprpe.training.callbacks import StopSignal
from insightface_kprpe.training.checkpoint_files import latest_checkpoint, list_checkpoints
from insightface_kprpe.training.command_line import start_logging
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.metrics import Metrics
from insightface_kprpe.training.run_folder import TrainingError, open_run
from insightface_kprpe.training.run_report import read_metrics, report_run

SHORT = ["num_image=32", "num_epoch=1"]

# --- what a run will read is looked at before it starts --------------------------------------------------------------


def few(path):
    write_pairs(path, 8)


def one_kind(path):
    write_verification_bin(path, read_verification_bin(write_pairs(path)).images, [True] * 20)


def truncated(path):
    images = read_verification_bin(write_pairs(path)).images
    write_verification_bin(path, [*images[:-1], images[-1][:500]], [True, False] * 10)


def other_size(path):
    write_pairs(path, size=96)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (few, "it must hold at least 10 pairs, one per fold, got 8"),
        (one_kind, "it must hold pairs of the same person and of different people, got 20 of the same person only"),
        (truncated, "image 39: the JPEG is truncated"),
        (other_size, "image 0 must be 112 x 112 pixels, got 96 x 96"),
    ],
)
def test_a_verification_set_of_no_use_is_refused_before_the_first_step(tmp_path, spoil, message):
    trainer.train(tiny_config(tmp_path / "run", *SHORT))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes(), latest_checkpoint(tmp_path / "run")
    spoil(tmp_path / "pairs.bin")
    where = re.escape(str(tmp_path / "pairs.bin"))
    with pytest.raises(ValueError, match=f"val_targets: {where}: .*{message}.*; replace the file, or remove it"):
        trainer.train(tiny_config(tmp_path / "run", *SHORT, f"val_targets={tmp_path / 'pairs.bin'}"))
    assert before == ((tmp_path / "run" / "metrics.jsonl").read_bytes(), latest_checkpoint(tmp_path / "run"))


def test_two_sets_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    sets = str(write_pairs(tmp_path / "pairs.bin")), str(write_pairs(tmp_path / "other" / "pairs.bin"))
    with pytest.raises(ValueError, match="val_targets must have different names, got pairs, pairs"):
        trainer.train(tiny_config(tmp_path / "run", f"val_targets={sets}"))


@pytest.mark.parametrize("key", ["data", "val"])
def test_a_landmark_picture_that_is_none_is_refused_before_the_first_step(tmp_path, key):
    for folder in ("data", "val"):
        write_faces(tmp_path / folder, 9)
    (tmp_path / key / "images" / "3.png").write_bytes(b"no image")
    overrides = [f"data={tmp_path / 'data'}", f"val={tmp_path / 'val'}", "batch_size=8", "image_size=32"]
    config = load_config("dfa_small", [*overrides, f"output={tmp_path / 'run'}"], base="dfa_base")
    with pytest.raises(ValueError, match=r"3\.png is not a readable image; restore the file"):
        landmark_trainer.train_dfa(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch_size=1"], "batch_size must be at least 2 for vit_n_kprpe, whose head normalizes"),
        (["network_kwargs={'depht': 2}"], "has no argument 'depht'; did you mean depth"),
        (["network_kwargs={'depth': 'a'}"], "network_kwargs must fit vit_n_kprpe, got .*'a'"),
        (["network_kwargs={'num_heads': 5}"], "network_kwargs must fit vit_n_kprpe"),
        (["network_kwargs={'embed_dim': -8}"], "network_kwargs must fit vit_n_kprpe"),
        (["margin_list=(1, 0.5, 0.5)", "loss=margin"], "margin_list: margins must be"),
    ],
)
def test_settings_that_do_not_fit_the_network_are_one_sentence(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny_config(tmp_path, *overrides))


# --- helpers that fail -----------------------------------------------------------------------------------------------


class Failing:
    """A run of wandb, or a writer of TensorBoard, that fails at some call."""

    id = "id"

    def __init__(self, fails):
        self.fails, self.calls = fails, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == self.fails:
                raise ConnectionError("the network is gone")

        return call


@pytest.mark.parametrize("fails", ["log", "log_artifact", "finish"])
def test_a_run_outlives_wandb(tmp_path, monkeypatch, caplog, fails):
    module, run = types.ModuleType("wandb"), Failing(fails)
    module.init, module.Artifact = lambda **_: run, lambda *_, **__: Failing(None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    trainer.train(tiny_config(tmp_path, *SHORT, "using_wandb=True", "save_artifacts=True"))
    assert list_checkpoints(tmp_path)[-1].name == "step_00000004"
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "Weights & Biases failed" in record.message and "ConnectionError: the network is gone" in record.message
    assert run.calls.count(fails) == 1 and (run.calls[-1] == "finish" or fails == "log")


def test_wandb_that_cannot_be_reached_is_said_before_the_first_step(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")
    module.init = Failing("init").init
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match="using_wandb must be False where .*ConnectionError.*WANDB_MODE=offline"):
        trainer.train(tiny_config(tmp_path, *SHORT, "using_wandb=True"))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("fails", ["add_scalar", "close"])
def test_a_run_outlives_tensorboard(tmp_path, monkeypatch, caplog, fails):
    sink = metrics.TensorBoard.__new__(metrics.TensorBoard)
    sink.writer = Failing(fails)
    monkeypatch.setattr(metrics, "TensorBoard", lambda output: sink)
    trainer.train(tiny_config(tmp_path, *SHORT, "tensorboard=True"))
    assert sink.writer.calls.count(fails) == 1 and "TensorBoard failed" in caplog.text
    assert list_checkpoints(tmp_path)[-1].name == "step_00000004"


def test_metrics_that_cannot_be_written_are_said_once(tmp_path, caplog):
    with Metrics(tmp_path) as numbers:
        numbers.write(1, loss=1.0)
        numbers.path.unlink()
        numbers.path.mkdir()
        for step in (2, 3):
            numbers.write(step, loss=1.0)
        numbers.path.rmdir()
        numbers.write(4, loss=0.5)
    assert [json.loads(line)["step"] for line in numbers.path.read_text().splitlines()] == [4]
    (record,) = caplog.records
    assert "metrics.jsonl cannot be written, training continues: Is a directory" in record.message


def test_old_metrics_may_hold_anything(tmp_path):
    lines = ['{"step": 1, "loss": 2.0}', "[]", '{"step": "a"}', "[" * 100_000, "\xff", '{"step": null}', '{"step": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="latin-1")
    Metrics(tmp_path, from_step=3)
    assert (tmp_path / "metrics.jsonl").read_text() == lines[0] + "\n"


def test_a_report_says_what_is_missing_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ImportError, match=r"insightface-kprpe\[plots\]"):
        report_run(tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_report_of_damaged_files(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [
        '{"step": 1, "loss": 2.0, "lr": "a", "epoch": NaN}',
        "[3]",
        '{"loss": 1}',
        '{"step": [], "loss": 1}',
        "\xff",
    ]
    lines += [
        f'{{"step": 2, "loss": 1{"0" * 400}}}',
        '{"step": 3, "loss": 1.5, "norm/mean": 1, "note": {}}',
        "[" * 99999,
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines), encoding="latin-1")
    series = read_metrics(tmp_path / "metrics.jsonl")
    assert series["loss"][0].tolist() == [1, 3] and series.keys() == {"loss", "norm/mean"}
    assert report_run(tmp_path)[-1].is_file()
    for damaged in ("{", "[1]", "[" * 99999):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json .*; remove it"):
            report_run(tmp_path)


# --- a full disk -----------------------------------------------------------------------------------------------------


def train_with_little_room(output, *overrides):
    """Train where no file may be larger than 20 kB; what the command line says is written next to the folder."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        trainer.main(["quickstart", *TINY_RUN, f"output={output}", "resume=True", *overrides])
    except SystemExit as error:
        Path(f"{output}.message").write_text(str(error.code))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint_whole(tmp_path, asynchronous):
    output, overrides = tmp_path / "run", (*SHORT, f"async_save={asynchronous}")
    assert exit_code_of(train_with_little_room, str(output), *overrides) == 0
    message = (tmp_path / "run.message").read_text()
    assert re.fullmatch(
        r"error: the checkpoint of step 4 could not be written to \S+/run/checkpoints: File too large \(it needs "
        r"\d+\.\d MB, \d+\.\d GB are free\); there is no earlier one; free some space, or choose another output",
        message,
    )
    assert not list_checkpoints(output) and not (output / "model.pt").exists()

    trainer.train(tiny_config(output, *overrides))
    before = weights(output)
    assert exit_code_of(train_with_little_room, str(output), *overrides, "num_epoch=2") == 0
    message = (tmp_path / "run.message").read_text()
    assert (
        message.endswith("step_00000004 is complete: free some space and continue with resume=True")
        and message.count("\n") == 0
    )
    left = [path.name for path in output.rglob("*") if path.name.startswith(("pending", "."))]
    assert [path.name for path in list_checkpoints(output)] == ["step_00000004"] and left == [".metadata"]
    assert all(torch.equal(value, before[key]) for key, value in weights(output).items())
    trainer.train(tiny_config(output, *overrides, "num_epoch=2", "resume=True"))
    assert latest_checkpoint(output).name == "step_00000008"


def test_a_best_model_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    save = checkpoint.save_model

    def full(path, state):
        if path.name == "best_model.pt":
            raise OSError(28, "No space left on device")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save_model", full)
    trainer.train(tiny_config(tmp_path / "run", *SHORT, f"val_targets={write_pairs(tmp_path / 'pairs.bin')}"))
    assert "the best checkpoint could not be written to" in caplog.text and "No space left on device" in caplog.text
    assert list(accuracies(tmp_path / "run")) == [4]


def test_a_validation_does_not_hide_a_checkpoint_that_failed_in_the_background(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    overrides = [*SHORT, "async_save=True", f"val_targets={write_pairs(tmp_path / 'pairs.bin')}"]
    with pytest.raises(TrainingError, match="the checkpoint of step 4 could not be written"):
        trainer.train(tiny_config(tmp_path / "run", *overrides))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: the folder of the run could not be written to .*file: File exists"):
        trainer.main(["quickstart", f"output={tmp_path / 'file'}"])


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    start_logging(tmp_path, rank=0)
    handler = next(h for h in logging.getLogger("insightface_kprpe").handlers if isinstance(h, logging.FileHandler))
    handler.setStream(FullDisk())
    for _ in range(3):
        logging.getLogger("insightface_kprpe").info("a line")
    output = capsys.readouterr()
    assert output.out.count("a line") == 3 and "Traceback" not in output.err
    assert output.err.count("training.log cannot be written: [Errno 28] No space left on device") == 1


# --- one run a folder ------------------------------------------------------------------------------------------------


def hold(output, seconds):
    with open_run(Path(output), True):
        (Path(output) / "held").touch()
        time.sleep(seconds)


def start(function, *args):
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    first = start(hold, str(tmp_path), 600)
    try:
        wait_for(tmp_path / "held")
        message = (
            f"another run is writing to {tmp_path}: process {first.pid} on {socket.gethostname()}; wait for it, stop"
        )
        with pytest.raises(TrainingError, match=re.escape(message)):
            trainer.train(tiny_config(tmp_path))
        assert not (tmp_path / "metrics.jsonl").exists()
    finally:
        first.kill()
        first.join()
    trainer.train(tiny_config(tmp_path, *SHORT))
    assert not list(tmp_path.glob(".lock*"))


def test_readers_that_outlive_a_killed_run_are_waited_for(tmp_path):
    gone = start(hold, str(tmp_path / "other"), 0)
    gone.join()
    lock = FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    holder = tmp_path / ".lock_holder.json"
    holder.write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    threading.Timer(0.3, lock.release).start()
    with open_run(tmp_path, True):
        assert json.loads(holder.read_text())["pid"] == os.getpid()
        holder.write_text("{")  # as another run finds it at a bad moment
        with pytest.raises(TrainingError, match="a process that has just started"), open_run(tmp_path, True):
            pass


# --- signals ---------------------------------------------------------------------------------------------------------


def train_slowly(output, seconds):
    """Each step takes some time more; the folder tells when the second has begun."""
    step = trainer.train_step

    def slow(*args):
        loss = step(*args)
        if list_checkpoints(output):
            (Path(output) / "slow").touch()
            time.sleep(seconds)
        return loss

    trainer.train_step = slow
    trainer.main(["quickstart", *TINY_RUN, f"output={output}", "save_every=1"])


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(tmp_path):
    run = start(train_slowly, str(tmp_path), 0.5)
    wait_for(tmp_path / "slow")
    os.kill(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode == loop.EXIT_INTERRUPTED == 130
    log = (tmp_path / "training.log").read_text()
    step = int(re.search(r"stopped by a signal after step (\d+); continue with resume=True", log)[1])
    assert latest_checkpoint(tmp_path).name == f"step_{step:08d}"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path):
    run = start(train_slowly, str(tmp_path), 600)
    wait_for(tmp_path / "slow")
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    assert run.is_alive()
    os.kill(run.pid, signal.SIGINT)
    run.join(30)
    assert run.exitcode == -signal.SIGINT  # which a shell calls 130
    assert latest_checkpoint(tmp_path).name == "step_00000001"


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_every_signal_that_asks_a_run_to_stop_is_remembered(number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), number)
            assert stop.agreed() == number
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before[0]), signal.signal(signal.SIGHUP, before[1])


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


def test_a_reader_that_a_signal_ends_does_not_disturb_the_rank(monkeypatch):
    """As when a checkpoint takes longer than readers go on after a signal to all processes."""
    monkeypatch.setattr(loop, "WORKER_GRACE", 1)
    before = set(multiprocessing.active_children())
    loader = loop.build_loader(Numbers(), EpochSampler(8, 2), 1, torch.device("cpu"), 0)
    batches = iter(loader)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - before
    os.kill(reader.pid, signal.SIGINT)
    os.kill(reader.pid, signal.SIGTERM)
    next(batches)  # a batch more may be needed before the rank stops
    deadline = time.monotonic() + 60
    while reader.is_alive():  # torch would raise here that a reader was killed
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert reader.exitcode == 0


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupted)
    with pytest.raises(SystemExit) as stop:
        trainer.main(["quickstart", f"output={tmp_path}"])
    assert stop.value.code == 130


# --- what the command line says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a setting"), "error: a setting"),
        (PermissionError(13, "Permission denied", "x/y"), "error: [Errno 13] Permission denied: 'x/y'"),
        (EOFError(), "error: EOFError"),
        (KeyError("files"), "error: KeyError: 'files' (INSIGHTFACE_KPRPE_DEBUG=1 in the environment "),
        (
            RuntimeError("CUDA out of memory"),
            "error: CUDA out of memory (INSIGHTFACE_KPRPE_DEBUG=1 in the environment ",
        ),
    ],
)
def test_errors_are_one_sentence_or_a_traceback_where_it_is_asked_for(tmp_path, monkeypatch, error, message):
    def fail(config):
        raise error

    arguments = ["quickstart", f"output={tmp_path}"]
    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}"):
        trainer.main(arguments)
    monkeypatch.setenv("INSIGHTFACE_KPRPE_DEBUG", "1")
    with pytest.raises(type(error)):
        trainer.main(arguments)
