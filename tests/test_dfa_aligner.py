import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from insightface_kprpe.dfa import DFA, RETINAFACE, AlignedFace, aligner
from insightface_kprpe.dfa.aligner import align, canonical_keypoints, fit_to_square, plausible
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, similarity_transform, theta_from_similarity

CANONICAL = torch.tensor(CANONICAL_KEYPOINTS)


@pytest.fixture(scope="module")
def reference(golden):
    return golden("dfa.npz")


@pytest.fixture(scope="module")
def dfa(reference):
    state = {key[6:]: torch.tensor(value) for key, value in reference.items() if key.startswith("state.")}
    return DFA({f"model.net.{key}": value for key, value in state.items()}).eval()  # a published prefix


@pytest.fixture(scope="module")
def images(reference):
    return torch.tensor(reference["image"], dtype=torch.float32)


@pytest.fixture
def facing():
    """A small aligner whose landmarks are a face: the canonical one, a little turned by what the network says."""

    class Facing(DFA):
        def _read_face(self, *heads):
            keypoints, bbox, score = super()._read_face(*heads)
            return CANONICAL.to(keypoints) + 0.05 * torch.tanh(keypoints), bbox, score

    torch.manual_seed(0)
    return Facing().eval()


def test_preprocessing_is_the_reference_one(golden):
    expected = golden("dfa_preprocess.npz")
    image = torch.tensor(expected["image"], dtype=torch.float32)
    np.testing.assert_allclose(fit_to_square(image, 160, float(expected["padding_ratio"])), expected["out"], atol=1e-3)


def test_fit_to_square_pads_black_and_puts_corners_on_corners():
    out = fit_to_square(torch.ones(1, 3, 60, 100), 199)
    assert out.shape == (1, 3, 199, 199)
    assert (out[..., :38, :] == -1).all() and (out[..., 42:157, :] == 1).all() and (out[..., 161:, :] == -1).all()
    image = torch.rand(1, 3, 80, 80)
    torch.testing.assert_close(fit_to_square(image, 160)[..., [0, -1], [0, -1]], image[..., [0, -1], [0, -1]])


def test_alignment_is_the_reference_one(golden, images):
    expected = golden("dfa_align.npz")
    aligned, keypoints, theta = align(images, torch.tensor(expected["landmarks"]))
    np.testing.assert_allclose(aligned, expected["aligned_image"], atol=1e-3)  # stored in 16 bits
    np.testing.assert_allclose(keypoints, expected["aligned_landmarks"], atol=1e-5)
    np.testing.assert_allclose(theta, expected["theta"], atol=1e-5)


def test_alignment_in_parts_is_that_of_the_whole(images, monkeypatch):
    keypoints = CANONICAL + 0.05 * torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0))
    whole = align(images, keypoints)
    monkeypatch.setattr(aligner, "AT_ONCE", 3)
    with torch.no_grad():
        parts = align(images, keypoints)
    for value, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(value, expected, atol=0, rtol=0)


def test_aligner_reads_rgb_and_gives_every_field(dfa, images, reference):
    with torch.no_grad():
        face = dfa(images)
    assert isinstance(face, AlignedFace)
    assert [tuple(value.shape) for value in face] == [(4, 5, 2), (4,), (4, 4), (4, 3, 112, 112), (4, 5, 2), (4, 2, 3)]
    np.testing.assert_allclose(face.keypoints, reference["landmarks"], atol=1e-4)
    np.testing.assert_allclose(face.bbox, reference["bbox"], atol=1e-4)
    np.testing.assert_allclose(face.score, reference["score"][:, 0], atol=1e-4)
    warped = F.grid_sample(
        images + 1, F.affine_grid(face.theta, [4, 3, 112, 112], align_corners=True), align_corners=True
    )
    torch.testing.assert_close(face.aligned, warped - 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(112, 112), (90, 141), (200, 123), (1, 1)])
