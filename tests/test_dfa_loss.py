import pytest
import torch
from reference.dfa_loss import loss_parts

from insightface_kprpe.dfa import DFALoss, RetinaFaceNet
from insightface_kprpe.dfa.anchors import make_anchors
from insightface_kprpe.dfa.network import NetworkOutput

ANCHORS = make_anchors(160).double()


def draw(count=6, seed=0):
    """Random network output and labels: a plain face, one without landmarks, one without a face, and so on."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    a = len(ANCHORS)
    output = NetworkOutput(
        normal(count, a, 4), 2 * normal(count, a, 2), normal(count, a, 10),
        0.5 + 0.1 * normal(count, 5, 2), 0.5 + 0.2 * normal(count, 4), torch.rand(count, generator=rng).double(),
    )  # fmt: skip
    corner = 0.05 + 0.2 * torch.rand(count, 2, generator=rng, dtype=torch.float64)
    bbox = torch.cat([corner, corner + 0.3 + 0.4 * torch.rand(count, 2, generator=rng, dtype=torch.float64)], 1)
    keypoints = (
        bbox[:, None, :2] + (bbox[:, 2:] - bbox[:, :2])[:, None] * torch.rand(count, 5, 2, generator=rng).double()
    )
    keypoints[1::3] = -1
    keypoints[2::3], bbox[2::3] = -1, -1
    return output, keypoints, bbox


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [({}, {}), ({"overlap_threshold": 0.95, "negatives_per_positive": 3}, {"threshold": 0.95, "ratio": 3})],
)
def test_values_are_those_of_the_definition(arguments, settings):
    output, keypoints, bbox = draw()
    parts = DFALoss(**arguments)(output, ANCHORS, keypoints, bbox)
    arrays = {name: value.numpy() for name, value in output._asdict().items()}
    expected = loss_parts(arrays, ANCHORS.numpy(), keypoints.numpy(), bbox.numpy(), **settings)
    for name, value in expected.items():
        assert getattr(parts, name).item() == pytest.approx(value, rel=1e-9), name
    assert parts.total.item() == pytest.approx(sum(expected.values()) + expected["box"])


def test_gradients():
    output, keypoints, bbox = draw(3)
    inputs = [value.requires_grad_() for value in output]
    loss = DFALoss()
    torch.autograd.gradcheck(
        lambda *values: loss(NetworkOutput(*values), ANCHORS, keypoints, bbox).total, inputs, fast_mode=True
    )


def test_unlabeled_faces_teach_box_and_score_only():
    output, keypoints, bbox = draw(2)
    keypoints[:] = -1
    output = NetworkOutput(*(value.requires_grad_() for value in output))
    parts = DFALoss()(output, ANCHORS, keypoints, bbox)
    parts.total.backward()
    assert parts.landmark == 0 and parts.face_landmark == 0
    assert not output.landmark_regression.grad.any() and not output.keypoints.grad.any()
    assert output.bbox_regression.grad.any() and output.class_logits.grad.any() and output.score.grad.any()


def test_a_batch_without_any_face_teaches_only_the_score():
    output, keypoints, bbox = draw(2)
    keypoints[:], bbox[:] = -1, -1
    output = NetworkOutput(*(value.requires_grad_() for value in output))
    parts = DFALoss()(output, ANCHORS, keypoints, bbox)
    parts.total.backward()
    assert parts.total.isfinite() and parts.box == parts.face_box == 0
    assert not output.bbox_regression.grad.any() and not output.bbox.grad.any()
    assert (output.class_logits.grad[..., 1] >= 0).all() and (output.score.grad > 0).all()


def test_plain_retinaface_has_no_loss_on_the_aggregated_face():
    output, keypoints, bbox = draw(3)
    parts = DFALoss(face_weight=0)(output, ANCHORS, keypoints, bbox)
    torch.testing.assert_close(parts.total, 2 * parts.box + parts.score + parts.landmark)


def test_a_few_steps_learn_one_face():
    torch.manual_seed(0)
    net = RetinaFaceNet()
    images = torch.rand(2, 3, 160, 160) * 2 - 1
    keypoints = torch.tensor([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.4, 0.7], [0.6, 0.7]]).expand(2, 5, 2)
    bbox = torch.tensor([[0.2, 0.1, 0.8, 0.9]]).expand(2, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    values = []
    for _ in range(12):
        parts = DFALoss()(net(images), net.anchors, keypoints, bbox)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
        values.append(parts.total.item())
    assert values[-1] < 0.5 * values[0]


def test_bad_labels():
    output, keypoints, bbox = draw(2)
    with pytest.raises(ValueError, match=r"keypoints must be \(2, 5, 2\) and bbox \(2, 4\), got \(2, 10\)"):
        DFALoss()(output, ANCHORS, keypoints.flatten(1), bbox)
