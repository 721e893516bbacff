import pytest
import torch

from insightface_kprpe.losses import AdaFace, ArcFace, CombinedMarginLoss, CosFace


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("arcface", ArcFace()),
        ("cosface", CosFace()),
        ("arcface_filter", ArcFace(interclass_filtering_threshold=0.4)),
        ("adaface", AdaFace()),
        ("adaface_warm", AdaFace()),
    ],
)
def test_values_gradients_and_statistics_equal_the_reference(golden, name, loss):
    file = {key: torch.from_numpy(value) for key, value in golden("margin_losses.npz").items()}
    if name == "adaface_warm":
        loss.batch_mean.fill_(19.0)
        loss.batch_std.fill_(7.0)
    logits = file["logits"].clone().requires_grad_()
    out = loss(logits, file["labels"], file["norms"])
    torch.testing.assert_close(out.detach(), file[name], atol=1e-4, rtol=0)
    (out.square().sum() / 1000).backward()
    torch.testing.assert_close(logits.grad, file[f"{name}_grad"], atol=1e-4, rtol=0)
    if isinstance(loss, AdaFace):
        torch.testing.assert_close(loss.batch_mean, file[f"{name}_batch_mean"], atol=1e-5, rtol=0)
        torch.testing.assert_close(loss.batch_std, file[f"{name}_batch_std"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", [ArcFace(), CosFace(), AdaFace()])
def test_only_targets_lose_and_the_gradient_is_straight_through(loss):
    logits = (torch.rand(4, 6) * 1.6 - 0.8).requires_grad_()
    labels = torch.tensor([0, -1, 5, 2])
    given = labels.clone()
    out = loss(logits, labels, torch.full((4,), 20.0))
    change = out.detach() / 64 - logits.detach()
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[[0, 2, 3], [0, 5, 2]] = True
    assert ((change < -0.01) == expected).all()
    out.sum().backward()
    torch.testing.assert_close(logits.grad, torch.full((4, 6), 64.0))
    assert torch.equal(labels, given)


def test_adaface_margin_grows_with_the_norm_for_easy_targets():
    loss = AdaFace().eval()
    loss.batch_mean.fill_(20.0)
    loss.batch_std.fill_(5.0)
    easy = 0.9
    logits, labels = torch.full((5, 2), easy), torch.zeros(5, dtype=torch.int64)
    out = loss(logits, labels, torch.tensor([1.0, 12.0, 20.0, 28.0, 39.0]))[:, 0]
    margins = easy - out / 64
    assert (margins.diff() > 0.05).all()
    torch.testing.assert_close(margins[2], torch.tensor(0.4), atol=1e-3, rtol=0)  # CosFace at the mean norm


def test_adaface_statistics_move_in_training_only_and_are_saved():
    loss = AdaFace()
    arguments = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.rand(4) * 40
    loss.eval()(*arguments)
    assert loss.batch_mean.item() == 20 and loss.batch_std.item() == 100
    loss.train()(*arguments)
    assert loss.batch_mean.item() != 20
    assert set(loss.state_dict()) == {"batch_mean", "batch_std"}
    loss(arguments[0][:1], arguments[1][:1], arguments[2][:1])
    assert loss.batch_std.isfinite().all()  # one sample has no deviation


@pytest.mark.parametrize("margins", [(0.9, 0.4, 0.15), (1.0, 0.0, 0.0), (1.0, 0.5, 0.4)])
def test_unknown_margins_are_refused(margins):
    with pytest.raises(ValueError, match="margins must be"):
        CombinedMarginLoss(64, *margins)


def test_adaface_needs_norms():
    with pytest.raises(ValueError, match="norms must be"):
        AdaFace()(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.rand(3))
