"""torchrun as on a cluster: a worker that dies, and two nodes, against the same run without them."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from distributed import run_on_ranks
from test_trainer import ROOT, TINY_RUN, losses, tiny_config, weights

from insightface_kprpe.training import trainer
from insightface_kprpe.training.checkpoint_files import list_checkpoints

pytestmark = pytest.mark.slow

RUN = ["batch_size=4", "save_every=3", "async_save=True"]

# Rank 1 dies the first time, at some call of a function.
DYING = """
import os, signal, sys
from insightface_kprpe.training import checkpoint, trainer

module, name, at = {"step": (trainer, "train_step", 6), "save": (checkpoint, "write_tensors", 2)}[sys.argv.pop(1)]
calls, function = 0, getattr(module, name)

def dying(*args):
    global calls
    calls += 1
    if calls == at and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)

setattr(module, name, dying)
trainer.main()
"""


def train_on_rank(rank, output):
    trainer.train(tiny_config(output, *RUN))
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    run_on_ranks(train_on_rank, 2, str(output))
    return output


def launch(script, output, *options, end=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *options, *script, "quickstart", *TINY_RUN, *RUN]
    return subprocess.Popen(
        [*command, f"output={output}", *end],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def check(output, whole):
    found, expected = losses(output), losses(whole)
    assert list(found) == list(expected)
    torch.testing.assert_close(list(found.values()), list(expected.values()), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(weights(output), weights(whole), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_worker_restarts_the_group_from_the_last_checkpoint(tmp_path, whole, moment):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    run = launch([str(script), moment], tmp_path / "run", "--standalone", "--nproc_per_node=2", "--max_restarts=1")
    text = run.communicate(timeout=240)[0]
    assert run.returncode == 0, text
    assert "Signal 9 (SIGKILL)" in text or "exitcode: -9" in text, text
    assert "resumed from" in text and "step_00000003" in text, text
    check(tmp_path / "run", whole)


def test_a_signal_to_torchrun_reaches_the_ranks_and_saves(tmp_path):
    """What a scheduler signals is torchrun."""
    run = launch([str(ROOT / "train_v2.py")], tmp_path, "--standalone", "--nproc_per_node=2", end=["num_epoch=10000"])
    lines = []
    for line in run.stdout:
        lines.append(line)
        if " step 2/" in line:
            break
    run.send_signal(signal.SIGTERM)
    text = "".join(lines) + run.communicate(timeout=240)[0]
    assert run.returncode, text
    stopped = re.search(r"stopped by a signal after step (\d+)", text)
    assert stopped, text
    assert list_checkpoints(tmp_path)[-1].name == f"step_{int(stopped[1]):08d}"


def test_two_nodes_train_as_one(tmp_path, whole):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test"]
    options += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    nodes = [launch([str(ROOT / "train_v2.py")], tmp_path / "run", *options) for _ in range(2)]
    for node in nodes:
        text = node.communicate(timeout=240)[0]
        assert node.returncode == 0, text
    check(tmp_path / "run", whole)