@pytest.mark.parametrize("padding_ratio", [0.0, 0.215])
def test_any_size_is_the_square_one_in_other_coordinates(facing, shape, padding_ratio):
    facing.padding_ratio = padding_ratio
    height, width = shape
    crop = torch.rand(2, 3, height, width) * 2 - 1
    with torch.no_grad():
        face = facing(crop)
        facing.padding_ratio = 0.0
        square = facing(fit_to_square(crop, 160, padding_ratio))
    pad = int(padding_ratio * max(shape))
    side = max(shape) + 2 * pad
    offset = torch.tensor([pad + (max(shape) - width) // 2, pad + (max(shape) - height) // 2])
    torch.testing.assert_close(face.keypoints * torch.tensor([width, height]) + offset, square.keypoints * side)
    torch.testing.assert_close(face.score, square.score)
    # the aligned faces differ by the resampling only
    torch.testing.assert_close(face.aligned_keypoints, square.aligned_keypoints, atol=1e-4, rtol=0)


def published_aligned(images, keypoints, padding_ratio):
    """What CVLface samples, in plain steps: pad, resize to 160 pixels, corners on corners, and warp."""
    height, width = images.shape[-2:]
    around = int(max(height, width) * padding_ratio)
    left, top = around + max(0, (height - width) // 2), around + max(0, (width - height) // 2)
    side = max(height, width) + 2 * around
    padded = torch.full((len(images), 3, side, side), -1.0)
    padded[:, :, top : top + height, left : left + width] = images
    square = F.interpolate(padded, size=(160, 160), mode="bilinear", align_corners=True)
    points = (keypoints * torch.tensor([width, height]) + torch.tensor([left, top])) / side * 160
    theta = theta_from_similarity(similarity_transform(points, CANONICAL * 112), 160, 112)
    grid = F.affine_grid(theta, [len(images), 3, 112, 112], align_corners=True)
    return F.grid_sample(square + 1, grid, align_corners=True) - 1, theta


@pytest.mark.parametrize("shape", [(112, 112), (90, 141), (200, 123)])
@pytest.mark.parametrize("padding_ratio", [0.0, 0.215])
def test_aligned_face_of_the_published_code(facing, shape, padding_ratio):
    facing.padding_ratio = padding_ratio
    images = torch.rand(2, 3, *shape) * 2 - 1
    with torch.no_grad():
        ours = facing(images)
        facing.aligned_from = "square"
        published = facing(images)
    aligned, theta = published_aligned(images, ours.keypoints, padding_ratio)
    torch.testing.assert_close(published.aligned, aligned, atol=1e-4, rtol=0)
    torch.testing.assert_close(published.theta, theta, atol=1e-5, rtol=0)
    assert (published.aligned - ours.aligned).abs().mean() > 0.01  # the images are noise, which resizing blurs
    for name in ("keypoints", "score", "bbox"):
        torch.testing.assert_close(getattr(published, name), getattr(ours, name))


def test_landmarks_land_on_the_template():
    angle, scale = 0.5, 0.4
    turn = scale * torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=torch.float32)
    keypoints = ((CANONICAL - 0.5) @ turn.T + 0.5)[None]
    image = torch.full((1, 3, 320, 320), -1.0)
    for x, y in (keypoints[0] * 320).round().int().tolist():
        image[..., y - 2 : y + 3, x - 2 : x + 3] = 1.0
    aligned, moved, _ = align(image, keypoints)
    torch.testing.assert_close(moved[0], CANONICAL, atol=1e-5, rtol=0)
    for x, y in (CANONICAL * 112).round().int().tolist():
        assert aligned[0, :, y, x].min() > 0.5


DEGENERATE = {
    "equal": torch.full((5, 2), 0.4),
    "vertical line": torch.stack([torch.full((5,), 0.3), torch.linspace(0.1, 0.9, 5)], 1),
    "slanted line": torch.linspace(0.1, 0.9, 5)[:, None] * torch.tensor([1.0, 0.5]),
    "one NaN": torch.where(torch.arange(5)[:, None] == 2, torch.nan, CANONICAL),
    "infinite": CANONICAL * torch.inf,
    "far outside": CANONICAL - 5,
    "without scale": torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1], [0, 0]]) * 0.2 + 0.5,
}


def test_plausible():
    rng = torch.Generator().manual_seed(0)
    assert plausible(CANONICAL + 0.05 * torch.randn(100, 5, 2, generator=rng)).all()
    points = torch.stack(
        [DEGENERATE[name] for name in ("equal", "vertical line", "slanted line", "one NaN", "infinite")]
    )
    assert not plausible(points).any()
    u, v = (CANONICAL - CANONICAL.mean(0)).unbind(1)
    # orthogonal to the template in every rotation: the best scale is zero
    basis = torch.stack([torch.stack([u, v], 1).flatten(), torch.stack([-v, u], 1).flatten()])
    other = DEGENERATE["without scale"].flatten()
    other = other - basis.T @ torch.linalg.solve(basis @ basis.T, basis @ (other - 0.5))
    assert not plausible(other.view(1, 5, 2)).any()


