"""The plan of a run against a real step of it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.backbones import get_model
from insightface_kprpe.partial_fc import PartialFC
from insightface_kprpe.training.build import margin_loss
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.memory import LiveBytes, forward_flops
from insightface_kprpe.training.plan import format_plan, plan_training
from insightface_kprpe.training.state import Schedule, build_state
from insightface_kprpe.training.trainer import main, train_step

SMALL = {"embedding_size": 64, "num_image": 1000, "optimizer": "adamw"}


def small_config(**changes):
    config = load_config("base")
    kwargs = {"depth": 2, "drop_path_rate": 0.1, **changes.pop("network_kwargs", {})}
    config.update({**SMALL, "network": "vit_n", "network_kwargs": kwargs, "batch_size": 16, **changes})
    return config


def measured_peak(config) -> int:
    """Largest number of bytes of tensors alive in two real steps on the CPU."""
    torch.manual_seed(0)
    with LiveBytes() as live:
        net = get_model(config.network, num_features=config.embedding_size, **config.network_kwargs)
        if config.gradient_checkpointing:
            net.set_grad_checkpointing()
        loss = PartialFC(margin_loss(config), config.embedding_size, config.num_classes, config.sample_rate)
        state = build_state(config, net, loss, Schedule(10, 1), torch.device("cpu"))
        images = torch.rand(config.batch_size, 3, 112, 112)
        batch = images, torch.arange(config.batch_size), torch.rand(16, 5, 2)
        for _ in range(2):  # moments are made by the first
            train_step(net.train(), [batch] * config.gradient_acc, state, config)
    return live.peak


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 100},
        {"num_classes": 100, "network": "vit_n_kprpe", "precision": "bf16"},
        {"num_classes": 100, "network": "vit_n_irpe", "gradient_checkpointing": True, "network_kwargs": {"depth": 3}},
        {"num_classes": 60_000, "network": "vit_n_kprpe", "network_kwargs": {"mask_ratio": 0.2}},
        {"num_classes": 60_000, "sample_rate": 0.5, "optimizer": "sgd", "loss": "adaface"},
        {"num_classes": 60_000, "sample_rate": 0.1, "embedding_size": 16},
        {"num_classes": 10_000, "sample_rate": 0.5, "loss": "adaface", "gradient_acc": 2},
    ],
    ids=str,
)
def test_peak_memory_is_that_of_a_real_step(changes):
    config = small_config(**changes)
    assert plan_training(config).peak == pytest.approx(measured_peak(config), rel=0.15)


def test_logits_of_a_large_batch_dominate_as_measured():
    """Without a network: 1,024 images by 20,000 people with rows of 8."""
    loss = PartialFC(margin_loss(small_config(loss="adaface")), 8, 20_000)
    with LiveBytes() as live:
        embeddings = torch.rand(1024, 8, requires_grad=True)
        loss(embeddings, torch.arange(1024)).backward()
    config = small_config(batch_size=1024, num_classes=20_000, embedding_size=8, num_image=2048)
    planned = plan_training(config, 1).memory
    logits = next(size for name, size in planned.items() if name.startswith("logits"))
    assert logits == 4 * 1024 * 20_000 * 4
    assert live.peak == pytest.approx(logits, rel=0.05)


def test_more_gpus_share_class_centers_and_not_the_network():
    config = small_config(num_classes=10_001, sample_rate=0.5)
    one, four = plan_training(config, 1), plan_training(config, 4)
    assert one.memory["class centers (10,001)"] == 10_001 * 64 * 4
    assert four.memory["class centers (2,501)"] == 2_501 * 64 * 4
    assert four.memory["network: weights"] == one.memory["network: weights"] == one.parameters * 4
    assert four.memory["network: DDP's gradient buckets"] == one.parameters * 4
    assert not one.memory["network: DDP's gradient buckets"]
    assert (one.steps_per_epoch, four.steps_per_epoch) == (1000 // 16, 1000 // 64)


def test_hours():
    config = small_config(num_classes=10, num_image=3200, num_epoch=9, batch_size=32, gradient_acc=2)
    plan = plan_training(config, world_size=5, images_per_second=4.0)
    assert plan.steps_per_epoch == 10
    assert plan.hours == pytest.approx(10 * 9 * 320 / (4 * 5) / 3600)
    assert "0.4 hours at 20 images/s" in format_plan(plan)


def test_flops_of_known_layers():
    class Net(torch.nn.Sequential):
        finds_keypoints = False

        def forward(self, images, keypoints):
            return super().forward(images)

    def build():
        return Net(torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 10))

    assert forward_flops(build) == 2 * (49 * 8 * 3 * 256 + 8 * 49 * 10)


def test_flops_do_not_depend_on_where_keypoints_act():
    def flops(name):
        return forward_flops(lambda: get_model(name, num_features=64))

    plain = flops("vit_n")
    tables = 2 * (8 + 10) * 6 * 4 * 49  # KPRPE adds linear maps of 8 grid columns and of a face's ten coordinates
    assert flops("vit_n_kprpe") == plain + tables


def test_a_large_run_is_planned_in_no_memory():
    config = load_config(
        "wf4m_vit_l_kprpe", ["num_classes=100000000", "num_image=1000000000", "network_kwargs={'depth': 2}"]
    )
    plan = plan_training(config, world_size=64, images_per_second=500)
    assert plan.class_center_parameters == 100_000_000 * 512
    assert plan.peak > 100_000_000 / 64 * 512 * 4 * 4  # centers, gradients and two moments
    assert "100,000,000 class centers" in format_plan(plan)


@pytest.mark.parametrize(
    ("changes", "world_size", "speed", "message"),
    [
        ({"num_classes": 10}, 0, None, "must be positive"),
        ({"num_classes": 10}, 1, -1.0, "must be positive"),
        ({"num_classes": 10}, 100, None, "must be at least one step of 1600 images"),
        ({"num_classes": 3}, 8, None, "at least the world size"),
        ({"num_classes": 0, "rec": "nowhere"}, 1, None, "pass num_classes=N and num_image=N"),
    ],
)
def test_bad_input(changes, world_size, speed, message):
    with pytest.raises(ValueError, match=message):
        plan_training(small_config(**changes), world_size, speed)


def test_train_v2_plans_as_the_verb_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["num_classes=10", "num_image=320", "network_kwargs={'depth': 1}"]
    options = ["--world-size", "2", "--images-per-second", "50"]
    monkeypatch.setattr(sys, "argv", ["train_v2.py", "quickstart", "--plan", *overrides, *options])
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "train_v2.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "on 2 GPUs" in printed and "at 100 images/s on all GPUs" in printed
    result = CliRunner().invoke(cli.app, ["train", "quickstart", "--plan", *overrides, *options])
    assert result.output == printed
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="error: world size and images per second must be positive, got 0"):
        main(["quickstart", *overrides, "--plan", "--world-size=0"])
