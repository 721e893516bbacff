"""IJB template verification and identification against the reference numbers, and the protocol files."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from reference import metrics as plain

from insightface_kprpe.evaluation import ijb, pair_scores
from insightface_kprpe.evaluation.fusion import norm_weights, pool_templates
from insightface_kprpe.evaluation.metrics import tpr_at_fpr


@pytest.mark.parametrize("variant", ["Norm:True_Det:True", "Norm:True_Det:False", "Norm:False_Det:True"])
def test_golden(golden, variant):
    truth = golden("ijb.npz")
    embeddings, detector = truth["embeddings"], truth["detector_scores"]
    weights = {
        "Norm:True_Det:True": norm_weights(embeddings) * detector,
        "Norm:True_Det:False": None,
        "Norm:False_Det:True": detector,
    }[variant]
    arguments = [truth[name] for name in ("templates", "medias", "p1", "p2", "label")]
    expected = dict(zip(truth["result_names"], truth["result_values"], strict=True))
    result = ijb.verification(embeddings, *arguments, weights=weights)
    assert {f"{variant}_{key}" for key in result} == {key for key in expected if key.startswith(variant)}
    for key, value in result.items():
        wanted, tolerance = expected[f"{variant}_{key}"], 1e-6 if "thresh" in key else 1e-9
        assert value == pytest.approx(wanted if "thresh" in key else wanted / 100, abs=tolerance), key


@pytest.fixture
def small():
    """Templates with numbers far apart, and pairs of them in both orders, some repeated."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.choice(10_000, 90, replace=False))
    templates = rng.permutation(np.concatenate([numbers, rng.choice(numbers, 200)]))
    subject = rng.integers(0, 20, 10_000)
    centers = rng.normal(size=(20, 16))
    embeddings = centers[subject[templates]] + 0.7 * rng.normal(size=(290, 16))
    p1, p2 = rng.choice(numbers, 3000), rng.choice(numbers, 3000)
    return {
        "embeddings": embeddings,
        "templates": templates,
        "medias": rng.integers(0, 3, 290),
        "p1": p1,
        "p2": p2,
        "label": subject[p1] == subject[p2],
    }


def plain_scores(small):
    pooled, known = pool_templates(small["embeddings"], small["templates"], small["medias"])
    a, b = (pooled[np.searchsorted(known, small[side])] for side in ("p1", "p2"))
    return (a * b).sum(1)


@pytest.mark.parametrize(
    "layout", ["any", "gallery first", "gallery second", "few pairs", "small blocks", "wide numbers"]
)
def test_scores_of_every_pair_layout(small, layout, monkeypatch):
    numbers = np.unique(small["templates"])
    if layout.startswith("gallery"):
        few, many = np.isin(small["p1"], numbers[::9]), np.isin(small["p2"], numbers[::9], invert=True)
        keep = few & many
        sides = ("p1", "p2") if layout.endswith("first") else ("p2", "p1")
        small["p1"], small["p2"] = small[sides[0]][keep], small[sides[1]][keep]
    elif layout == "few pairs":
        small["p1"], small["p2"] = small["p1"][:5], small["p2"][:5]
    elif layout == "small blocks":
        monkeypatch.setattr(pair_scores, "SCORE_BLOCK_BYTES", 1)
    elif layout == "wide numbers":
        monkeypatch.setattr(pair_scores, "LOOKUP_SPAN", 0)
    scores = ijb.verification_scores(**{key: value for key, value in small.items() if key != "label"})
    np.testing.assert_allclose(scores, plain_scores(small), atol=1e-10)


def test_equal_pairs_have_equal_scores(small):
    small["p1"], small["p2"] = np.append(small["p1"], small["p2"]), np.append(small["p2"], small["p1"])
    del small["label"]
    scores = ijb.verification_scores(**small)
    np.testing.assert_array_equal(scores[:3000], scores[3000:])


