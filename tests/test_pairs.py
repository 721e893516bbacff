import logging
import unicodedata

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.data.crops import open_crops
from insightface_kprpe.data.landmark_csv import read_landmark_csv, write_landmark_csv
from insightface_kprpe.data.pair_lists import draw_pair_list, find_pictures, read_pair_list
from insightface_kprpe.data.verification_bin import read_verification_bin, write_verification_bin
from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.data.verification_tools import inspect_verification_bin, make_verification_bin
from insightface_kprpe.evaluation.protocols import run_pairs
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS
from insightface_kprpe.inference.embedding import EmbedOptions
from insightface_kprpe.inference.models import as_embedder


def write_people(folder, counts, size=112, landmarks=True):
    """NAME/NAME_0001.jpg and so on, each of its own color, whose landmarks tell it, too."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            picture = np.full((size, size, 3), rng.integers(0, 255, 3), np.uint8)
            cv2.imwrite(str(folder / name / f"{name}_{number:04d}.jpg"), picture)
    if landmarks:
        crops = open_crops(folder)
        keypoints = CANONICAL_KEYPOINTS + np.arange(crops.count)[:, None, None] / 1000
        write_landmark_csv(folder / "ldmk_5points.csv", keypoints, np.full(crops.count, 0.9))
    return folder


@pytest.fixture
def people(tmp_path):
    return write_people(tmp_path / "people", {"Ann": 3, "Bob_B": 2, "Cid": 1})


VIEW_2 = "2\t1\nAnn\t1\t2\nAnn\t3\tCid\t1\nBob_B\t1\t2\nBob_B\t2\tCid\t1\n"


def test_both_forms_of_lfw(tmp_path):
    file = tmp_path / "pairs.txt"
    file.write_text(VIEW_2)
    listed = read_pair_list(file)
    assert listed.folds == 2 and listed.is_same == [True, False, True, False]
    assert listed.pictures[:4] == ["Ann/Ann_0001", "Ann/Ann_0002", "Ann/Ann_0003", "Cid/Cid_0001"]
    file.write_text("1\r\nAnn 1 12\r\n\r\nAnn 3 Cid 1\r\n")  # the form of pairsDevTest.txt
    listed = read_pair_list(file)
    assert (listed.folds, listed.is_same, listed.pictures[1]) == (10, [True, False], "Ann/Ann_0012")


def test_csv(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text('first,second,is_same\n"a, b/1.jpg",c\\2.jpg,1\nx.jpg,y.jpg,different\n')
    listed = read_pair_list(file)
    assert listed.pictures == ["a, b/1.jpg", "c/2.jpg", "x.jpg", "y.jpg"] and listed.is_same == [True, False]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("pairs.txt", "", "line 1: must be the number"),
        ("pairs.txt", "Ann\t1\t2\n", "line 1: must be the number"),
        ("pairs.txt", "1 2 3\n", "line 1: must be the number"),
        ("pairs.txt", "1\nAnn\t1\n", "line 2: must be NAME i j"),
        ("pairs.txt", "1\nAnn\t1\tx\n", "line 2: must be NAME i j"),
        ("pairs.txt", "1\nAnn\t1\t2\tBob\n", "line 2: must be NAME i j"),
        ("pairs.txt", "10\t300\nAnn\t1\t2\n", "promises 6000 pairs, got 1"),
        ("pairs.txt", "1\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\n", "2 folds or more"),
        ("pairs.csv", "", "holds no pairs"),
        ("pairs.csv", "a,b,1\na,b,2\n", "line 2: must be first,second,is_same"),
        ("pairs.csv", 'a,"b\n', "line 1"),
    ],
)
def test_damaged_lists_name_the_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_pair_list(tmp_path / name)


def test_drawn_pairs_share_no_person_between_folds():
    people = {f"p{i}": [f"p{i}/{k}" for k in range(1 + i % 4)] for i in range(60)}
    drawn = draw_pair_list(people, 120, seed=3)
    assert drawn == draw_pair_list(people, 120, seed=3) != draw_pair_list(people, 120, seed=4)
    pairs = np.array(drawn.pictures).reshape(10, 12, 2)
    owners = np.vectorize(lambda picture: picture.split("/")[0])(pairs)
    in_fold = [set(fold.ravel()) for fold in owners]
    assert not any(in_fold[i] & in_fold[j] for i in range(10) for j in range(i))
    same = np.array(drawn.is_same).reshape(10, 12)
    np.testing.assert_array_equal(owners[..., 0] == owners[..., 1], same)
    assert (same.sum(1) == 6).all()
    assert len({tuple(sorted(pair)) for pair in pairs.reshape(-1, 2).tolist()}) == 120


def test_all_pairs_that_there_are_can_be_drawn():
    people = {f"p{i}": ["a", "b"] for i in range(20)}
    people = {name: [f"{name}/{k}" for k in files] for name, files in people.items()}
    drawn = draw_pair_list(people, 40)  # two people a fold: both of their pairs
    assert len({tuple(sorted(pair)) for pair in zip(drawn.pictures[::2], drawn.pictures[1::2], strict=True)}) == 40
    with pytest.raises(ValueError, match="60 pairs need 3 of each kind .* got at most 2 of one person"):
        draw_pair_list(people, 60)
    for count in (0, 30, 10):
        with pytest.raises(ValueError, match="multiple of 20"):
            draw_pair_list(people, count)


def test_names_are_found_however_they_are_written(tmp_path):
    people = {unicodedata.normalize("NFD", "José"): 1}
    folder = write_people(tmp_path / "set" / "images", people, landmarks=False).parent
    (tmp_path / "set" / "other").mkdir()
    cv2.imwrite(str(tmp_path / "set" / "other" / "a.png"), np.zeros((4, 4, 3), np.uint8))
    found = find_pictures(folder, ["José/José_0001", "José/José_0001.png", "other/a.jpg", "no/one_0001"])
    assert [path.is_file() for path in found] == [True, True, True, False]
    assert found[3] == folder / "no" / "one_0001"


def test_a_set_from_a_list(people, tmp_path):
    (people / "pairs.txt").write_text("5\t1\n" + VIEW_2.split("\n", 1)[1] * 2 + "Ann\t2\t3\nAnn\t2\tCid\t1\n")
    made = make_verification_bin(people, tmp_path / "set.bin")
    assert made[:4] == (10, 5, 0, 3) and made.template == 0
    pairs = read_verification_bin(tmp_path / "set.bin")
    assert pairs.images[3] == (people / "Cid" / "Cid_0001.jpg").read_bytes()
    assert pairs.is_same.tolist() == [True, False] * 5
    keypoints, scores = read_landmark_csv(tmp_path / "set_ldmk_5points.csv", 20)
    np.testing.assert_allclose(keypoints[3], CANONICAL_KEYPOINTS + 5 / 1000, atol=1e-5)
    assert scores.min() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="already exists"):
        make_verification_bin(people, tmp_path / "set.bin")


def test_missing_pictures(people, tmp_path, caplog):
    lines = [f"Ann/Ann_000{1 + i % 3}.jpg,Bob_B/Bob_B_000{1 + i % 2}.jpg,{i % 2}" for i in range(12)]
    (tmp_path / "list.csv").write_text("\n".join([*lines, "Ann/Ann_0001.jpg,Ann/Ann_0009.jpg,1"]))
    with pytest.raises(ValueError, match="1 of 6 pictures cannot be read, of 1 pairs: .*Ann_0009"):
        make_verification_bin(people, tmp_path / "a.bin", tmp_path / "list.csv")
    assert not list(tmp_path.glob("a*"))
    with caplog.at_level(logging.WARNING):
        made = make_verification_bin(people, tmp_path / "a.bin", tmp_path / "list.csv", missing="skip")
    assert made[:3] == (12, 6, 1) and "Ann_0009" in caplog.text
    (people / "ldmk_5points.csv").unlink()
    assert make_verification_bin(people, tmp_path / "b.bin", tmp_path / "list.csv", missing="skip").landmarks is None
    assert not (tmp_path / "b_ldmk_5points.csv").exists()


def test_a_set_needs_both_kinds_and_enough(people, tmp_path):
    (tmp_path / "list.csv").write_text("Ann/Ann_0001.jpg,Ann/Ann_0002.jpg,1\n" * 12)
    with pytest.raises(ValueError, match="of the same person only"):
        make_verification_bin(people, tmp_path / "a.bin", tmp_path / "list.csv")
    (people / "pairs.txt").write_text("1\nAnn\t1\t2\nAnn\t1\tCid\t1\n")
    with pytest.raises(ValueError, match="at least 10 pairs"):
        make_verification_bin(people, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"out must end in \.bin"):
        make_verification_bin(people, tmp_path / "a")


def test_whole_photos_are_squeezed_with_a_warning(tmp_path, caplog):
    folder = write_people(tmp_path / "people", {f"p{i:02d}": 2 for i in range(20)}, landmarks=False)
    cv2.imwrite(str(folder / "p00" / "p00_0001.jpg"), np.zeros((300, 200, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        made = make_verification_bin(folder, tmp_path / "a.bin", 40)
    assert made[:3] == (40, 20, 0) and "1 of 40 pictures are no squares" in caplog.text
    pairs = read_verification_bin(tmp_path / "a.bin")
    assert {pairs.image(i).shape for i in range(80)} == {(112, 112, 3)}


@as_embedder
def mean_color(images, keypoints):
    return images.mean((2, 3)) + 0.01 * keypoints[:, :3, 0]


def test_a_folder_is_evaluated_in_its_own_folds(people, tmp_path):
    pytest.importorskip("torch")
    (people / "pairs.txt").write_text(VIEW_2)
    pairs = open_verification(str(people))
    assert (pairs.name, pairs.folds, pairs.keypoint_source) == ("people", 2, "ldmk_5points.csv")
    np.testing.assert_allclose(pairs.keypoints[3], CANONICAL_KEYPOINTS + 5 / 1000, atol=1e-5)
    assert pairs.images[3].shape == (112, 112, 3)
    assert pairs.source != open_verification(str(_changed(people))).source


def _changed(people):
    cv2.imwrite(str(people / "Cid" / "Cid_0001.jpg"), np.zeros((112, 112, 3), np.uint8))
    return people


def test_a_folder_and_its_bin_give_the_same(tmp_path):
    folder = write_people(tmp_path / "people", {f"p{i:02d}": 2 for i in range(20)})
    lines = [f"p{i:02d} 1 2\np{i:02d} 1 p{i + 1:02d} 2" for i in range(0, 20, 2)]
    (folder / "pairs.txt").write_text("10 1\n" + "\n".join(lines))
    make_verification_bin(folder, tmp_path / "people.bin")
    embed = mean_color
    (one,), (other,) = (
        run_pairs(embed, open_verification(str(target)), EmbedOptions()) for target in (folder, tmp_path / "people.bin")
    )
    assert one.metrics == other.metrics
    (folder / "p00" / "p00_0001.jpg").unlink()
    (folder / "ldmk_5points.csv").unlink()
    with pytest.raises(ValueError, match="p00_0001"):
        run_pairs(embed, open_verification(str(folder)), EmbedOptions())
    (skipped,) = run_pairs(embed, open_verification(str(folder)), EmbedOptions(missing="skip"))
    assert skipped.settings["pairs"].startswith("18,")
    assert open_verification("people", tmp_path).folds == 10  # the file of that name


def test_inspection(people, tmp_path):
    (people / "pairs.txt").write_text("10 1\n" + VIEW_2.split("\n", 1)[1] * 5)
    make_verification_bin(people, tmp_path / "set.bin")
    facts = inspect_verification_bin(tmp_path / "set.bin")
    assert facts["pairs"] == "20: 10 of one person, 10 of two" and facts["different images"] == 6
    assert facts["folds"] == "10 of 2 to 2 pairs" and facts["landmarks"].startswith("40 rows")
    assert facts["bad"] == [] and facts["contradictions"] == ["16 pairs are there twice (first: pairs 0 and 4)"]
    images = read_verification_bin(tmp_path / "set.bin").images
    small = cv2.imencode(".png", np.zeros((9, 8, 3), np.uint8))[1].tobytes()
    damaged = [images[0]] * 2 + [images[0], small] * 2 + [images[1], b"x"]
    write_verification_bin(tmp_path / "bad.bin", damaged, [1, 1, 0, 0])
    facts = inspect_verification_bin(tmp_path / "bad.bin")
    assert len(facts["bad"]) == 1 and "image 7" in facts["bad"][0]
    said = " ".join(facts["contradictions"])
    assert "at least 10 pairs" in said and "an image with itself (first: pair 0)" in said
    assert "two answers (first: pairs 1 and 2)" in said and "8x9" in said


def test_the_verbs(people, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["bin", *map(str, arguments)])

    (people / "pairs.txt").write_text("10 1\n" + VIEW_2.split("\n", 1)[1] * 5)
    out = tmp_path / "set.bin"
    result = run("make", people, "--out", out, "--num-workers", 0)
    assert result.exit_code == 0 and f"{out}: 20 pairs of 3 people, 10 of them of one person\n" in result.output
    result = run("inspect", out)
    assert result.exit_code == 1 and "there twice" in result.output
    result = run("make", people, "--out", tmp_path / "x.bin", "--list", people / "pairs.txt", "--pairs", 20)
    assert "not both" in str(result.exception)
    result = run("make", people, "--out", tmp_path / "x.bin", "--list", tmp_path / "no.txt")
    assert "list of pairs not found" in str(result.exception)