@pytest.mark.parametrize("name", [key for key in DEGENERATE if key != "without scale"])
def test_degenerate_landmarks_give_the_canonical_crop_and_score_zero(name):
    class Fixed(DFA):
        def _read_face(self, *heads):
            keypoints, bbox, score = super()._read_face(*heads)
            return keypoints * 0 + DEGENERATE[name], bbox, score

    dfa = Fixed().eval()
    images = (torch.rand(2, 3, 160, 160) * 2 - 1).requires_grad_()
    face = dfa(images)
    assert (face.score == 0).all()
    torch.testing.assert_close(face.keypoints[0], CANONICAL)
    torch.testing.assert_close(face.bbox[0], torch.tensor([0.0, 0, 1, 1]))
    torch.testing.assert_close(face.theta[0], torch.eye(3)[:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(face.aligned, fit_to_square(images, 112), atol=1e-3, rtol=0)
    assert all(value.isfinite().all() for value in face)
    sum(value.sum() for value in face).backward()
    assert images.grad.isfinite().all() and all(p.grad.isfinite().all() for p in dfa.parameters() if p.grad is not None)


def test_pixels_that_are_not_finite_spoil_only_their_own_image(facing):
    images = torch.rand(2, 3, 100, 80) * 2 - 1
    images[0, 1, 5, 5] = torch.nan
    images.requires_grad_()
    face = facing(images)
    assert face.score[0] == 0 and face.score[1] > 0
    torch.testing.assert_close(face.keypoints[0], canonical_keypoints(80, 100))
    assert all(value.isfinite().all() for value in face)
    sum(value.sum() for value in face).backward()
    assert images.grad.isfinite().all() and images.grad[1].abs().sum() > 0


def test_align_gradients():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 7, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    noise = 0.03 * torch.randn(1, 5, 2, generator=generator, dtype=torch.float64)
    keypoints = (CANONICAL.double() + noise).requires_grad_()
    torch.autograd.gradcheck(lambda i, k: align(i, k, size=6), (images, keypoints))


def test_gradients_reach_input_and_network(facing):
    facing.double()
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(1, 3, 6, 5, generator=generator, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: facing(x), small.requires_grad_(), eps=1e-7, atol=1e-4, fast_mode=True)
    facing(small).aligned.square().sum().backward()
    for name in ("LandmarkHead.0.conv1x1.weight", "body.stage1.0.0.weight", "aggregator.3.weight"):
        assert facing.get_parameter(name).grad.abs().sum() > 0, name


def test_half_precision_networks_work(facing):
    images = (torch.rand(2, 3, 120, 100) * 2 - 1).bfloat16()
    with torch.no_grad():
        exact = facing(images.float())
        face = facing.bfloat16()(images)
    torch.testing.assert_close(face.keypoints, exact.keypoints, atol=0.01, rtol=0)
    torch.testing.assert_close(face.score.float(), exact.score, atol=0.02, rtol=0)
    again, moved, theta = align(images, face.keypoints, template=facing.template)
    torch.testing.assert_close((face.aligned, face.aligned_keypoints, face.theta), (again, moved, theta))
    assert face.keypoints.dtype == face.theta.dtype == torch.float32 and face.aligned.dtype == torch.bfloat16


def test_autocast_does_not_move_the_face(facing):
    images = torch.rand(2, 3, 160, 160) * 2 - 1
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            face = facing(images)
        aligned, keypoints, theta = align(images, face.keypoints)
    torch.testing.assert_close(face.theta, theta)
    torch.testing.assert_close(face.aligned_keypoints, keypoints)
    torch.testing.assert_close(face.aligned, aligned)


@pytest.mark.slow
def test_torch_export(facing):
    facing.padding_ratio = 0.2
    images = torch.rand(3, 3, 130, 100) * 2 - 1
    program = torch.export.export(facing, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    with torch.no_grad():
        for found, expected in zip(program.module()(images[:2]), facing(images[:2]), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_torch_compile(facing):
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        compiled = torch.compile(facing, fullgraph=True, backend="aot_eager")  # all but the minutes of code generation
        for found, expected in zip(compiled(images), facing(images), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, RETINAFACE], ids=["dfa", "retinaface"])
def test_onnx(tmp_path, arguments, facing):
    onnxruntime = pytest.importorskip("onnxruntime")
    dfa = type(facing)(**arguments).eval()
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    torch.onnx.export(
        dfa, (images[:2],), tmp_path / "dfa.onnx", dynamo=True, opset_version=18, verbose=False,
        input_names=["images"], output_names=AlignedFace._fields, dynamic_shapes={"images": {0: "batch"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "dfa.onnx")
    images = torch.cat([images, torch.full_like(images[:1], torch.nan)])
    with torch.no_grad():
        expected = dfa(images)
    for name, found, value in zip(
        AlignedFace._fields, session.run(None, {"images": images.numpy()}), expected, strict=True
    ):
        np.testing.assert_allclose(found, value, atol=1e-4, err_msg=name)


def test_bad_arguments():
    dfa = DFA()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) float RGB in \[-1, 1\], got \(3, 112, 112\)"):
        dfa(torch.zeros(3, 112, 112))
    with pytest.raises(ValueError, match="uint8"):
        dfa(torch.zeros(1, 3, 112, 112, dtype=torch.uint8))
    with pytest.raises(ValueError, match="padding_ratio must be 0 or more"):
        DFA(padding_ratio=-0.1)
    with pytest.raises(ValueError, match="missing"):
        DFA({"body.conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="aligned_from must be one of crop, square, got 'network'"):
        DFA(aligned_from="network")
    with pytest.raises(FileNotFoundError, match="not found"):
        DFA("nowhere.pt")


def test_canonical_keypoints_are_centered():
    for width, height in itertools.product((80, 112), (80, 112)):
        points = canonical_keypoints(width, height) * torch.tensor([width, height])
        offset = torch.tensor([(max(width, height) - width) // 2, (max(width, height) - height) // 2])
        torch.testing.assert_close(points + offset, CANONICAL * max(width, height))
