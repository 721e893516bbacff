import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from distributed import run_on_ranks
from torch.nn.parallel import DistributedDataParallel

from insightface_kprpe.losses import AdaFace, ArcFace, CosFace
from insightface_kprpe.partial_fc import PartialFC, shard_range

CLASSES, SIZE, BATCH = 7, 8, 6


def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 5, generator=generator)
    labels = torch.tensor([0, 6, 3, 3, 5, 1])
    centers = torch.randn(CLASSES, SIZE, generator=generator)
    weight = torch.randn(SIZE, 5, generator=generator) * 8
    return images, labels, centers, weight


def run(rank, world_size, margin):
    """Loss and gradients of one step, the batch shared among the ranks."""
    images, labels, centers, weight = data()
    loss = {"adaface": AdaFace, "arcface": ArcFace}[margin]()
    partial_fc = PartialFC(loss, SIZE, CLASSES)
    first, count = shard_range(CLASSES, rank, world_size)
    backbone = nn.Linear(5, SIZE, bias=False)
    with torch.no_grad():
        partial_fc.class_centers.copy_(centers[first : first + count])
        backbone.weight.copy_(weight)
    network = DistributedDataParallel(backbone) if world_size > 1 else backbone
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    value = partial_fc(network(images[share]), labels[share])
    value.backward()
    return {
        "loss": value.detach(),
        "backbone": backbone.weight.grad,
        "centers": partial_fc.class_centers.grad,
        **loss.state_dict(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("margin", ["arcface", "adaface"])
def test_two_ranks_equal_one(margin):
    one = run(0, 1, margin)
    two = run_on_ranks(run, 2, 2, margin)
    for key in one.keys() - {"centers"}:  # losses, backbone gradients, AdaFace's statistics: equal on all ranks
        for rank in two:
            torch.testing.assert_close(rank[key], one[key], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([rank["centers"] for rank in two]), one["centers"], atol=1e-5, rtol=1e-5)


def test_one_rank_equals_a_plain_softmax():
    images, labels, centers, _ = data()
    embeddings = torch.randn(BATCH, SIZE).requires_grad_()
    partial_fc = PartialFC(CosFace(), SIZE, CLASSES)
    partial_fc.class_centers.data.copy_(centers)
    value = partial_fc(embeddings, labels)
    value.backward()

    plain = embeddings.detach().clone().requires_grad_()
    weight = centers.clone().requires_grad_()
    logits = F.normalize(plain) @ F.normalize(weight).T
    expected = F.cross_entropy(64 * (logits - 0.4 * F.one_hot(labels, CLASSES)), labels)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(embeddings.grad, plain.grad)
    torch.testing.assert_close(partial_fc.class_centers.grad, weight.grad)


def test_sampling_keeps_the_positives_and_only_moves_sampled_centers():
    torch.manual_seed(0)
    partial_fc = PartialFC(CosFace(), SIZE, 100, sample_rate=0.1)
    labels = torch.tensor([3, 99, 3, 42])
    for _ in range(20):
        index = partial_fc._sample(labels)
        assert len(index) == 10 and len(index.unique()) == 10
        assert set(labels.tolist()) <= set(index.tolist())
    given = labels.clone()
    partial_fc(torch.randn(4, SIZE), labels).backward()
    assert torch.equal(labels, given)
    assert (partial_fc.class_centers.grad.abs().sum(1) > 0).sum() <= 10


def test_more_positives_than_the_sample_has_room_for():
    partial_fc = PartialFC(CosFace(), SIZE, 20, sample_rate=0.1)
    labels = torch.arange(10)
    assert torch.equal(partial_fc._sample(labels), labels)
    assert partial_fc(torch.randn(10, SIZE), labels).isfinite()


def test_labels_of_other_ranks_are_kept_apart():
    partial_fc = PartialFC(CosFace(), SIZE, 5, sample_rate=0.5)
    partial_fc.first_class = 10  # as if other ranks had those below
    assert partial_fc._local_labels(torch.tensor([9, 10, 14, 15])).tolist() == [-1, 0, 4, -1]
    assert set(partial_fc._sample(torch.tensor([-1, 4, -1])).tolist()) > {4}


@pytest.mark.parametrize("label", [-1, 5, 10**9])
def test_labels_of_nobody_are_refused(label):
    partial_fc = PartialFC(CosFace(), SIZE, 5)
    with pytest.raises(ValueError, match=rf"labels must be in \[0, num_classes\), got {label} with num_classes=5"):
        partial_fc(torch.randn(2, SIZE), torch.tensor([0, label]))
    with pytest.raises(ValueError, match="labels must be"), partial_fc.one_batch(torch.tensor([label])):
        pass


def test_a_margin_without_interface_is_refused():
    with pytest.raises(ValueError, match="margin_loss must be an insightface_kprpe.losses.MarginLoss, got Identity"):
        PartialFC(torch.nn.Identity(), SIZE, 5)


@pytest.mark.parametrize("margin", [AdaFace, ArcFace])
def test_parts_of_one_batch_equal_the_batch(margin):
    def outcome(parts):
        torch.manual_seed(0)
        partial_fc = PartialFC(margin(), SIZE, 50, sample_rate=0.4)
        partial_fc.class_centers.data.normal_(generator=torch.Generator().manual_seed(2))
        embeddings = (torch.randn(12, SIZE, generator=torch.Generator().manual_seed(1)) * 9).requires_grad_()
        labels = torch.arange(12) * 4
        with partial_fc.one_batch(labels, lambda: embeddings.detach().norm(dim=1)):
            losses = [
                partial_fc(e, y) / parts for e, y in zip(embeddings.chunk(parts), labels.chunk(parts), strict=True)
            ]
        sum(losses).backward()
        statistics = dict(partial_fc.margin_loss.named_buffers())
        assert partial_fc.margin_loss.training
        return sum(losses).detach(), embeddings.grad, partial_fc.class_centers.grad, statistics

    whole, parts = outcome(1), outcome(4)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    assert (whole[2].abs().sum(1) > 0).sum() == 20
    torch.manual_seed(0)
    partial_fc = PartialFC(margin(), SIZE, 50, sample_rate=0.4)  # one call is one batch
    partial_fc.class_centers.data.normal_(generator=torch.Generator().manual_seed(2))
    embeddings = torch.randn(12, SIZE, generator=torch.Generator().manual_seed(1)) * 9
    torch.testing.assert_close(partial_fc(embeddings, torch.arange(12) * 4).detach(), whole[0])


@pytest.mark.parametrize("training", [True, False])
def test_what_one_batch_has_set_is_gone_after_it(training):
    torch.manual_seed(0)
    partial_fc = PartialFC(AdaFace(), SIZE, 50, sample_rate=0.4).train(training)
    embeddings, labels = torch.randn(4, SIZE), torch.arange(4)

    def sampled():
        partial_fc.zero_grad()
        partial_fc(embeddings, labels).backward()
        return partial_fc.class_centers.grad.abs().sum(1).nonzero().flatten().tolist()

    with partial_fc.one_batch(labels, lambda: embeddings.norm(dim=1)):
        assert sampled() == sampled()
    assert sampled() != sampled()
    assert partial_fc.margin_loss.training is training


def test_logits_stay_in_float32_under_autocast():
    images, labels, _, _ = data()
    partial_fc = PartialFC(CosFace(), SIZE, CLASSES)
    embeddings = torch.randn(BATCH, SIZE)
    expected = partial_fc(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(partial_fc(embeddings, labels), expected)


@pytest.mark.parametrize(("classes", "ranks"), [(7, 2), (5, 3), (8, 4)])
def test_shards_cover_every_class_once(classes, ranks):
    ranges = [shard_range(classes, rank, ranks) for rank in range(ranks)]
    assert [c for first, count in ranges for c in range(first, first + count)] == list(range(classes))


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_bad_sample_rate(rate):
    with pytest.raises(ValueError, match="sample_rate"):
        PartialFC(CosFace(), SIZE, CLASSES, sample_rate=rate)
