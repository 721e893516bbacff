"""The protocols from images on: hand-made IJB, IJB-S, TinyFace and .bin sets of drawn faces."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.backbones import VisionTransformer, get_model
from insightface_kprpe.backbones.interface import Backbone
from insightface_kprpe.data.image_codec import fit_crop
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.synthetic import draw_face, verification_pairs
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.data.verification_pairs import VerificationPairs, open_verification
from insightface_kprpe.dfa import DFA
from insightface_kprpe.evaluation import ijb
from insightface_kprpe.evaluation.fusion import FUSION_METHODS, norm_weights
from insightface_kprpe.evaluation.metrics import val_at_far
from insightface_kprpe.evaluation.protocols import choose_fusions, run_ijb, run_ijbs, run_pairs, run_tinyface
from insightface_kprpe.evaluation.report import format_text
from insightface_kprpe.evaluation.verification import verify
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, align_face
from insightface_kprpe.inference import embedding_file
from insightface_kprpe.inference.embedding import EmbedOptions, embed_faces, embed_images
from insightface_kprpe.inference.images import AlignedFiles, WholeFiles
from insightface_kprpe.inference.models import TorchEmbedder

PEOPLE, FRAMES = 6, 4  # two templates of two frames each a person


class Thumbnail(Backbone):
    """Its embedding is a small image of the crop: good enough to tell drawn people apart somewhat."""

    img_size, num_features, needs_keypoints = 112, 202, True

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images, keypoints):
        small = torch.nn.functional.avg_pool2d(images, 14).flatten(1)
        return self.scale * torch.cat([small, keypoints.flatten(1)], 1)


class Blind(Thumbnail):
    """Gives every crop the same embedding."""

    def forward(self, images, keypoints):
        return self.scale * torch.ones(len(images), 4)


@pytest.fixture
def embed():
    return TorchEmbedder(Thumbnail(), "thumbnail")


def write_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.ascontiguousarray(image[..., ::-1]))


@pytest.fixture
def ijb_folder(tmp_path):
    """IJB-C's layout, with two galleries of different people for 1:N."""
    folder = tmp_path / "ijb"
    images, medias, pairs = [], [], []
    for person in range(PEOPLE):
        for frame in range(FRAMES):
            image, keypoints = draw_face(person, frame, aligned=False, size=160)
            name = f"{len(images)}.png"
            write_png(folder / "loose_crop" / name, image)
            points = " ".join(f"{value:.3f}" for value in (keypoints * 160).flatten())
            images.append(f"{name} {points} {0.5 + 0.1 * frame:.2f}")
            medias.append(f"{name} {2 * person + frame // 2} {frame}")
    for a in range(2 * PEOPLE):
        pairs += [f"{a} {b} {int(a // 2 == b // 2)}" for b in range(a + 1, 2 * PEOPLE)]
    meta = folder / "meta"
    meta.mkdir()
    for name, lines in (("name_5pts_score", images), ("face_tid_mid", medias), ("template_pair_label", pairs)):
        (meta / f"ijbc_{name}.txt").write_text("\n".join(lines) + "\n")
    head = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n"
    half = PEOPLE // 2
    lists = {
        "gallery_G1": [(2 * p, p) for p in range(half)],
        "gallery_G2": [(2 * p, p) for p in range(half, PEOPLE)],
        "probe_mixed": [(2 * p + 1, p) for p in range(PEOPLE)],
    }
    for name, rows in lists.items():
        (meta / f"ijbc_1N_{name}.csv").write_text(head + "".join(f"{t},{s},x.jpg\n" for t, s in rows))
    return folder


