"""Margin losses and PartialFC against the plain softmax cross-entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from insightface_kprpe.losses import AdaFace, ArcFace, CombinedMarginLoss, CosFace
from insightface_kprpe.partial_fc import PartialFC

from . import margins

CLASSES, WIDTH = 12, 6
STATISTICS = 21.0, 6.0  # of norms that a network has after a while


def trained_adaface(**settings) -> AdaFace:
    loss = AdaFace(**settings)
    loss.batch_mean.fill_(STATISTICS[0])
    loss.batch_std.fill_(STATISTICS[1])
    return loss.eval()


MARGINS = {
    "ArcFace": (ArcFace, margins.arcface()),
    "ArcFace, other margin and scale": (lambda: ArcFace(m=0.3, s=30.0), margins.arcface(0.3, 30.0)),
    "CosFace": (CosFace, margins.cosface()),
    "CosFace, other margin and scale": (lambda: CosFace(m=0.2, s=30.0), margins.cosface(0.2, 30.0)),
    "filtered ArcFace": (lambda: ArcFace(interclass_filtering_threshold=0.4), margins.arcface(threshold=0.4)),
    "filtered CosFace": (lambda: CosFace(interclass_filtering_threshold=0.3), margins.cosface(threshold=0.3)),
    "combined, as ArcFace": (lambda: CombinedMarginLoss(), margins.arcface()),
    "combined, as CosFace": (lambda: CombinedMarginLoss(32.0, 1.0, 0.0, 0.35, 0.6), margins.cosface(0.35, 32.0, 0.6)),
    "AdaFace": (trained_adaface, margins.adaface(*STATISTICS)),
    "AdaFace, other constants": (
        lambda: trained_adaface(m=0.3, h=0.2, s=32.0),
        margins.adaface(*STATISTICS, m=0.3, h=0.2, scale=32.0),
    ),
}


def draw_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines up to both ends of their range, a label on another rank, and norms beyond what counts."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-1, 1, (9, CLASSES))
    labels = rng.integers(0, CLASSES, 9)
    logits[np.arange(9), labels] = [-1, -0.9999, -0.7, -0.1, 0.2, 0.7, 0.9999, 1, 0.5]
    labels[8] = -1
    norms = np.array([5.0, 40, 0, 21, 24, 300, 18, 30, 20])
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), torch.tensor(norms, dtype=torch.float32)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("column", [False, True], ids=["(B,)", "(B, 1)"])
def test_values_and_gradients(name, column):
    build, margin = MARGINS[name]
    logits, labels, norms = draw_logits()
    expected = margin(logits.double().numpy(), labels.numpy(), norms.double().numpy())
    leaf = logits.clone().requires_grad_()
    out = build()(leaf, labels[:, None], norms[:, None]) if column else build()(leaf, labels, norms)
    np.testing.assert_allclose(out.detach(), expected.logits, atol=2e-4)  # an arc cosine near 1, times 64
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    np.testing.assert_allclose(leaf.grad, expected.slope * weights.numpy(), rtol=1e-5, atol=1e-6)


def test_adaface_statistics_follow_the_batches():
    loss = AdaFace()
    mean, std = 20.0, 100.0
    rng = np.random.default_rng(0)
    for batch in range(3):
        logits, labels, _ = draw_logits()
        norms = rng.uniform(0, 130, len(labels)).astype(np.float32)
        mean, std = margins.adaface_statistics(mean, std, np.float64(norms))
        out = loss(logits, labels, torch.tensor(norms))
        assert loss.batch_mean.item() == pytest.approx(mean, rel=1e-6), batch
        assert loss.batch_std.item() == pytest.approx(std, rel=1e-6), batch
        # The batch counts among the statistics that its own margins are made of.
        expected = margins.adaface(mean, std)(logits.double().numpy(), labels.numpy(), np.float64(norms))
        np.testing.assert_allclose(out, expected.logits, atol=2e-4)


def test_adaface_mixes_batches_by_t_alpha():
    loss = AdaFace(t_alpha=0.3)
    norms = np.array([10.0, 25.0, 31.0])
    loss.update_statistics(torch.tensor(norms))
    mean, std = margins.adaface_statistics(20.0, 100.0, norms, t_alpha=0.3)
    assert (loss.batch_mean.item(), loss.batch_std.item()) == pytest.approx((mean, std), rel=1e-6)


def draw_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings near their centers and far from them: a softmax that all terms count in."""
    rng = np.random.default_rng(2)
    centers, labels = rng.normal(size=(CLASSES, WIDTH)), np.array([0, 11, 4, 4, 7])
    embeddings = 8 * (np.array([[0.0, 0.3, 0.6, 1.0, 2.0]]).T * centers[labels] + rng.normal(size=(5, WIDTH)))
    return embeddings.astype(np.float32), centers.astype(np.float32), labels


