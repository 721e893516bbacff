"""Statistics of norms, and what they are compared with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from insightface_kprpe.geometry import CANONICAL_KEYPOINTS
from insightface_kprpe.losses import AdaFace, ArcFace
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.norm_watch import NormWatch, correlation, sharpness
from insightface_kprpe.training.trainer import train


def test_sharpness_is_the_variance_of_the_laplacian_of_the_middle():
    images = torch.zeros(3, 3, 112, 112)
    images[0, :, :20, :20] = 1  # an edge outside the middle
    images[1, :, 50, 50] = 1  # a dot: -4 there and 1 around it
    images[2] = torch.linspace(0, 1, 112)  # a ramp has no second derivative
    expected = (4.0**2 + 4) / (54 * 54 - 1)
    assert sharpness(images) == pytest.approx([0.0, expected, 0.0], abs=1e-6)


def test_correlation():
    a = torch.tensor([1.0, 2, 3, 5])
    assert correlation(a, 2 * a - 1) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)
    assert correlation(torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])) == pytest.approx(0)


def test_values_over_two_batches():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(8, 3, 112, 112, generator=generator) * torch.arange(1.0, 9)[:, None, None, None]
    moved = torch.tensor(CANONICAL_KEYPOINTS) + torch.arange(1.0, 9)[:, None, None] * torch.tensor([0.03, 0.04])
    norms = torch.arange(8.0, 0, -1)  # the sharper, and the further from the template, the shorter
    loss = AdaFace(m=0.4, h=0.333)
    loss.batch_mean.fill_(4.0), loss.batch_std.fill_(2.0)
    watch = NormWatch(loss)
    for part in (slice(0, 4), slice(4, 8)):
        watch(noise[part], moved[part], torch.diag(norms)[part])
    seen = watch.values()
    assert seen["norm/mean"] == pytest.approx(4.5) and seen["norm/std"] == pytest.approx(norms.std().item())
    assert (seen["norm/running_mean"], seen["norm/running_std"]) == (4.0, 2.0)
    z = (0.333 * (norms - 4) / 2.001).clamp(-1, 1).mean().item()
    assert seen["margin/quality_mean"] == pytest.approx(z, abs=1e-5)
    assert seen["margin/mean"] == pytest.approx(0.4 * (1 + z), abs=1e-5)
    assert seen["correlation/norm_sharpness"] < -0.9
    assert seen["correlation/norm_alignment"] == pytest.approx(1, abs=1e-5)
    watch(noise, None, torch.diag(norms))
    assert watch.values()["norm/mean"] == pytest.approx(4.5)  # of the new batch alone


def test_what_has_no_value_is_left_out():
    watch = NormWatch(ArcFace())
    watch(torch.zeros(4, 3, 112, 112), torch.tensor(CANONICAL_KEYPOINTS).expand(4, -1, -1), torch.eye(4))
    assert watch.values() == {"norm/mean": 1.0, "norm/std": 0.0}


def test_training_logs_it_every_frequent_steps(tmp_path):
    settings = {
        "num_classes": 4, "num_image": 40, "batch_size": 4, "gradient_acc": 2, "num_epoch": 1, "num_workers": 0,
        "frequent": 2, "val_targets": (), "network": "vit_n", "network_kwargs": {"depth": 1}, "embedding_size": 16,
        "loss": "adaface", "rec": "synthetic", "output": str(tmp_path), "warmup_epoch": 0.0,
    }  # fmt: skip
    train(load_config("base", [f"{key}={value!r}" for key, value in settings.items()]))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if "norm/mean" in row]
    assert [row["step"] for row in seen] == [2, 4]
    assert {"norm/running_mean", "margin/mean", "correlation/norm_sharpness", "correlation/norm_alignment"} <= set(
        seen[0]
    )
    values = [[row["norm/mean"], row["margin/mean"], row["correlation/norm_sharpness"]] for row in seen]
    assert (np.diff(values, axis=0) != 0).all()  # each row is of its own steps