def test_ijb_equals_the_numbers_of_embeddings_made_by_hand(ijb_folder, embed):
    meta = ijb.read_meta(ijb_folder)
    crops, keypoints = [], []
    for name, points in zip(meta.names, meta.landmarks_px, strict=True):
        image = cv2.imread(str(ijb_folder / "loose_crop" / name))[..., ::-1].copy()
        crop, moved = align_face(image, points)
        crops.append(crop)
        keypoints.append(moved)
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 127.5 - 1
    embeddings = embed(images, torch.from_numpy(np.stack(keypoints))).numpy()
    weights = norm_weights(embeddings) * meta.detector_scores
    arguments = (meta.templates, meta.medias, meta.p1, meta.p2, meta.label, weights)
    expected = ijb.verification(embeddings, *arguments)
    results = run_ijb(embed, ijb_folder, "IJBC", ["norm_detector"], EmbedOptions(flip=False, batch_size=5))
    assert [r.protocol for r in results] == ["IJB-C 1:1", "IJB-C 1:N, InsightFace"] + 3 * ["IJB-C 1:N, NIST"]
    assert [r.variant for r in results] == 3 * ["norm_detector"] + ["norm_detector, G1", "norm_detector, G2"]
    assert results[0].metrics == pytest.approx(expected, abs=1e-5)
    mean, first, second = (result.metrics for result in results[2:])
    assert mean["rank_1"] == pytest.approx((first["rank_1"] + second["rank_1"]) / 2)
    assert results[2].cmc[0] == mean["rank_1"] and results[2].cmc[-1] == 1
    assert results[2].settings["gallery"] == PEOPLE // 2 and "NIST" in results[2].settings["1:N rule"]
    assert results[1].settings["gallery"] == PEOPLE and "ijb_1n.py" in results[1].settings["1:N rule"]
    assert results[1].cmc[0] == results[1].metrics["rank_1"] <= mean["rank_1"]
    assert results[0].settings["images"] == PEOPLE * FRAMES and results[0].settings["flip"] == "off"


def test_all_fusions_side_by_side(ijb_folder, embed):
    torch.manual_seed(0)
    results = run_ijb(embed, ijb_folder, "IJBC", choose_fusions("all"), EmbedOptions())
    pairs = [result for result in results if result.protocol == "IJB-C 1:1"]
    assert [result.variant for result in pairs] == list(FUSION_METHODS)
    assert len({result.metrics["thresh_at_fpr_0.1"] for result in pairs}) == len(FUSION_METHODS)
    assert "detector" in pairs[-1].settings["fusion"]
    aligned = run_ijb(embed, ijb_folder, "IJBC", ["landmark"], EmbedOptions(aligner=DFA().eval(), aligner_name="DFA x"))
    assert "aligner" in aligned[0].settings["fusion"] and aligned[0].settings["keypoints"] == "DFA x"
    with pytest.raises(ValueError, match="fusion must be all or one of"):
        choose_fusions("best")


def test_missing_and_damaged_images(ijb_folder, embed):
    """Template 0 loses one of its images, template 1 both."""
    crops = ijb_folder / "loose_crop"
    (crops / "0.png").unlink()
    (crops / "2.png").write_bytes(b"no image")
    (crops / "3.png").write_bytes((crops / "3.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"ijbc: image 0: .*0\.png"):
        run_ijb(embed, ijb_folder, "IJBC", ["average"], EmbedOptions())
    result, identification, *_ = run_ijb(embed, ijb_folder, "IJBC", ["average"], EmbedOptions(missing="skip"))
    assert result.settings["missing images"] == "3 left out: 0.png, 2.png, 3.png"
    assert result.settings["pairs left out"].startswith("11:") and result.settings["templates"] == 2 * PEOPLE - 1
    assert identification.settings["probes"] == PEOPLE - 1 and identification.settings["gallery"] == PEOPLE
    with open(ijb_folder / "meta" / "ijbc_template_pair_label.txt", "a") as pairs:
        pairs.write("0 999 0\n")  # a template that the set never had is no missing image
    with pytest.raises(ValueError, match="999"):
        run_ijb(embed, ijb_folder, "IJBC", ["average"], EmbedOptions(missing="skip"))


def test_identification_does_not_vanish_without_a_word(ijb_folder, embed, caplog):
    (ijb_folder / "meta" / "ijbc_1N_probe_mixed.csv").unlink()
    (result,) = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions())
    assert "skipping 1:N: no ijbc_1N_probe_mixed.csv in " in caplog.text
    assert result.settings["1:N"].startswith("not measured: no ijbc_1N_probe_mixed.csv")
    for gallery in ("G1", "G2"):
        (ijb_folder / "meta" / f"ijbc_1N_gallery_{gallery}.csv").unlink()
    (result,) = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions())
    assert "ijbc_1N_gallery_*.csv" in result.settings["1:N"]