@pytest.mark.parametrize("name", MARGINS)
def test_partial_fc(name):
    build, margin = MARGINS[name]
    embeddings, centers, labels = draw_batch()
    partial_fc = PartialFC(build(), WIDTH, CLASSES)
    partial_fc.class_centers.data.copy_(torch.tensor(centers))
    leaf = torch.tensor(embeddings, requires_grad=True)
    loss = partial_fc(leaf, torch.tensor(labels))
    (3 * loss).backward()
    expected = margins.softmax_loss(np.float64(embeddings), np.float64(centers), labels, margin)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-4) and expected.loss > 0.5
    np.testing.assert_allclose(leaf.grad, 3 * expected.embeddings, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(partial_fc.class_centers.grad, 3 * expected.centers, rtol=1e-3, atol=1e-4)


def test_partial_fc_gives_adaface_the_lengths_of_the_embeddings():
    embeddings, centers, labels = draw_batch()
    partial_fc = PartialFC(AdaFace(), WIDTH, CLASSES)
    partial_fc.class_centers.data.copy_(torch.tensor(centers))
    loss = partial_fc(torch.tensor(embeddings), torch.tensor(labels))
    statistics = margins.adaface_statistics(20.0, 100.0, np.linalg.norm(np.float64(embeddings), axis=1))
    margin = margins.adaface(*statistics)
    expected = margins.softmax_loss(np.float64(embeddings), np.float64(centers), labels, margin).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert partial_fc.margin_loss.batch_mean.item() == pytest.approx(statistics[0], rel=1e-6)


def test_partial_fc_over_a_sample_is_the_softmax_over_those_centers():
    """Which centers were drawn is seen by their gradient; the others are as if they were not there."""
    classes = 60
    rng = np.random.default_rng(3)
    embeddings, centers = rng.normal(size=(4, WIDTH)), rng.normal(size=(classes, WIDTH))
    labels = np.array([59, 7, 0, 7])
    torch.manual_seed(0)
    partial_fc = PartialFC(CosFace(m=0.1, s=4.0), WIDTH, classes, sample_rate=0.25)
    partial_fc.class_centers.data.copy_(torch.tensor(centers))
    drawn_in_steps = []
    for _ in range(30):
        leaf = torch.tensor(embeddings, dtype=torch.float32, requires_grad=True)
        partial_fc.zero_grad()
        loss = partial_fc(leaf, torch.tensor(labels))
        loss.backward()
        gradient = partial_fc.class_centers.grad.numpy()
        drawn = np.flatnonzero(np.abs(gradient).sum(1))
        assert len(drawn) == 15 and set(labels) <= set(drawn)
        expected = margins.softmax_loss(
            embeddings, centers[drawn], np.searchsorted(drawn, labels), margins.cosface(0.1, 4.0)
        )
        assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
        np.testing.assert_allclose(leaf.grad, expected.embeddings, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(gradient[drawn], expected.centers, rtol=1e-3, atol=1e-6)
        drawn_in_steps.append(drawn)
    assert len(set(np.concatenate(drawn_in_steps))) == classes  # each one has its turn


@pytest.mark.parametrize("name", ["arcface", "cosface", "arcface_filter", "adaface_warm"])
def test_plain_margins_are_the_reference_ones(golden, name):
    file = golden("margin_losses.npz")
    labels, norms = file["labels"].reshape(-1), np.float64(file["norms"].reshape(-1))
    margin = {
        "arcface": margins.arcface(),
        "cosface": margins.cosface(),
        "arcface_filter": margins.arcface(threshold=0.4),
        "adaface_warm": margins.adaface(*margins.adaface_statistics(19.0, 7.0, norms)),
    }[name]
    logits, slope = margin(np.float64(file["logits"]), labels, norms)
    np.testing.assert_allclose(logits, file[name], atol=1e-4)
    np.testing.assert_allclose(2 * logits * slope / 1000, file[f"{name}_grad"], atol=1e-4)  # of their squares' sum