def test_tied_scores():
    """3,000 pairs that share four scores, against counting."""
    rng = np.random.default_rng(0)
    templates = np.arange(90)
    embeddings = np.array([[1, 0], [0, 1], [3, 4.0]])[templates % 3]
    p1, p2 = rng.integers(0, 90, (2, 3000))
    cosine = np.array([[1, 0, 0.6], [0, 1, 0.8], [0.6, 0.8, 1]])[p1 % 3, p2 % 3]
    label = rng.random(3000) < 0.2 + 0.6 * cosine
    for threshold in (1.0, 0.8, 0.6):
        fpr = (cosine[~label] >= threshold).mean()
        result = ijb.verification(embeddings, templates, templates, p1, p2, label, fprs=(fpr,))
        assert result[f"tpr_at_fpr_{fpr}"] == pytest.approx((cosine[label] >= threshold).mean())
        assert result[f"thresh_at_fpr_{fpr}"] == pytest.approx(threshold)


@pytest.mark.parametrize("weights", [None, [0.5, 0.1, 0.7], [0.0, 1.0, 0.0]])
def test_template_with_one_image_is_that_image(weights):
    embeddings = np.array([[3.0, 4.0], [0.0, 2.0], [-6.0, 8.0]])
    pairs = np.array([5, 5, 9]), np.array([7, 9, 9])
    weights = None if weights is None else np.array(weights)  # also where it weighs nothing
    scores = ijb.verification_scores(embeddings, np.array([9, 7, 5]), np.array([1, 1, 1]), *pairs, weights)
    np.testing.assert_allclose(scores, [0.8, 0.28, 1.0])


def test_verification_does_not_change_its_arguments(small):
    before = {key: value.copy() for key, value in small.items()}
    result = ijb.verification(**small, fprs=(0.01,))
    expected = tpr_at_fpr(plain_scores(small), small["label"], [0.01], rule="insightface")[0]
    assert result == {"tpr_at_fpr_0.01": expected.tpr, "thresh_at_fpr_0.01": pytest.approx(expected.threshold)}
    for key, value in before.items():
        np.testing.assert_array_equal(small[key], value)


@pytest.mark.parametrize("span", [1 << 24, 0])
def test_unknown_template(small, span, monkeypatch):
    monkeypatch.setattr(pair_scores, "LOOKUP_SPAN", span)
    unknown = np.setdiff1d(np.arange(10_000), small["templates"])[3]
    for wrong in (unknown, -5, 99_999):
        small["p2"] = np.array([small["p1"][0]] * 2999 + [wrong])
        with pytest.raises(ValueError, match=rf"p2 names templates that have no images \(1\): {wrong}$"):
            ijb.verification(**small)


def test_verification_bad_input(small):
    with pytest.raises(ValueError, match="labels must be"):
        ijb.verification(**(small | {"label": small["label"][:-1]}))
    with pytest.raises(ValueError, match="the same length"):
        ijb.verification(**(small | {"p1": small["p1"][:-1]}))
    with pytest.raises(ValueError, match="template numbers"):
        ijb.verification(**(small | {"p1": small["p1"].astype(float)}))


def draw_ties(kind, seed, dim=32):
    """Templates of few images, of which many are alike, and pairs of them."""
    rng = np.random.default_rng(seed)
    person = rng.integers(0, 8, 30)
    templates = np.concatenate([np.arange(30), rng.integers(0, 30, 30)]) if seed % 2 else np.arange(30)
    centers = rng.normal(size=(30, dim))
    if kind == "signs":
        embeddings = np.sign(centers[person[templates]] + rng.normal(size=(len(templates), dim)))
    else:
        other = rng.random(len(templates)) < 0.3
        embeddings = centers[np.where(other, rng.integers(0, 8, len(templates)), person[templates])]
    p1 = rng.integers(0, 30, 400)
    p2 = (p1 + rng.integers(1, 30, 400)) % 30
    pairs = {"p1": p1, "p2": p2, "label": person[p1] == person[p2]}
    return {"embeddings": embeddings, "templates": templates, "medias": rng.integers(0, 3, len(templates)), **pairs}