class Unused(Thumbnail):
    def forward(self, images, keypoints):
        raise AssertionError("nothing may be embedded")


def rewrite(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("template_pair_label.txt", lambda text: text + "0 999 0\n", "p2 names templates that have no images .*: 999"),
        ("template_pair_label.txt", lambda text: text.replace(" 1\n", " 0\n"), "of different people only"),
        ("1N_probe_mixed.csv", lambda text: text + "998,1,x.jpg\n", "probe names templates .*: 998"),
        ("1N_gallery_G2.csv", lambda text: text + "997,77,x.jpg\n", "gallery G2 names templates .*: 997"),
        ("1N_gallery_G1.csv", lambda text: text.replace(",1,", ",91,").replace(",0,", ",90,").replace(",2,", ",92,"),
         "gallery G1 holds none of the probes' subjects"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_are_refused_before_anything_is_embedded(ijb_folder, name, change, message):
    rewrite(ijb_folder / "meta" / f"ijbc_{name}", change)
    with pytest.raises(ValueError, match=message):
        run_ijb(TorchEmbedder(Unused(), "unused"), ijb_folder, "IJBC", ["norm"], EmbedOptions())


def test_pairs_that_cannot_be_measured_are_refused_before_anything_is_embedded():
    images, is_same, keypoints = verification_pairs(4, 12)
    unused = TorchEmbedder(Unused(), "unused")
    for count, labels, message in ((4, is_same, "at least 10 pairs"), (12, is_same | True, "the same person only")):
        pairs = VerificationPairs("drawn", images[: 2 * count], keypoints[: 2 * count], labels[:count])
        with pytest.raises(ValueError, match=f"drawn: .*{message}"):
            run_pairs(unused, pairs, EmbedOptions())


def test_lists_that_skipped_images_have_emptied_leave_the_rest(ijb_folder, embed, caplog):
    for person in range(PEOPLE // 2):  # all images of the first gallery
        for frame in (0, 1):
            (ijb_folder / "loose_crop" / f"{FRAMES * person + frame}.png").unlink()
    (result,) = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions(missing="skip"))
    assert result.protocol == "IJB-C 1:1" and "1:N could not be measured" in caplog.text


def test_a_gallery_of_everybody_has_no_open_set(ijb_folder, embed):
    (ijb_folder / "meta" / "ijbc_1N_gallery_G2.csv").unlink()
    rewrite(ijb_folder / "meta" / "ijbc_1N_gallery_G1.csv", lambda text: text + "6,3,x\n8,4,x\n10,5,x\n")
    _, joined, mean, first = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions())
    assert joined.settings["gallery"] == PEOPLE and "tpir_at_far_0.1" in joined.metrics
    assert mean.metrics == first.metrics == {key: joined.metrics[key] for key in ("rank_1", "rank_5", "rank_10")}


def test_an_infinite_threshold_is_explained(ijb_folder, embed):
    (result, *_) = run_ijb(TorchEmbedder(Blind(), "blind"), ijb_folder, "IJBC", ["average"], EmbedOptions())
    assert np.isinf(result.metrics["thresh_at_fpr_0.1"]) and result.metrics["tpr_at_fpr_0.1"] == 0
    assert result.settings["no threshold"].startswith("at FPR 1e-06, 1e-05, 0.0001, 0.001, 0.01, 0.1: ")
    (result, *_) = run_ijb(embed, ijb_folder, "IJBC", ["average"], EmbedOptions())
    assert "0.1" not in result.settings.get("no threshold", "").split(":")[0].split(", ")


def test_names_with_accents_composed_otherwise_on_the_disk(ijb_folder, embed):
    """Lists from one system, files from another."""
    expected = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions())
    for name, form in (("name_5pts_score", "NFC"), ("face_tid_mid", "NFD")):
        path = ijb_folder / "meta" / f"ijbc_{name}.txt"
        path.write_text(path.read_text().replace("3.png", unicodedata.normalize(form, "é3.png")))
    for number in (3, 13, 23):
        crop = ijb_folder / "loose_crop" / f"{number}.png"
        crop.rename(crop.with_name(unicodedata.normalize("NFD", f"{number}.png".replace("3.png", "é3.png"))))
    results = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions())
    assert results[0].metrics == expected[0].metrics


