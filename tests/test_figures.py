"""The paper's figures of attention and alignment: what they are drawn from, and that they are drawn."""

import json

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.backbones.relative_position import bucket_index
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.evaluation.alignment_figure import alignment_figure, measure
from insightface_kprpe.evaluation.attention_figures import AttentionMaps, write_figures
from insightface_kprpe.evaluation.figure_faces import FigureFaces, read_faces
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS

TINY = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0, "num_features": 8}


def tiny(position="kprpe", **settings):
    torch.manual_seed(0)
    net = ik.VisionTransformer(**{**TINY, "position": position, **settings})
    if position == "kprpe":
        torch.nn.init.normal_(net.keypoint_linear.weight)
    return net


def save_run(folder, network, net):
    folder.mkdir()
    kwargs = {key: value for key, value in TINY.items() if key != "num_features"}
    content = {"network": network, "network_kwargs": kwargs, "embedding_size": 8}
    torch.save(net.state_dict(), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def call(*arguments):
    result = CliRunner().invoke(cli.app, ["visualize", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# --- attention -------------------------------------------------------------------------------------------------------


def test_maps_are_the_tables_of_the_query():
    net, faces = tiny(), read_faces("synthetic", [3, 5])
    maps = AttentionMaps(net, faces)
    assert maps.grid == 7 and maps.seen == 1
    linear, query = net.keypoint_linear, (0.5, 0.2)  # the 4th patch of the 2nd row
    offsets = np.array([3.5 / 7, 1.5 / 7]) - maps.keypoints[1]
    table = linear.weight.detach().numpy() @ offsets.ravel() + linear.bias.detach().numpy()
    table = table.reshape(2, 2, 49)[1, 0]  # of layer 1 and head 0
    expected = table[bucket_index(7)[1 * 7 + 3]].reshape(7, 7)
    np.testing.assert_allclose(maps.map_of(maps.biases, 1, 1, query, 0), expected, rtol=1e-4, atol=1e-5)
    whole = maps.map_of(maps.attention, 0, 0, query, None)
    assert whole.sum() == pytest.approx(1, abs=1e-5) and (whole > 0).all()


def test_queries_find_their_patch():
    maps = AttentionMaps(tiny(None, patch_size=15), read_faces("synthetic", [0]))
    assert maps.grid == 7 and maps.seen == pytest.approx(105 / 112)
    assert [maps.patch_of(point) for point in ((0, 0), (0.2, 0), (0, 0.2), (1, 1), (-1, 2))] == [0, 1, 7, 48, 42]


def test_networks_without_anything_to_draw_are_refused(tmp_path):
    faces = read_faces("synthetic", [0])
    empty = tiny()
    torch.nn.init.zeros_(empty.keypoint_linear.weight)
    for net, message in (
        (empty, "all zeros"),
        (tiny(None), "must be a ViT with KPRPE"),
        (ik.get_model("mbf", scale=1), "must be a ViT with KPRPE"),
    ):
        with pytest.raises(ValueError, match=message):
            write_figures(tmp_path, net, faces)
    with pytest.raises(ValueError, match="head must be from 0 to 1, got 2"):
        write_figures(tmp_path, tiny(), faces, head=2)
    with pytest.raises(ValueError, match="depths must be from 0 to 1, got 7"):
        write_figures(tmp_path, tiny(), faces, depths=[7])
    assert not list(tmp_path.iterdir())


def test_kprpe_figures_from_the_command_line(tmp_path):
    run, plain = save_run(tmp_path / "run", "vit_n_kprpe", tiny()), save_run(tmp_path / "plain", "vit_n", tiny(None))
    options = ["--face", 1, "--face", 2, "--query", "0.5,0.5", "--against", plain]
    output = call("kprpe", run, "synthetic", "--out", tmp_path / "maps", *options)
    names = ["attention.png", "depths.png", "faces.png", "heads.png"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names
    assert all(name in output for name in names)
    picture = cv2.imread(str(tmp_path / "maps" / "depths.png")).astype(int)
    assert (picture[..., 2] - picture[..., 0] > 150).sum() > 50  # a red star
    assert (picture[..., 0] - picture[..., 2] > 100).sum() > 50  # strong blue
    with pytest.raises(ValueError, match="query must be 2 comma-separated numbers, got '1;2'"):
        call("kprpe", run, "--query", "1;2")


# --- alignment -------------------------------------------------------------------------------------------------------


def test_landmarks_that_are_all_shifted_move_the_crop_by_as_much():
    truth = ARCFACE_TEMPLATE_112.astype(np.float64)
    error = measure(truth, truth + np.array([6, 0]), 112, 112)
    assert error.errors == pytest.approx(np.full(5, 6 / 112)) and error.moved == pytest.approx(6)
    assert 6 / 5 <= error.moved_by_worst < 6  # a fifth of it is a shift, the rest turns and scales


def test_one_wrong_point_moves_every_pixel():
    truth = ARCFACE_TEMPLATE_112.astype(np.float64)
    predicted = truth.copy()
    predicted[3] += np.array([8, -8])
    error = measure(truth, predicted, 100, 144)
    assert error.worst == 3 and error.errors[3] == pytest.approx(np.hypot(8, 8) / 120)
    assert error.moved == pytest.approx(error.moved_by_worst) and error.moved > np.hypot(8, 8) / 5


def test_the_figure_needs_true_landmarks():
    faces = FigureFaces(["0"], [np.zeros((112, 112, 3), np.uint8)], None)
    with pytest.raises(ValueError, match="must have true landmarks"):
        alignment_figure(faces, CANONICAL_KEYPOINTS[None])


def test_alignment_figure_from_landmark_files(tmp_path):
    folder, keypoints = tmp_path / "crops", []
    folder.mkdir()
    for index in range(3):
        image, points = ik.data.synthetic.draw_face(index, 0, aligned=False)
        cv2.imwrite(str(folder / f"{index}.png"), image[..., ::-1])
        keypoints.append(points)
    keypoints = np.stack(keypoints)
    write_landmark_csv(folder / "ldmk_5points.csv", keypoints)
    keypoints[1, 2, 0] += 0.1
    write_landmark_csv(tmp_path / "predicted.csv", keypoints)
    faces = ["--face", 1, "--face", 2, "--out", tmp_path / "alignment.png"]
    output = call("alignment", folder, "--predicted", tmp_path / "predicted.csv", *faces)
    rows = [line.split() for line in output.splitlines()[1:3]]
    assert [row[:4] for row in rows] == [["1", "10.0", "%", "1"], ["2", "0.0", "%", "0"]]
    assert float(rows[0][4]) > 2 and float(rows[1][4]) == 0
    assert cv2.imread(str(tmp_path / "alignment.png")) is not None
    with pytest.raises(ValueError, match="faces must be numbers from 0 to 2 of .*crops, got 3"):
        call("alignment", folder, "--predicted", tmp_path / "predicted.csv", "--face", 3)


def test_faces_of_a_labeled_folder_and_a_model_that_finds_their_points(tmp_path):
    picture, points = ik.data.synthetic.draw_face(0, 0, aligned=False, size=192)
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    numbers = [20, 20, 150, 150, *np.column_stack([points * 192, np.zeros(5)]).ravel(), 0]
    (tmp_path / "label.txt").write_text("# a.png\n" + " ".join(f"{value:.3f}" for value in numbers) + "\n")
    torch.manual_seed(0)
    torch.save(ik.DFA().state_dict(), tmp_path / "dfa.pt")
    known, found = read_faces(tmp_path, [0]), read_faces(tmp_path, [0], tmp_path / "dfa.pt")
    assert known.images[0].shape == (160, 160, 3) and known.keypoints.shape == found.keypoints.shape == (1, 5, 2)
    eye = tuple((known.keypoints[0, 0] * 160).astype(int))
    expected = picture[tuple((points[0] * 192).astype(int)[::-1])].astype(int)
    assert np.abs(known.images[0][eye[::-1]].astype(int) - expected).max() < 60  # the same place of the face
