"""IJB-S: templates from medias, searched in blocks, and the files of the protocol."""

from __future__ import annotations

import numpy as np
import pytest

from insightface_kprpe.evaluation import ijb, ijbs
from insightface_kprpe.evaluation.fusion import pool_templates
from insightface_kprpe.evaluation.search import Matches, match_scores, rank_k, tpir_at_fpir


def template_list(*rows):
    return ijbs.TemplateList(*np.array(rows).T)


@pytest.fixture
def drawn():
    """40 subjects; a still and three clips of one to six frames each; gallery G1 has half of them, G2 the others."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(40, 16))
    medias = np.repeat(np.arange(160), np.where(np.arange(160) % 4, rng.integers(1, 7, 160), 1))
    subjects = medias // 4
    order = rng.permutation(len(medias))
    embeddings = (centers[subjects] + 1.2 * rng.normal(size=(len(medias), 16))).astype(np.float32)[order]
    # The clips 4s + 1 and 4s + 2 are probes of their own; 4s + 2 and 4s + 3 together make one with two medias.
    probe = [(1000 + m, m // 4, m) for m in range(160) if m % 4 in (1, 2)]
    probe += [(2000 + m // 4, m // 4, m) for m in range(160) if m % 4 in (2, 3)]
    galleries = {
        "G1": template_list(*((s, s, 4 * s) for s in range(20))),
        "G2": template_list(*((s, s, 4 * s) for s in range(39, 19, -1))),
    }
    return embeddings, medias[order], ijbs.Protocol(template_list(*probe), galleries)


def plain_search(embeddings, medias, protocol, weights):
    """The same with every image of every template written out."""

    def pool(rows):
        of_row = [np.flatnonzero(medias == media) for media in rows.medias]
        images = np.concatenate(of_row)
        repeats = [len(part) for part in of_row]
        chosen = None if weights is None else weights[images]
        pooled, known = pool_templates(
            embeddings[images], np.repeat(rows.templates, repeats), np.repeat(rows.medias, repeats), chosen
        )
        return pooled, np.array([rows.subjects[rows.templates == template][0] for template in known])

    probe, subjects = pool(protocol.probe)
    matches = {}
    for name, rows in protocol.galleries.items():
        gallery, ids = pool(rows)
        matches[name] = match_scores(probe @ gallery.T, subjects[:, None] == ids)
    return matches


@pytest.mark.parametrize("images_at_once", [1, 10, 1 << 15])
@pytest.mark.parametrize("weighted", [False, True])
def test_search_equals_plain_form(drawn, images_at_once, weighted, monkeypatch, tmp_path):
    monkeypatch.setattr(ijbs, "IMAGES_AT_ONCE", images_at_once)
    embeddings, medias, protocol = drawn
    weights = np.random.default_rng(1).random(len(medias)) if weighted else None
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    found = ijbs.search_protocol(mapped, medias, protocol, weights)
    for name, expected in plain_search(embeddings, medias, protocol, weights).items():
        np.testing.assert_array_equal(found[name].rank, expected.rank)
        np.testing.assert_allclose(found[name].mated_score, expected.mated_score, atol=1e-6)
        np.testing.assert_allclose(found[name].nonmated_score, expected.nonmated_score, atol=1e-6)
    assert 0 < rank_k(found["G1"], (1,))[1] < 1  # the case is neither trivial nor hopeless


def test_identification_is_open_where_a_gallery_lacks_people(drawn):
    embeddings, medias, protocol = drawn
    rates = ijbs.identification(embeddings, medias, protocol)
    matches = plain_search(embeddings, medias, protocol, None)
    assert list(rates) == ["G1", "G2", "mean"]
    keys = ["rank_1", "rank_5", "rank_10", "tpir_at_fpir_0.01", "tpir_at_fpir_0.1"]
    for name, found in matches.items():
        assert list(rates[name]) == keys
        expected = [*rank_k(found, (1, 5, 10)).values(), *(point.tpr for point in tpir_at_fpir(found, (0.01, 0.1)))]
        np.testing.assert_allclose(list(rates[name].values()), expected)
    assert rates["mean"]["rank_1"] == pytest.approx((rates["G1"]["rank_1"] + rates["G2"]["rank_1"]) / 2)

    everyone = ijbs.TemplateList(*(np.concatenate(parts) for parts in zip(*protocol.galleries.values(), strict=True)))
    closed = ijbs.identification(embeddings, medias, ijbs.Protocol(protocol.probe, {"all": everyone}), ranks=(1,))
    assert list(closed["all"]) == ["rank_1"] and closed["all"]["rank_1"] < rates["mean"]["rank_1"]


def test_open_set_numbers_are_those_of_the_reference(golden):
    truth = golden("open_set.npz")
    found = match_scores(truth["scores"], truth["labels"])
    rates = ijb.identification_rates({"G1": found}, ranks=(1,), fpirs=(0.01, 0.1))["G1"]
    np.testing.assert_allclose([rates["tpir_at_fpir_0.01"], rates["tpir_at_fpir_0.1"]], truth["dir"], atol=1e-9)


def test_identification_by_hand():
    # Subject 7: one still, and a clip whose two good frames outweigh the bad one; subject 8 is in no gallery.
    embeddings = np.array([[1, 0, 0], [0, 1, 0], [1, 0.1, 0], [1, 0.1, 0], [0, 1, 0], [0, 0, 1.0]])
    medias = np.array([70, 90, 71, 71, 71, 80])
    protocol = ijbs.Protocol(template_list((1, 7, 71), (2, 8, 80)), {"G1": template_list((5, 7, 70), (6, 9, 90))})
    rates = ijbs.identification(embeddings, medias, protocol, ranks=(1, 2), fpirs=(0.0,))
    assert rates["G1"] == {"rank_1": 1, "rank_2": 1, "tpir_at_fpir_0.0": 1}
    only_bad = np.array([1, 1, 0, 0, 1, 1.0])
    rates = ijbs.identification(embeddings, medias, protocol, only_bad, ranks=(1, 2), fpirs=(0.0,))
    assert rates["mean"] == {"rank_1": 0, "rank_2": 1, "tpir_at_fpir_0.0": 0}


def test_ties_count_against_the_mate(drawn):
    embeddings, medias, protocol = drawn
    found = ijbs.search_protocol(np.ones_like(embeddings), medias, protocol)
    assert isinstance(found["G1"], Matches) and set(found["G1"].rank) == {0, 20}


def test_bad_input(drawn):
    embeddings, medias, protocol = drawn
    with pytest.raises(ValueError, match=r"medias and weights must be \(\d+,\)"):
        ijbs.identification(embeddings, medias[:-1], protocol)
    with pytest.raises(ValueError, match=r"medias and weights must be \(\d+,\)"):
        ijbs.identification(embeddings, medias, protocol, np.ones(3))
    with pytest.raises(ValueError, match=r"probe names medias that have no images \(1\): 5000$"):
        ijbs.identification(embeddings, medias, protocol._replace(probe=template_list((1, 1, 1), (1, 1, 5000))))
    embeddings[17, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN or Inf for image 17 \("):
        ijbs.identification(embeddings, medias, protocol)


POINTS = ",".join(f"{n}.5" for n in range(10))
FILES = {
    "images.csv": f"{','.join(ijbs.IMAGE_COLUMNS)}\nstills/a.jpg,70,7,{POINTS},0.9\n"
    f'"clips/b, 1.jpg",71,7,{POINTS},0.8\nclips/b2.jpg,71,7,{POINTS},1\nstills/c.jpg,90,9,{POINTS},1\n',
    "uav/probe.csv": "template,subject,media\n1,7,71\n",
    "uav/gallery_G1.csv": "template,subject,media\n5,7,70\n6,9,90\n",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "uav").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_reads_files(folder):
    found = ijbs.read_ijbs(folder)
    assert found.paths == ["stills/a.jpg", "clips/b, 1.jpg", "clips/b2.jpg", "stills/c.jpg"]
    assert found.landmarks_px.shape == (4, 5, 2) and found.landmarks_px[3, 1].tolist() == [2.5, 3.5]
    np.testing.assert_allclose(found.detector_scores, [0.9, 0.8, 1, 1])
    assert found.medias.tolist() == [70, 71, 71, 90] and found.subjects.tolist() == [7, 7, 7, 9]
    assert list(found.protocols) == ["uav"] and list(found.protocols["uav"].galleries) == ["G1"]
    assert [column.tolist() for column in found.protocols["uav"].galleries["G1"]] == [[5, 6], [7, 9], [70, 90]]
    embeddings = np.array([[1, 0], [1, 0.2], [1, 0.1], [0, 1]])
    rates = ijbs.identification(embeddings, found.medias, found.protocols["uav"], ranks=(1,))
    assert rates["mean"] == {"rank_1": 1}


def test_a_gallery_without_any_subject_of_the_probes_is_named(folder):
    (folder / "uav" / "gallery_G2.csv").write_text("template,subject,media\n6,9,90\n")
    with pytest.raises(ValueError, match=r"gallery_G2\.csv holds no subject of .*probe\.csv"):
        ijbs.read_ijbs(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.csv", ",0.8\n", "\n", r"images\.csv: line 3: expected 14 columns, got 13; is the file cut off"),
        ("images.csv", "c.jpg,90,9," + POINTS + ",1\n", "c.jpg,90", r"images\.csv: line 5: expected 14 columns, got 2"),
        ("images.csv", "a.jpg,70", "a.jpg,x", r"images\.csv: line 2: invalid literal.*'x'"),
        ("images.csv", "0.5", "nan", r"images\.csv: line 2: expected a path, finite landmarks"),
        ("images.csv", ",0.9", ",-1", r"images\.csv: line 2: .*score of 0 or more"),
        ("images.csv", "stills/a.jpg", "", r"images\.csv: line 2: expected a path"),
        ("images.csv", "b2.jpg,71,7", "b2.jpg,71,8", r"line 4: media 71 has subject 8, but 7 in line 3"),
        ("images.csv", "path,media", "file,media", r"images\.csv: line 1: columns must be path,media"),
        ("images.csv", FILES["images.csv"].split("\n", 1)[1], "", "must have lines below the header"),
        ("uav/probe.csv", "1,7,71", "1,7,72", r"probe\.csv: line 2: media 72 has no images"),
        ("uav/probe.csv", "1,7,71", "1,9,71", r"probe\.csv: line 2: media 71 shows subject 7 .*got 9"),
        ("uav/probe.csv", "1,7,71\n", "1,7", r"probe\.csv: line 2: expected 3 columns, got 2"),
        ("uav/probe.csv", "1,7,71", "1,7,", r"probe\.csv: line 2: invalid literal"),
        ("uav/gallery_G1.csv", "6,9", "5,9", r"gallery_G1\.csv: line 3: template 5 has subject 9, but 7 in line 2"),
        ("uav/gallery_G1.csv", "6,9", f"{2**70},9", r"gallery_G1\.csv: line 3"),
    ],
)
def test_bad_files_are_named_with_their_line(folder, name, old, new, message):
    assert old in FILES[name]
    (folder / name).write_text(FILES[name].replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        ijbs.read_ijbs(folder)


def test_files_that_are_no_text_are_named(folder):
    for content in (b"\x80\x04\x95pickle", b"path,media\xff", FILES["images.csv"].encode() + b"\0" * 200):
        (folder / "images.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.csv: "):
            ijbs.read_ijbs(folder)


@pytest.mark.parametrize("name", list(FILES))
def test_missing_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split("_")[0].split("/")[-1]):
        ijbs.read_ijbs(folder)


def test_no_protocol(folder):
    (folder / "uav").rename(folder / "UAV_videos")
    with pytest.raises(FileNotFoundError, match="surveillance_to_single, "):
        ijbs.read_ijbs(folder)