@pytest.fixture
def bin_file(tmp_path):
    images, is_same, keypoints = verification_pairs(8, 40, aligned=False)
    encoded = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]
    write_verification_bin(tmp_path / "drawn.bin", encoded, is_same)
    write_landmark_csv(tmp_path / "drawn_ldmk_5points.csv", keypoints)
    return tmp_path / "drawn.bin", encoded, is_same


def test_bin(bin_file, embed):
    path, encoded, is_same = bin_file
    (result,) = run_pairs(embed, open_verification(str(path)), EmbedOptions())
    assert result.protocol == "drawn" and result.model == "thumbnail"
    expected = verify(embed, open_verification(str(path)))
    assert result.metrics["accuracy"] == expected.accuracy and result.metrics["accuracy_std"] == expected.std
    assert result.metrics["cosine_threshold"] == expected.cosine_threshold
    assert 0 <= result.metrics["tpr_at_fpr_0.0001"] <= result.metrics["tpr_at_fpr_0.001"] <= 1
    embeddings = embed_images(embed, *(getattr(open_verification(str(path)), name) for name in ("images", "keypoints")))
    validation = val_at_far(embeddings[0::2], embeddings[1::2], is_same)
    assert result.metrics["val_at_far_0.001"] == validation.val and result.metrics["val_std"] == validation.std
    assert "VAL@FAR=0.001" in format_text([result]) and "arcface_torch" in result.settings["threshold rule"]
    assert result.settings["keypoints"] == "drawn_ldmk_5points.csv"
    fpr, tpr = result.roc
    assert fpr[-1] == tpr[-1] == 1 and (np.diff(tpr) >= 0).all()
    encoded[5] = b"damaged"
    write_verification_bin(path, encoded, is_same)
    with pytest.raises(ValueError, match="drawn: image 5"):
        run_pairs(embed, open_verification(str(path)), EmbedOptions())
    (result,) = run_pairs(embed, open_verification(str(path)), EmbedOptions(missing="skip"))
    assert result.settings["pairs"].startswith("39,") and "image 5" in result.settings["missing images"]


def test_tinyface(tmp_path, embed):
    for person in range(PEOPLE):
        for folder, instance in (("Probe", 0), ("Gallery_Match", 0), ("Gallery_Distractor", 1)):
            image = draw_face(person + 50 * instance, instance)[0]
            small = cv2.resize(image, (22, 22), interpolation=cv2.INTER_AREA)
            name = f"{person}_1.png" if instance == 0 else f"{person}.png"
            write_png(tmp_path / "Testing_Set" / folder / name, small)
    (result,) = run_tinyface(embed, tmp_path, EmbedOptions(num_workers=1, batch_size=4))
    assert result.metrics == {"rank_1": 1, "rank_5": 1, "rank_20": 1} and result.cmc[0] == 1
    assert result.settings["gallery"] == 2 * PEOPLE and result.settings["distractors"] == PEOPLE
    assert result.settings["keypoints"] == "the canonical template"
    (tmp_path / "Testing_Set" / "Probe" / "3_1.png").write_bytes(b"")
    (result,) = run_tinyface(embed, tmp_path, EmbedOptions(missing="skip"))
    assert result.settings["probes"].startswith(f"{PEOPLE - 1},") and "3_1.png" in result.settings["missing images"]