@pytest.mark.parametrize("kind", ["signs", "duplicates"])
@pytest.mark.parametrize("fusion", [None, "average"])
def test_scores_that_are_equal_mathematically(kind, fusion):
    """Against the reference rule on scores of which rounding errors are taken away.

    Whatever the order in which numbers are added: the dimensions are shuffled.
    """
    infinite = 0
    for seed in range(20):
        drawn = draw_ties(kind, seed)
        weights = None if fusion is None else np.ones(len(drawn["templates"]))
        pooled, known = pool_templates(drawn["embeddings"], drawn["templates"], drawn["medias"], weights)
        a, b = (pooled[np.searchsorted(known, drawn[side])] for side in ("p1", "p2"))
        scores = np.round((a * b).sum(1), 8)
        result = ijb.verification(**drawn, weights=weights)
        shuffled = drawn["embeddings"][:, np.random.default_rng(seed).permutation(32)]
        assert ijb.verification(**(drawn | {"embeddings": shuffled}), weights=weights) == result
        for target in ijb.FPRS:
            _, tpr, threshold = plain.nearest_on_roc(scores, drawn["label"], target)
            assert result[f"tpr_at_fpr_{target}"] == pytest.approx(tpr, abs=1e-12), (seed, target)
            assert result[f"thresh_at_fpr_{target}"] == pytest.approx(threshold, abs=1e-8)
            infinite += np.isinf(threshold)
    assert infinite if kind == "duplicates" else True  # such points are rare, but they are there


@pytest.mark.parametrize("ties", [False, True])
def test_identification_equals_insightfaces_rule(ties):
    """Two galleries joined, several probes per person, and some whom no gallery holds."""
    rng = np.random.default_rng(0)
    people = rng.permutation(40)
    galleries = {"G1": ijb.Subjects(np.arange(20), people[:20]), "G2": ijb.Subjects(np.arange(20, 38), people[20:38])}
    probe = ijb.Subjects(np.arange(100, 250), rng.integers(0, 40, 150))
    templates = np.concatenate([np.arange(38), probe.templates])
    who = np.concatenate([people[:38], probe.subjects])
    embeddings = rng.normal(size=(40, 16))[who] + (0 if ties else 0.9 * rng.normal(size=(188, 16)))
    found = ijb.identification(embeddings, templates, templates, probe, galleries, fars=(0.01, 0.1, 0.5))
    known = np.isin(probe.subjects, people[:38])
    expected = plain.insightface_1n(
        embeddings[38:][known], embeddings[:38], probe.subjects[known], people[:38], (0.01, 0.1, 0.5)
    )
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert found["rank_1"] <= found["rank_5"] <= found["rank_10"]
    assert ties or 0 < found["tpir_at_far_0.01"] < found["tpir_at_far_0.5"] < 1
    nist = ijb.nist_identification(embeddings, templates, templates, probe, galleries)["mean"]
    assert ties or nist["rank_1"] > found["rank_1"]  # smaller galleries are easier


def test_nist_identification_by_hand():
    # Template 10 * subject is the gallery image, 10 * subject + 1 the probe; subject 3's probe looks like subject 1.
    embeddings = np.eye(5)[[0, 0, 1, 1, 2, 0, 3, 3, 4]] + 0.01 * np.eye(9, 5)
    templates = np.array([10, 11, 20, 21, 30, 31, 40, 41, 51])
    galleries = {
        "G1": ijb.Subjects(np.array([10, 30]), np.array([1, 3])),
        "G2": ijb.Subjects(np.array([20, 40]), np.array([2, 4])),
    }
    probe = ijb.Subjects(np.array([11, 21, 31, 41, 51]), np.array([1, 2, 3, 4, 5]))
    result = ijb.nist_identification(embeddings, templates, templates, probe, galleries, ranks=(1, 2), fpirs=(0.1, 1.0))
    assert result["G1"]["rank_1"] == 0.5 and result["G1"]["rank_2"] == 1
    assert result["G2"] == {"rank_1": 1, "rank_2": 1, "tpir_at_fpir_0.1": 1, "tpir_at_fpir_1.0": 1}
    assert result["mean"]["rank_1"] == 0.75
    with pytest.raises(ValueError, match=r"gallery G1 names templates that have no images .*: 99"):
        ijb.nist_identification(
            embeddings, templates, templates, probe, {"G1": ijb.Subjects(np.array([99]), np.array([1]))}
        )


@pytest.fixture
def meta(tmp_path):
    (tmp_path / "meta").mkdir()
    points = " ".join(f"{n}.5" for n in range(10))
    files = {
        "name_5pts_score": f"1.jpg {points} 0.9\n2.jpg {points} 0.8\n",
        "face_tid_mid": "1.jpg 1 101\n2.jpg 7 102\n",
        "template_pair_label": "1 7 0\n1 1 1\n7 7 1\n",
    }
    for name, text in files.items():
        (tmp_path / "meta" / f"ijbb_{name}.txt").write_text(text)
    return tmp_path