def test_ijbs(tmp_path, embed, ijb_folder):
    """The people of the IJB-C set again: the same probes and galleries give the same numbers."""
    meta = ijb.read_meta(ijb_folder)
    media = 100 * meta.templates + meta.medias
    folder = tmp_path / "ijbs"
    protocol = folder / "surveillance_to_single"
    protocol.mkdir(parents=True)
    points = ",".join(f"x{n},y{n}" for n in range(1, 6))
    lines = [f"path,media,subject,{points},score"]
    for i, name in enumerate(meta.names):
        numbers = ",".join(str(value) for value in meta.landmarks_px[i].flatten())
        lines.append(
            f"../ijb/loose_crop/{name},{media[i]},{meta.templates[i] // 2},{numbers},{meta.detector_scores[i]}"
        )
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    for name, wanted in (("gallery_G1", (0, 2, 4)), ("gallery_G2", (6, 8, 10)), ("probe", (1, 3, 5, 7, 9, 11))):
        rows = {(t, t // 2, m) for t, m in zip(meta.templates, media, strict=True) if t in wanted}
        text = "".join(f"{t},{s},{m}\n" for t, s, m in sorted(rows))
        (protocol / f"{name}.csv").write_text("template,subject,media\n" + text)
    expected = run_ijb(embed, ijb_folder, "IJBC", ["norm"], EmbedOptions())[2:]
    results = run_ijbs(embed, folder, ["norm"], EmbedOptions())
    assert [result.protocol for result in results] == 3 * ["IJB-S surveillance to single"]
    for result, other in zip(results, expected, strict=True):
        assert result.metrics == pytest.approx(other.metrics) and result.variant == other.variant
    (ijb_folder / "loose_crop" / "2.png").unlink()
    skipped = run_ijbs(embed, folder, ["norm"], EmbedOptions(missing="skip"))
    assert "2.png" in skipped[0].settings["missing images"]


def test_crops_from_files(tmp_path):
    image, keypoints = draw_face(3, 0, aligned=False, size=150)
    write_png(tmp_path / "a.png", image)
    aligned = AlignedFiles([tmp_path / "a.png"] * 2, np.stack([keypoints * 150, keypoints * 150]))
    crop, moved = align_face(image, keypoints * 150)
    assert (aligned[1] == crop).all() and len(aligned) == 2
    np.testing.assert_allclose(aligned.keypoints[0], moved, atol=1e-5)
    assert np.abs(moved - CANONICAL_KEYPOINTS).max() < 0.1
    assert WholeFiles([tmp_path / "a.png"])[0].shape == (112, 112, 3)
    small = np.tile(np.arange(22, dtype=np.uint8)[:, None, None] * 10, (1, 22, 3))
    enlarged = fit_crop(small).astype(int)
    assert (np.diff(enlarged[8:-8, 0, 0]) >= 0).all() and np.diff(enlarged[:, 0, 0]).max() <= 4  # smooth, no steps


def test_self_aligned_networks_and_aligners_report_what_they_found():
    torch.manual_seed(0)
    dfa = DFA().eval()
    images = np.stack([draw_face(person, 0)[0] for person in range(3)])
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 28, "num_features": 8}
    plain = VisionTransformer(position="kprpe", **tiny).eval()
    torch.nn.init.normal_(plain.keypoint_linear.weight)
    from insightface_kprpe.backbones.vit_with_dfa import ViTWithDFA

    both = ViTWithDFA(dfa.state_dict(), **tiny).eval()
    both.load_state_dict(plain.state_dict(), strict=False)
    own = embed_faces(TorchEmbedder(both), images)
    other = embed_faces(TorchEmbedder(plain), images, None, EmbedOptions(aligner=dfa))
    expected, score, _ = dfa.locate(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    for found in (own, other):
        np.testing.assert_allclose(found.keypoints, expected.detach(), atol=1e-5)
        np.testing.assert_allclose(found.scores, score.detach(), atol=1e-5)
    np.testing.assert_allclose(own.embeddings, other.embeddings, atol=1e-5)
    np.testing.assert_allclose(own.norms, np.linalg.norm(own.embeddings, axis=1), rtol=1e-5)
    without = embed_faces(TorchEmbedder(plain), images)
    np.testing.assert_allclose(without.keypoints, np.tile(CANONICAL_KEYPOINTS, (3, 1, 1)))
    assert np.isnan(without.scores).all()


def test_swapped_channels_are_noticed(bin_file, caplog):
    """The network sees what is red only; the set is written with red and blue swapped."""
    path, encoded, is_same = bin_file

    class Red(Thumbnail):
        def forward(self, images, keypoints):
            return super().forward(images[:, :1], keypoints * 0)

    red = TorchEmbedder(Red(), "red")
    pictures = [np.zeros((112, 112, 3), np.uint8) for _ in is_same for _ in range(2)]
    for place, image in enumerate(pictures):  # OpenCV's order: what is written first is blue
        who = place // 2 if is_same[place // 2] else place
        noise = np.random.default_rng(place).integers(0, 200, (8, 8, 2), dtype=np.uint8)
        image[..., 1:] = cv2.resize(noise, (112, 112))
        image[..., 0] = cv2.resize(np.random.default_rng(who).integers(0, 255, (8, 8), dtype=np.uint8), (112, 112))
    write_verification_bin(path, [cv2.imencode(".png", image)[1].tobytes() for image in pictures], is_same)
    run_pairs(red, open_verification(str(path)), EmbedOptions(flip=False))
    assert "red on drawn: with red and blue swapped" in caplog.text
    caplog.clear()
    right = [cv2.imencode(".png", image[..., ::-1].copy())[1].tobytes() for image in pictures]
    write_verification_bin(path, right, is_same)
    run_pairs(red, open_verification(str(path)), EmbedOptions(flip=False))
    assert "swapped" not in caplog.text


@pytest.fixture
def weights(tmp_path):
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 28}
    (tmp_path / "run").mkdir()
    torch.save(get_model("vit_n_kprpe", num_features=8, **kwargs).state_dict(), tmp_path / "run" / "model.pt")
    config = {"network": "vit_n_kprpe", "network_kwargs": kwargs, "embedding_size": 8}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_command_line_of_ijb_with_the_flags_of_arcface_torch(ijb_folder, weights, tmp_path):
    flags = ["--model-prefix", f"mine={weights}", "--image-path", ijb_folder, "--result-dir", tmp_path / "out"]
    more = ["--target", "IJBC", "--batch-size", 7, "--fusion", "all", "--num-workers", 0]
    result = call("evaluate", "ijb", *flags, *more)
    assert result.exit_code == 0 and "IJB-C 1:1" in result.output and "IJB-C 1:N" in result.output
    for method in FUSION_METHODS:
        assert method in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    assert len(report) == 5 * len(FUSION_METHODS) and report[0]["model"] == "mine"
    assert cv2.imread(str(tmp_path / "out" / "hardest_mine_ijbc.png")).shape[1] > 500
    theirs = result.output[result.output.index("| Methods") :].splitlines()
    heads = [cell.strip() for cell in theirs[0].split("|")[2:-1]]
    assert heads == ["1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1"]
    value = report[0]["metrics"]["tpr_at_fpr_0.01"]
    assert f"mine, {FUSION_METHODS[0]}-IJBC" in theirs[2] and theirs[2].split("|")[6].strip() == f"{value:.2f}"
    with pytest.raises(ValueError, match="once"):
        call("evaluate", "ijb", ijb_folder, *flags)
    with pytest.raises(ValueError, match="claims to be vit_s"):
        call("evaluate", "ijb", *flags, "--network", "vit_s")


def test_several_models_in_one_table(bin_file, weights):
    path, *_ = bin_file
    result = call("evaluate", "bin", path, "--model", f"a={weights}", "--model", weights / "model.pt", "--no-flip")
    assert result.exit_code == 0 and "| a " in result.output and "| run " in result.output
    assert "flip: off" in result.output
    for models in (["--model", f"a={weights}"] * 2, ["--model", weights, "--model", weights / "model.pt"]):
        with pytest.raises(ValueError, match="different names"):
            call("evaluate", "bin", path, *models)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embed(tmp_path, weights, suffix):
    if suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
    images = [draw_face(person, 0)[0] for person in range(3)]
    for person, image in enumerate(images):
        write_png(tmp_path / "faces" / f"p{person}" / "0.png", image)
    (tmp_path / "faces" / "p1" / "1.png").write_bytes(b"damaged")
    arguments = ["embed", tmp_path / "faces", "--model", weights, "--num-workers", 0, "--missing", "skip"]
    out = tmp_path / f"embeddings{suffix}"
    assert "3 embeddings" in call(*arguments, "--out", out).output
    if suffix == ".npz":
        with np.load(out) as file:
            names, embeddings, norms, keypoints = (file[key] for key in ("names", "embeddings", "norms", "keypoints"))
    else:
        table = parquet.read_table(out).to_pydict()
        names, norms = table["name"], table["norm"]
        embeddings, keypoints = np.array(table["embedding"]), np.array(table["keypoints"]).reshape(-1, 5, 2)
    assert list(names) == ["p0/0.png", "p1/0.png", "p2/0.png"]
    from insightface_kprpe.weights.network import load_run

    expected = embed_faces(TorchEmbedder(load_run(weights)), images)
    np.testing.assert_allclose(embeddings, expected.embeddings, atol=1e-5)
    np.testing.assert_allclose(norms, expected.norms, rtol=1e-5)
    np.testing.assert_allclose(keypoints, expected.keypoints, atol=1e-6)
    with pytest.raises(ValueError, match=r"must end in \.npz or \.parquet"):
        call(*arguments, "--out", tmp_path / "x.csv")


def test_where_embeddings_cannot_be_written_is_said_before_the_work(tmp_path, weights, monkeypatch):
    write_png(tmp_path / "faces" / "0.png", draw_face(0, 0)[0])
    monkeypatch.setattr(embedding_file, "embed_faces", None)
    for out in (tmp_path / "faces" / "0.png" / "a.npz", tmp_path / "folder.npz"):
        (tmp_path / "folder.npz").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=rf"cannot be written .*{out.name}"):
            call("embed", tmp_path / "faces", "--model", weights, "--num-workers", 0, "--out", out)