def test_read_meta(meta):
    found = ijb.read_meta(meta, "IJBB")
    assert found.names == ["1.jpg", "2.jpg"]
    assert found.landmarks_px.shape == (2, 5, 2) and found.landmarks_px[0, 1].tolist() == [2.5, 3.5]
    np.testing.assert_allclose(found.detector_scores, [0.9, 0.8])
    assert found.templates.tolist() == [1, 7] and found.medias.tolist() == [101, 102]
    assert found.p1.tolist() == [1, 1, 7] and found.p2.tolist() == [7, 1, 7]
    assert found.label.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("template_pair_label", "1 7 0\n1 1", "template_pair_label.txt: .*cut off"),
        ("template_pair_label", "1 7 0\n1 x 1\n", "template_pair_label.txt: line 2: must have 3 numbers, got '1 x 1'"),
        ("template_pair_label", "1 7 5\n", "third column"),
        ("template_pair_label", "1 7\n", "must have 3 numbers"),
        ("face_tid_mid", "1.jpg 1 101\n", "2 and 1 lines"),
        ("face_tid_mid", "1.jpg 1 101\n3.jpg 7 102\n", "line 2 differs"),
        ("name_5pts_score", "1.jpg 1 2 3\n", "must have 11 numbers"),
        ("name_5pts_score", f"1.jpg{11 * ' 1'}\n2.jpg\n", "name_5pts_score.txt: line 2: must have 11 numbers"),
        ("name_5pts_score", f"1.jpg{10 * ' 1'} nan\n", "name_5pts_score.txt: line 1: must have 11 numbers"),
        ("face_tid_mid", "1.jpg 1 101\n\n2.jpg 7\n", "face_tid_mid.txt: line 3: must have 2 numbers, got '7'"),
        ("face_tid_mid", "", "face_tid_mid.txt: line 1: must have 2 numbers, got ''"),
        ("template_pair_label", "1 7 0\n\xe9 7 1\n".encode("latin-1"), "template_pair_label.txt: line 2: .* UTF-8"),
        ("template_pair_label", "1 7 0\n".encode("utf-16"), "template_pair_label.txt.* UTF-16; save it as UTF-8"),
    ],
)
def test_read_meta_bad_files(meta, name, text, message):
    path = meta / "meta" / f"ijbb_{name}.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        ijb.read_meta(meta, "IJBB")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        ijb.read_meta(meta, "IJBB")


def test_read_meta_from_windows(meta):
    """A mark before the text, and lines that end otherwise."""
    expected = ijb.read_meta(meta, "IJBB")
    for path in (meta / "meta").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    found = ijb.read_meta(meta, "IJBB")
    assert found.names == expected.names
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_read_subjects(tmp_path):
    path = tmp_path / "ijbc_1N_gallery_G1.csv"
    path.write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME\n5,9,img/1.jpg\n5,9,img/2.jpg\n3,8,img/3.jpg\n")
    found = ijb.read_subjects(path)
    assert found.templates.tolist() == [3, 5] and found.subjects.tolist() == [8, 9]
    path.write_text("TEMPLATE_ID,SUBJECT_ID\n5,9\n5,8\n")
    with pytest.raises(ValueError, match="template 5 has more than one subject"):
        ijb.read_subjects(path)
    path.write_text("TEMPLATE_ID,SUBJECT_ID\n5,9\n5\n")
    with pytest.raises(ValueError, match=r"G1\.csv: line 3: must have 2 numbers, got '5'"):
        ijb.read_subjects(path)


def test_real_layout(shared, tmp_path):
    folder = shared / "data" / "faces" / "ijb"
    found = ijb.read_meta(folder)
    assert len(found.names) == len(found.templates) == len(found.landmarks_px) == 830
    assert len(found.p1) == len(found.p2) == len(found.label) == 12_198
    embeddings = np.random.default_rng(0).normal(size=(830, 32))
    assert len(ijb.verification(embeddings, *found[3:])) == 12
    shutil.copytree(folder / "meta", tmp_path / "meta")
    cut = tmp_path / "meta" / "ijbc_name_5pts_score.txt"
    cut.write_bytes(cut.read_bytes()[:40_000])
    with pytest.raises(ValueError, match=r"ijbc_name_5pts_score\.txt"):
        ijb.read_meta(tmp_path)