def test_options_are_checked(embed):
    images = np.zeros((2, 112, 112, 3), np.uint8)
    with pytest.raises(ValueError, match="missing must be"):
        embed_faces(embed, images, None, replace(EmbedOptions(), missing="ignore"))
    with pytest.raises(ValueError, match=r"image 0: it must be \(112, 112, 3\)"):
        embed_faces(embed, images[:, :50])
    with pytest.raises(ValueError, match="at least one"):
        embed_faces(embed, [])


def test_faces_without_landmarks_are_missing_ones(tmp_path, caplog):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((150, 150, 3), np.uint8))
    landmarks = np.stack([CANONICAL_KEYPOINTS * 150, np.zeros((5, 2)), np.full((5, 2), -1), np.full((5, 2), np.nan)])
    with caplog.at_level("WARNING"):
        aligned = AlignedFiles([tmp_path / "a.png"] * 4, landmarks)
    assert f"3 of 4 faces have no landmarks (first: {tmp_path / 'a.png'})" in caplog.text
    assert aligned[0].shape == (112, 112, 3) and np.isfinite(aligned.keypoints).all()
    for index in (1, 2, 3):
        with pytest.raises(ValueError, match=r"a\.png: its landmarks coincide, so it cannot be aligned"):
            aligned[index]


def test_landmarks_that_no_face_has_are_counted(tmp_path, caplog):
    points = np.stack([CANONICAL_KEYPOINTS * 150, CANONICAL_KEYPOINTS[[0, 2, 4, 1, 3]] * 150])
    with caplog.at_level("WARNING"):
        aligned = AlignedFiles([tmp_path / "a.png", tmp_path / "b.png"], points)
    assert aligned.alignable.all()
    assert f"1 of 2 faces have landmarks that lie as no face's do (first: {tmp_path / 'b.png'})" in caplog.text
